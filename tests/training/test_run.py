"""Whole runs: MiniLM on real reviews, a few steps."""

import json
import shutil
import sys

import pytest
import torch
import yaml
from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lora_ggpo.errors import UserError
from lora_ggpo.recipe.recipe import load_recipe
from lora_ggpo.training import checkpoints, validation
from lora_ggpo.training.callbacks import RunCallback
from lora_ggpo.training.folder import find_runs
from lora_ggpo.training.merge import merge_run
from lora_ggpo.training.reuse import evaluate_run, load_trained
from lora_ggpo.training.run import train
from lora_ggpo.training.scorer import Scorer, fixed_sample
from lora_ggpo.workspace.progress import Reporter
from tests.processes import Process

QUIET = Reporter(quiet=True)


def _train(recipe_file, *overrides):
    return train(load_recipe(recipe_file, overrides), QUIET)[0]


def _losses(run):
    return [(row["step"], row["loss"], row["grad_norm"], row.get("ggpo/tau")) for row in run.log if "loss" in row]


def test_run_folder(finished):
    _, run = finished
    folder = run.folder
    assert [row["step"] for row in run.log if "loss" in row] == list(range(1, 13))
    assert [row["step"] for row in run.log if "validation/log_loss" in row] == [6, 12]
    assert run.log[0]["ggpo/relative_noise"] == pytest.approx(0.05)
    assert set(run.metrics["evaluation"]) == {"validation", "test", "train-clean", "train-noisy"}
    assert run.metrics["evaluation"]["test"]["accuracy"].keys() == {"value", "se", "n"}
    assert run.metrics["training"]["steps"] == 12
    assert run.metrics["training"]["trainable_parameters"] == sum(
        tensor.numel() for tensor in load_trained(folder)[0].parameters() if tensor.requires_grad
    )
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["ggpo"]["seed"] == 0
    assert json.loads((folder / "data.json").read_text())["splits"]["train"]["rows"] == 64
    assert json.loads((folder / "versions.json").read_text())["torch"] == torch.__version__
    predictions = [json.loads(line) for line in (folder / "predictions" / "test.jsonl").read_text().splitlines()]
    right = sum(row["predicted"] == row["label"] for row in predictions) / len(predictions)
    assert right == pytest.approx(run.metrics["evaluation"]["test"]["accuracy"]["value"])
    assert not list(folder.rglob("*.bin")) + list(folder.rglob("*.partial"))


def test_a_finished_run_is_not_run_again(finished, monkeypatch):
    recipe_file, run = finished
    monkeypatch.setattr("lora_ggpo.training.run.build_model", lambda *_: pytest.fail("a model was loaded"))
    before = (run.folder / "metrics.json").stat().st_mtime_ns
    assert _train(recipe_file).metrics == run.metrics
    assert (run.folder / "metrics.json").stat().st_mtime_ns == before


def test_another_recipe_is_refused(finished):
    recipe_file, _ = finished
    with pytest.raises(UserError, match=r"another recipe: training.learning_rate is 0.005 there and 0.001 here"):
        _train(recipe_file, "training.learning_rate=1e-3")


