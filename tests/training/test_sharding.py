"""A model that two processes share out by recipe is trained, scored, saved and resumed as by one process alone."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed

from lora_ggpo.errors import UserError
from lora_ggpo.recipe.recipe import parse_recipe
from lora_ggpo.training.folder import read_run
from lora_ggpo.training.merge import merge_run
from lora_ggpo.training.reuse import evaluate_run
from lora_ggpo.training.run import train
from lora_ggpo.training.sharding import PROCESSES, check_draws, share_steps
from lora_ggpo.workspace.progress import Reporter
from tests.recipes import write_pairs
from tests.training.sharded import MICRO_BATCHES, WORLD, Job, cut_off, start, write_recipe

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch without distributed")

# ZeRO-3 keeps whole what is small and what will soon be used again, unless it is told not to.
KEPT = ("stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance")
AUTO = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
CUT_ALL = {"zero_optimization": {"stage": 3, **dict.fromkeys(KEPT, 0)}, **dict.fromkeys(AUTO, "auto")}
SHARDING = {"none": {}, "fsdp2": {"sharding": "fsdp2"}}
if find_spec("deepspeed"):
    SHARDING |= {name: {"sharding": name} for name in ("zero1", "zero2")}
    SHARDING["zero3"] = {"training": {"deepspeed": CUT_ALL}}
CUT = [name for name in ("fsdp2", "zero3") if name in SHARDING]
LEFT = {"again": 2, "trained": "trained", "saved": "saved"}
RESUMED = [(name, how) for name in SHARDING for how in LEFT if how == "again" or name in CUT]


OTHERS = {"full": {"adapter": None, "ggpo": None}, "plain": {"ggpo": None}}
if find_spec("bitsandbytes"):
    OTHERS |= {"nf4-ggpo": {"quantise": "nf4"}, "nf4": {"quantise": "nf4", "ggpo": None}}
THOROUGH = ("plain", "nf4")  # the same as others, without the noise


class Made:
    """Makes recipes of runs in folders of one folder."""

    def __init__(self, model, folder):
        self.model, self.folder = model, folder
        self.data = write_pairs(folder / "data.jsonl", 54)  # 32 rows to train on: four whole steps an epoch

    def __call__(self, name, micro_batches=MICRO_BATCHES, **changes):
        return write_recipe(self.model, self.data, self.folder / name, micro_batches, **changes)

    def run(self, name):
        return self.folder / name / "seed-0"


@pytest.fixture(scope="module")
def made(tiny_llama, tmp_path_factory):
    return Made(tiny_llama, tmp_path_factory.mktemp("sharded"))


@pytest.fixture(scope="module")
def alone(made):
    """The run of one process that takes all micro-batches of a step."""
    train(parse_recipe(made("alone", MICRO_BATCHES * WORLD), "r.yaml"), Reporter(quiet=True))
    return made.run("alone")


@pytest.fixture(scope="module")
def together(made, pytestconfig):
    """The runs of two processes, whole ones and those that go on from what is left of them."""
    others = [name for name in OTHERS if pytestconfig.getoption("thorough") or name not in THOROUGH]
    jobs = [Job(made(name, **changes)) for name, changes in SHARDING.items()]
    for name, how in RESUMED:
        jobs.append(Job(made(f"{name}-{how}", **SHARDING[name]), made.run(name), LEFT[how]))
    jobs += [Job(made(name, sharding="fsdp2", **OTHERS[name])) for name in others]
    for job in jobs:  # in processes of their own: torch's DDP has been seen to spoil the memory of what came after it
        start(WORLD, [job])
    return made.run


def logged(run, key):
    return [row[key] for row in read_run(run).log if key in row]


def scores(run):
    return {name: (of["loss"]["value"], of["loss"]["n"]) for name, of in read_run(run).metrics["evaluation"].items()}


def assert_close(run, other):
    """The same losses, validations, scores and adapter, within rounding."""
    for key in ("loss", "grad_norm", "validation/loss", "train/loss", "ggpo/gradient_share"):
        assert logged(run, key) == pytest.approx(logged(other, key), rel=1e-4), key
        assert logged(run, key)
    mine, theirs = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (run, other))
    assert mine.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(mine[name], weight, rtol=0, atol=1e-4, msg=name)
    mine, theirs = scores(run), scores(other)
    assert mine.keys() == theirs.keys()
    assert all(mine[name] == pytest.approx(theirs[name], rel=1e-5) for name in theirs)


@pytest.mark.parametrize("name", SHARDING)
def test_processes_that_share_a_model_are_one_process(together, alone, name):
    run = together(name)
    assert_close(run, alone)
    parts = [torch.load(run.parent / f"held-{rank}.pt")[-1] for rank in range(WORLD)]
    assert parts == [0.5 if name in CUT else 1.0] * WORLD  # what was scored was cut indeed, or was not


@pytest.mark.parametrize(("name", "how"), RESUMED)
def test_such_a_run_goes_on_and_ends_the_same(together, name, how):
    run, whole = together(f"{name}-{how}"), together(name)
    assert_close(run, whole)
    assert scores(run) == scores(whole)
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == (
        whole / "adapter" / "adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.thorough] * (name in THOROUGH)) for name in OTHERS]
)
def test_without_noise_or_adapter_or_bits_it_is_one_process_too(together, made, alone, name):
    text = made(f"{name}-alone", MICRO_BATCHES * WORLD, **OTHERS[name])
    train(parse_recipe(text, "r.yaml"), Reporter(quiet=True))
    one, two = made.run(f"{name}-alone"), together(name)
    assert logged(two, "loss") == pytest.approx(logged(one, "loss"), rel=1e-4)
    assert scores(two)["test"] == pytest.approx(scores(one)["test"], rel=1e-4)
    assert torch.load(two.parent / "held-0.pt")[-1] == 0.5
    assert abs(logged(one, "loss")[-1] - logged(alone, "loss")[-1]) > 1e-3  # the noise above matters


@pytest.mark.parametrize("name", CUT)
def test_one_process_scores_and_merges_it(together, name, tmp_path):
    run = together(name)
    again = {key: of["loss"]["value"] for key, of in evaluate_run(run, reporter=Reporter(quiet=True)).items()}
    assert again == pytest.approx({key: value for key, (value, _) in scores(run).items()}, rel=1e-6)
    assert merge_run(run, tmp_path / "merged").difference < 1e-4


# --- other processes than before -----------------------------------------------------------------------------------


def test_one_process_goes_on_from_the_checkpoint_of_two(together, made, alone):
    text = made("none-one")
    cut_off(shutil.copytree(together("none"), made.run("none-one")), 2)
    train(parse_recipe(text, "r.yaml"), Reporter(quiet=True))
    start(1, [Job(made("fsdp2-one", **SHARDING["fsdp2"]), together("fsdp2"), 2)])
    for name in ("none-one", "fsdp2-one"):
        assert_close(made.run(name), alone)
        assert read_run(made.run(name)).metrics["training"]["processes"] == 1


AGREE = "with ggpo.ranks agree and ggpo.redraw micro-batch they would draw other noise"
BY_STEP = "with ggpo.ranks differ and ggpo.redraw optimizer-step they would draw other noise"


@pytest.mark.parametrize(
    ("made_by", "now", "settings", "message"),
    [
        ((2, 2), 8, [], "a step is of 4 micro-batches, which they cannot share evenly"),
        ((2, 2), 1, ["sharding=zero2"], "DeepSpeed's checkpoints are of as many processes as made them"),
        ((2, 2), 1, ["ggpo.ranks=agree"], AGREE),
        ((2, 2), 4, ["ggpo.redraw=optimizer-step"], BY_STEP),
        ((2, 2), 1, ["adapter.lora_dropout=0.1"], "they would draw otherwise for lora_dropout"),
        ((2, 2), 1, ["training.neftune_noise_alpha=5"], "they would draw otherwise for neftune_noise_alpha"),
    ],
)
def test_other_processes_that_would_not_train_the_same_are_refused(made, tmp_path, made_by, now, settings, message):
    recipe, args, model = given(made, tmp_path, made_by, now, settings)
    with pytest.raises(UserError) as error:
        shared(args, tmp_path, recipe, model)
    start = f"{tmp_path} is of 2 processes, and {now} cannot go on from it: "
    assert str(error.value) == f"{start}{message}; start 2."


@pytest.mark.parametrize(
    ("made_by", "now", "steps", "settings"),
    [
        ((2, 2), 4, 1, []),
        ((2, 2), 1, 4, ["ggpo.ranks=agree", "ggpo.redraw=optimizer-step"]),
        ((4, 1), 4, 1, ["adapter.lora_dropout=0.1", "ggpo.ranks=agree"]),  # as many as before, whatever the recipe says
    ],
)
def test_other_processes_share_the_micro_batches_of_a_step(made, tmp_path, made_by, now, steps, settings):
    recipe, args, model = given(made, tmp_path, made_by, now, settings)
    shared(args, tmp_path, recipe, model)
    assert args.gradient_accumulation_steps == steps


def shared(args, checkpoint, recipe, model):
    share_steps(args, checkpoint, recipe)
    check_draws(args, checkpoint, recipe, model)


def given(made, checkpoint, made_by, now, settings):
    recipe = parse_recipe(made("unused"), "r.yaml", settings)
    names = ("processes", "gradient_accumulation_steps")
    (checkpoint / PROCESSES).write_text(json.dumps(dict(zip(names, made_by, strict=True))))
    args = SimpleNamespace(world_size=now, gradient_accumulation_steps=MICRO_BATCHES)
    return recipe, args, SimpleNamespace(config=SimpleNamespace(to_dict=lambda: {"attention_dropout": 0.0}))


def test_without_a_launcher_a_model_is_not_shared_out(made, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UserError, match=r"sharding fsdp2 is for the processes of a launcher.*torchrun"):
        train(parse_recipe(made("refused", sharding="fsdp2"), "r.yaml"), Reporter(quiet=True))
    assert not Path(made.folder / "refused").exists()
