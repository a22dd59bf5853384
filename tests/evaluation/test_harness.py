"""Tasks of lm-evaluation-harness against the harness alone, on a task of our own: no network."""

import importlib.util
import json

import pytest

from lora_ggpo.errors import UserError
from lora_ggpo.evaluation.suite_run import Options
from lora_ggpo.evaluation.suites import evaluate_suite
from lora_ggpo.evaluation.target import load_target
from lora_ggpo.workspace.progress import Reporter

QUIET = Reporter(quiet=True)
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
"""
CHOICE = """\
output_type: multiple_choice
doc_to_text: "{{text}} It was"
doc_to_target: label
doc_to_choice: [bad, good]
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
WRITE = """\
output_type: generate_until
doc_to_text: "{{text}} It was"
doc_to_target: "{{label}}"
generation_kwargs: {max_gen_toks: 4, until: ["."]}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture
def tasks(tmp_path):
    """A folder with the tasks ours-choice and ours-write on 12 rows."""
    pytest.importorskip("lm_eval")
    data = tmp_path / "data.jsonl"
    texts = ["A fine film.", "A mess.", "I laughed.", "Dull.", "Superb.", "Too long."] * 2
    data.write_text("".join(json.dumps({"text": f"{text} {n}", "label": n % 2}) + "\n" for n, text in enumerate(texts)))
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, kind in (("ours-choice", CHOICE), ("ours-write", WRITE)):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data) + kind)
    return str(folder)


def run(target, tasks, names, output, **options):
    options = Options(data=tasks, output=str(output), batch_size=4, **options)
    return evaluate_suite(str(target), f"harness:{names}", options, QUIET)[0]


def alone(folder, tasks, name, **options):
    """What the harness says when it loads the model itself."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    arguments = {"pretrained": folder, "dtype": "float32"}
    manager = TaskManager(include_path=tasks, include_defaults=False)
    return lm_eval.simple_evaluate("hf", arguments, [name], task_manager=manager, device="cpu", **options)["results"][
        name
    ]


def test_scores_are_the_harness_own(tiny_llama, tasks, tmp_path):
    scores = run(tiny_llama, tasks, "ours-choice,ours-write", tmp_path / "out")
    expected = alone(tiny_llama, tasks, "ours-choice")
    for metric in ("acc", "acc_norm"):
        assert scores["ours-choice"][metric] == {
            "value": pytest.approx(expected[f"{metric},none"]),
            "se": pytest.approx(expected[f"{metric}_stderr,none"]),
            "n": 12,
        }
    assert 0 < scores["ours-choice"]["acc"]["value"] < 1
    assert scores["ours-write"]["exact_match"]["n"] == 12
    assert json.loads((tmp_path / "out" / "harness-ours-choice-ours-write" / "scores.json").read_text())["versions"][
        "lm-eval"
    ]


def test_chats_and_runs_and_a_part_of_the_rows(chat_runs, chat_llama, tasks, tmp_path, monkeypatch):
    scores = run(chat_runs / "seed-0", tasks, "ours-choice", tmp_path / "a", limit=5)
    assert scores["ours-choice"]["acc"]["n"] == 5
    base = run(chat_llama, tasks, "ours-choice", tmp_path / "b")
    expected = alone(chat_llama, tasks, "ours-choice", apply_chat_template=True)
    assert base["ours-choice"]["acc"]["value"] == pytest.approx(expected["acc,none"])
    assert load_target(chat_llama).chat
    monkeypatch.setattr("lora_ggpo.evaluation.harness.run_harness", lambda *_: pytest.fail("measured again"))
    assert run(chat_llama, tasks, "ours-choice", tmp_path / "b") == base


def test_tasks_that_are_not_there(tiny_llama, tasks, tmp_path):
    with pytest.raises(UserError, match=r"lm-evaluation-harness cannot run ours-chioce: .*ours-chioce"):
        run(tiny_llama, tasks, "ours-chioce", tmp_path / "out")
    with pytest.raises(UserError, match="--data nowhere is no folder; give a folder with the harness's task files"):
        run(tiny_llama, "nowhere", "ours-choice", tmp_path / "out2")


def test_without_the_harness(tiny_llama, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else find(name, *rest)
    )
    with pytest.raises(
        UserError, match=r"needs lm-evaluation-harness; install it with: pip install 'lora-ggpo\[harness\]'"
    ):
        run(tiny_llama, None, "arc_easy", tmp_path / "out")