def test_a_resumed_run_equals_an_uninterrupted_one(finished, recipe_file, monkeypatch):
    """Power cuts in the middle of the first epoch, and of the second."""
    log, step_end = finished[1].log, RunCallback.on_step_end
    for step in (5, 11):

        def cut(self, args, state, control, step=step, **kwargs):
            if state.global_step == step:
                raise SystemError("power cut")
            return step_end(self, args, state, control, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(RunCallback, "on_step_end", cut)
            with pytest.raises(SystemError):
                _train(recipe_file)
    run = _train(recipe_file)
    assert _losses(run) == _losses(finished[1])
    assert [row["step"] for row in run.log] == [row["step"] for row in log]
    assert run.metrics["evaluation"] == finished[1].metrics["evaluation"]


def test_resuming_when_only_the_evaluation_is_missing(finished, recipe_file, monkeypatch):
    def cut(*_):
        raise SystemError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr("lora_ggpo.training.run.new_folder", cut)  # all steps done, adapter not saved
        with pytest.raises(SystemError):
            _train(recipe_file)
    with monkeypatch.context() as patch:
        patch.setattr("lora_ggpo.training.scorer.Scorer.score", cut)  # adapter saved, no metrics
        with pytest.raises(SystemError):
            _train(recipe_file)
    run = _train(recipe_file)
    assert _losses(run) == _losses(finished[1])
    assert run.metrics["evaluation"] == finished[1].metrics["evaluation"]


def test_batches_do_not_depend_on_the_method(finished, recipe_file):
    """The first loss precedes any update: it differs by the noise alone; without noise it is the same."""
    noiseless = _train(recipe_file, "ggpo.sigma=0", "output=" + str(recipe_file.parent / "a"))
    plain = _train(recipe_file, "ggpo=null", "output=" + str(recipe_file.parent / "b"))
    assert [row[:3] for row in _losses(noiseless)] == [row[:3] for row in _losses(plain)]
    assert _losses(plain) != _losses(finished[1])


def test_a_loss_that_is_not_finite_stops_the_run(recipe_file):
    with pytest.raises(UserError, match=r"is (nan|inf) at step \d+; (the last good|there is no) checkpoint"):
        _train(recipe_file, "training.learning_rate=1e30", "training.max_grad_norm=0", "ggpo=null")


def test_a_full_disk_leaves_the_previous_checkpoint(recipe_file, monkeypatch):
    save = torch.save

    def full(value, path, *args, **kwargs):
        if "checkpoint-6" in str(path):
            raise RuntimeError(
                "[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/0"
            )
        return save(value, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(UserError, match="is full; free some space"):
            _train(recipe_file)
    folder = recipe_file.parent / "runs" / "seed-0" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["checkpoint-3"]
    assert checkpoints.is_whole(folder / "checkpoint-3")


def _print_logits(folder):
    sys.modules |= {name: None for name in sys.modules if name.partition(".")[0] == "lora_ggpo"}
    base = PeftConfig.from_pretrained(folder).base_model_name_or_path
    model = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base, num_labels=2), folder)
    batch = AutoTokenizer.from_pretrained(folder)(["A delight.", "A dull mess."], padding=True, return_tensors="pt")
    print(json.dumps(model.eval()(**batch).logits.tolist()))


def test_peft_alone_loads_the_adapter(finished):
    """In a process where lora_ggpo cannot be imported, the adapter gives the logits it was evaluated with."""
    _, run = finished
    alone = Process(_print_logits, run.folder / "adapter")
    assert alone.wait() == 0, alone.stderr
    model, tokenizer, _, task = load_trained(run.folder)
    batch = tokenizer(["A delight.", "A dull mess."], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(torch.tensor(json.loads(alone.stdout)), logits, rtol=1e-5, atol=1e-6)
    assert task.labels == ["negative", "positive"]


def test_a_mistake_before_the_first_step_can_be_corrected(recipe_file, tmp_path):
    few = ["training.max_steps=2", f"output={tmp_path / 'out'}"]
    with pytest.raises(UserError, match="adapter matches no layer"):
        train(load_recipe(recipe_file, [*few, "adapter.target_modules=[nope]"]), QUIET)
    (run,) = train(load_recipe(recipe_file, few), QUIET)
    assert run.metrics["training"]["steps"] == 2
    with pytest.raises(UserError, match="holds a run of another recipe"):
        train(load_recipe(recipe_file, [*few, "training.learning_rate=1e-2"]), QUIET)


def test_fewer_rows_can_be_scored(finished, recipe_file):
    """The same ones, in training, after it and when it is over."""
    run = _train(recipe_file, "score_rows=7", "training.max_steps=2", "validate_every=2")
    scored = run.metrics["evaluation"]
    sizes = {name: {metric["n"] for metric in of.values()} for name, of in scored.items()}
    assert sizes["validation"] == sizes["test"] == {7}
    assert sum(n for name, of in sizes.items() if name.startswith("train") for n in of) == 7
    (validated,) = [row["validation/accuracy"] for row in run.log if "validation/accuracy" in row]
    assert validated == pytest.approx(scored["validation"]["accuracy"]["value"])
    assert evaluate_run(run.folder, reporter=QUIET) == scored

    def ids(folder):
        return {json.loads(row)["id"] for row in (folder / "predictions" / "test.jsonl").read_text().splitlines()}

    assert ids(run.folder) < ids(finished[1].folder)


@pytest.mark.parametrize(
    ("settings", "passes"), [(["validate_every=4"], 2), (["validate_every=3"], 3), (["validate_every=4", "best"], 3)]
)
def test_a_validation_of_the_last_weights_is_their_score(recipe_file, monkeypatch, settings, passes):
    """Of 8 steps. Where others are kept, or the last ones were not validated, the set is scored anew."""
    seen, own, best = [], Scorer._scores, "best" in settings

    def watched(scorer, task, rows, *progress):
        seen.append(set(rows["id"]))
        return own(scorer, task, rows, *progress)

    monkeypatch.setattr(Scorer, "_scores", watched)
    if best:
        monkeypatch.setattr(validation, "best_row", lambda recipe, log: log[0])
        settings = ["validate_every=4", "keep=best"]
    run = _train(recipe_file, "training.max_steps=8", *settings)
    ids = {json.loads(row)["id"] for row in (run.folder / "predictions" / "validation.jsonl").read_text().splitlines()}
    assert seen.count(ids) == passes
    assert run.metrics["training"].get("kept_step") == (4 if best else None)
    assert evaluate_run(run.folder, reporter=QUIET) == run.metrics["evaluation"]


def test_evaluation_of_a_finished_run(finished, reviews):
    _, run = finished
    assert evaluate_run(run.folder, reporter=QUIET) == run.metrics["evaluation"]
    other = reviews.with_name("other.jsonl")
    other.write_text("\n".join(reviews.read_text(encoding="utf-8").splitlines()[:20]), encoding="utf-8")
    scores = evaluate_run(run.folder, str(other), QUIET)
    assert list(scores) == ["other.jsonl"]
    assert scores["other.jsonl"]["accuracy"]["n"] == 20
    kept = [json.loads(file.read_text()) for file in sorted((run.folder / "evaluation").glob("sets-*.json"))]
    assert {one["on"]: one["evaluation"] for one in kept} == {None: run.metrics["evaluation"], str(other): scores}


def test_merge(finished, tmp_path):
    _, run = finished
    difference, largest, quantised = merge_run(run.folder.parent, tmp_path / "merged")
    assert difference < 1e-5
    assert largest > 0.01
    assert quantised is None
    assert {path.name for path in (tmp_path / "merged").iterdir()} >= {"model.safetensors", "tokenizer.json"}
    with pytest.raises(UserError, match="exists already"):
        merge_run(run.folder, tmp_path / "merged")


def test_an_adapter_that_is_no_safetensors_is_refused(finished, recipe_file):
    run = _train(recipe_file, "training.max_steps=1", "ggpo=null")
    (run.folder / "adapter" / "adapter_model.safetensors").rename(run.folder / "adapter" / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model.safetensors is missing; .* other weight formats are not read"):
        load_trained(run.folder)


def test_folders_that_are_no_runs(tmp_path):
    with pytest.raises(UserError, match="There is no run in"):
        find_runs(tmp_path)
    (tmp_path / "seed-7").mkdir()
    (tmp_path / "seed-7" / ".lock").touch()
    with pytest.raises(UserError, match="There is no run in"):
        find_runs(tmp_path)
    demo = tmp_path / "demo"
    methods, report = [demo / "runs" / name for name in ("ggpo", "lora")], demo / "report.html"
    for method in methods:
        (method / "seed-0").mkdir(parents=True)
    report.touch()
    with pytest.raises(UserError, match=f"whose report is {report}; give the runs of one, such as {methods[0]}"):
        find_runs(demo)


def test_a_recipe_is_no_run(finished, tmp_path):
    recipe_file, run = finished
    with pytest.raises(UserError, match=r"recipe\.yaml is a recipe, not a run; give the folder"):
        find_runs(recipe_file.parent)
    shutil.copy(recipe_file, tmp_path)
    (tmp_path / "seed-0").symlink_to(run.folder)
    assert [one.metrics for one in find_runs(tmp_path)] == [run.metrics]  # beside its runs it is in nobody's way


def test_seeds_are_of_one_recipe(finished, tmp_path):
    """A seed may also be a folder that a run was killed in before it wrote a file."""
    resolved = yaml.safe_load((finished[1].folder / "recipe.yaml").read_text())
    for seed, rate in ((0, 5e-3), (2, 5e-3), (10, 1e-3)):
        folder = tmp_path / f"seed-{seed}"
        folder.mkdir()
        changed = {"seeds": [seed], "ggpo": resolved["ggpo"] | {"seed": seed}, "output": str(tmp_path)}
        changed["training"] = resolved["training"] | {"learning_rate": rate}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(resolved | changed))
    with pytest.raises(UserError, match=r"learning_rate is 0\.005 in seed-0 and 0\.001 in seed-10; choose one of them"):
        find_runs(tmp_path)
    (tmp_path / "seed-10" / "recipe.yaml").unlink()
    assert [run.folder.name for run in find_runs(tmp_path)] == ["seed-0", "seed-2"]


def test_a_bad_adapter_value_is_found_in_the_recipe(recipe_file):
    recipe_file.write_text(recipe_file.read_text().replace("r: 4", "r: 0"))
    with pytest.raises(UserError, match=r"recipe.yaml, line \d+: adapter.r must be at least 1, not 0"):
        _train(recipe_file)


def test_full_fine_tuning(recipe_file):
    run = _train(recipe_file, "adapter=null", "ggpo=null", "training.max_steps=2", "training.learning_rate=1e-4")
    assert (run.folder / "model" / "model.safetensors").is_file()
    assert evaluate_run(run.folder, reporter=QUIET) == run.metrics["evaluation"]


def test_a_sample_of_sorted_rows_holds_all_labels():
    rows = Dataset.from_dict({"label": [0] * 500 + [1] * 500})
    sample = fixed_sample(rows, 100)
    assert 35 < sum(sample["label"]) < 65
    assert sample["label"] == fixed_sample(rows, 100)["label"]
    assert len(fixed_sample(rows, 2000)) == 1000


def test_training_ends_at_the_loss_that_is_enough_also_when_it_resumes(recipe_file, monkeypatch):
    """The level is one that a run without it passes midway; then a power cut right behind the last checkpoint."""
    settings = ("ggpo=null", "adapter.lora_dropout=0", "validate_every=3", "data.label_noise=0")

    def output(name):
        return f"output={recipe_file.parent / name}"

    whole = _train(recipe_file, *settings, "stop_loss=1e-9", output("whole"))
    losses = {row["step"]: row["train/log_loss"] for row in whole.log if "train/log_loss" in row}
    assert list(losses) == [3, 6, 9, 12]
    level = (losses[3] + min(losses[6], losses[9])) / 2
    end = next(step for step, loss in losses.items() if loss <= level)
    assert end in (6, 9)
    stopped = _train(recipe_file, *settings, f"stop_loss={level}", output("stopped"))
    assert stopped.metrics["training"]["steps"] == end
    assert _losses(stopped) == _losses(whole)[: len(_losses(stopped))]

    def cut(*_):
        raise SystemError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr("lora_ggpo.training.run.new_folder", cut)
        with pytest.raises(SystemError):
            _train(recipe_file, *settings, f"stop_loss={level}", output("cut"))
    resumed = _train(recipe_file, *settings, f"stop_loss={level}", output("cut"))
    assert resumed.metrics["training"]["steps"] == end
    assert resumed.metrics["evaluation"] == stopped.metrics["evaluation"]


def test_a_loss_to_stop_at_needs_validations(recipe_file):
    with pytest.raises(UserError, match="stop_loss is looked at every validate_every steps"):
        _train(recipe_file, "validate_every=null", "stop_loss=0.5")
