"""Task choice: the forms of its data, its scores against the definition and lm-evaluation-harness, whole runs."""

import json
import math
import shutil

import datasets
import numpy as np
import pytest
import torch

from lora_ggpo.data import DataConfig
from lora_ggpo.errors import UserError
from lora_ggpo.models.load import load_model
from lora_ggpo.recipe.recipe import parse_recipe
from lora_ggpo.tasks.choice import ChoiceReader, choice_metrics
from lora_ggpo.training.run import train
from lora_ggpo.workspace.progress import Reporter
from tests.recipes import recipe_text, write_rows
from tests.tasks.make import task
from tests.training import runs

QUIET = Reporter(quiet=True)
OPTIONS = ["a fine film", "a mess", "so so"]


def arc(n):
    texts = [f"{option} {n}" * (1 + place % 2) for place, option in enumerate(OPTIONS[: 2 + n % 2])]
    labels = [*("ABC" if n % 4 else "123")][: len(texts)]
    choices = {"text": texts, "label": labels}
    return {"id": f"q{n}", "question": f"What is {n}?", "choices": choices, "answerKey": labels[n % len(texts)]}


ROWS = [arc(n) for n in range(40)]


# --- data ----------------------------------------------------------------------------------------------------------

FORMS = {
    "ARC": {"question": "Q", "choices": {"text": OPTIONS, "label": ["1", "2", "3"]}, "answerKey": "2"},
    "OpenBookQA": {"question_stem": "Q", "choices": {"text": OPTIONS, "label": ["A", "B", "C"]}, "answerKey": "B "},
    "CommonsenseQA": {
        "question": "Q",
        "choices": [{"label": label, "text": text} for label, text in zip("ABC", OPTIONS, strict=True)],
        "answerKey": "B",
    },
    "HellaSwag": {"ctx": "Q", "endings": OPTIONS, "label": "1", "activity_label": "Watching"},
    "MMLU": {"question": "Q", "choices": OPTIONS, "answer": 1},
    "its letter": {"question": "Q", "choices": OPTIONS, "answer": "B"},
    "its text": {"question": "Q", "choices": OPTIONS, "answer": "a mess"},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_forms_of_data(form, suffix, tmp_path):
    # Questions differ, so that splits can be made.
    question = next(iter(FORMS[form]))
    rows = [{**FORMS[form], question: f"Q{n}"} for n in range(10)]
    if suffix == "jsonl":
        source = write_rows(tmp_path / "d.jsonl", rows)
    else:
        datasets.Dataset.from_list(rows).to_parquet(source := str(tmp_path / "d.parquet"))
    row = ChoiceReader.load(DataConfig(source=str(source))).test[0]
    assert row["text"].startswith("Q")
    assert (row["choices"], row["answer"]) == (OPTIONS, 1)


def test_options_in_columns_of_their_own(tmp_path):
    rows = [{"goal": f"Q{n}", "sol1": "one", "sol2": "two", "label": n % 2} for n in range(10)]
    source = str(write_rows(tmp_path / "d.jsonl", rows))
    for settings in ({}, {"text": "goal", "choices": ["sol1", "sol2"], "label": "label"}):
        splits = ChoiceReader.load(DataConfig(source=source, **settings))
        assert {(row["text"], *row["choices"], row["answer"]) for row in splits.train} <= {
            (f"Q{n}", "one", "two", n % 2) for n in range(10)
        }


def test_a_test_set_without_answers_is_left_out(tmp_path):
    for name, answer in (("train", "1"), ("test", ""), ("validation", "0")):
        write_rows(
            tmp_path / f"{name}.jsonl", [{"ctx": f"{name} {n}", "endings": OPTIONS, "label": answer} for n in range(9)]
        )
    with pytest.warns(UserWarning, match=r"test\.jsonl has no labels and is left out"):
        splits = ChoiceReader.load(DataConfig(source=str(tmp_path)))
    assert all(text.startswith("validation") for text in splits.test["text"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "Q", "answer": 1}, r"has no column 'choices'.* Name the column with data\.choices"),
        ({"question": "Q", "choices": ["one"], "answer": 0}, "line 1: column 'choices' must hold the options"),
        ({"question": "Q", "choices": "one", "answer": 0}, "line 1: column 'choices' must hold the options"),
        ({"question": "Q", "choices": ["one", None], "answer": 0}, "line 1: column 'choices' has no value"),
        ({"question": "Q", "choices": OPTIONS, "answer": 3}, "line 1: 3 in column 'answer' names none of the options"),
        (
            {"question": "Q", "choices": OPTIONS, "answer": "D"},
            "line 1: 'D' in column 'answer' names none of the options",
        ),
        ({"question": "Q", "choices": ["2", "1", "0"], "answer": "0"}, "may be the number of one option and the text"),
        ({"question": "Q", "choices": {"text": OPTIONS, "label": ["A"]}, "answerKey": "A"}, "must hold the options"),
        ({"choices": OPTIONS, "answer": 1}, r"has no column 'question'.* Name the column with data\.text"),
    ],
)
def test_what_is_no_question(row, message, tmp_path):
    with pytest.raises(UserError, match=message):
        ChoiceReader.load(DataConfig(source=str(write_rows(tmp_path / "d.jsonl", [row] * 5))))


# --- scores --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tiny_llama):
    return load_model(tiny_llama)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    source = write_rows(tmp_path_factory.mktemp("arc") / "arc.jsonl", ROWS)
    return ChoiceReader.load(DataConfig(source=str(source), test_fraction=0.8)).test


def log_likelihood(model, tokenizer, question, option):
    """Of an option behind its prompt, token by token."""
    before = tokenizer(f"Question: {question}\nAnswer:")["input_ids"]
    ids = torch.tensor([tokenizer(f"Question: {question}\nAnswer: {option}")["input_ids"]])
    assert ids[0, : len(before)].tolist() == before
    with torch.no_grad():
        chances = torch.softmax(model(input_ids=ids).logits[0].double(), dim=-1)
    return sum(math.log(chances[place - 1, ids[0, place]]) for place in range(len(before), ids.shape[1]))


def test_scores_are_those_of_the_definition(llama, rows):
    model, tokenizer = llama
    choice = task(kind="choice", max_length=128)
    encoded = choice.encode(rows, tokenizer)
    scores = choice.score(model, encoded, tokenizer, batch_size=5)
    hits = {"accuracy": [], "accuracy_norm": []}
    for row, line in zip(rows, choice.lines(scores, encoded), strict=True):
        expected = [log_likelihood(model, tokenizer, row["text"], option) for option in row["choices"]]
        assert line["log_likelihoods"] == pytest.approx(expected, rel=1e-5)
        assert (line["id"], line["answer"]) == (row["id"], row["answer"])
        by_character = [value / len(option) for value, option in zip(expected, row["choices"], strict=True)]
        hits["accuracy"].append(np.argmax(expected) == row["answer"])
        hits["accuracy_norm"].append(np.argmax(by_character) == row["answer"])
    found = choice.measure(scores, encoded)
    assert {name: found[name].value for name in hits} == {name: np.mean(of) for name, of in hits.items()}
    assert len({*map(len, rows["choices"])}) == 2
    assert hits["accuracy"] != hits["accuracy_norm"]


def test_metrics_by_hand():
    options = np.array([[[2.0, 1], [9.0, 3], [6.0, 2]], [[4.0, 2], [3.0, 1], [0.0, 0]]])
    found = choice_metrics(options, np.array([[1.0, 9, 6], [2.0, 1, 1]]), np.array([1, 1]))
    assert found["accuracy"].value == 0.5  # likeliest: 0, 1
    assert found["accuracy_norm"].value == 0.5  # a character: -2, -1, -1 and -2, -3: 1, 0
    assert found["loss"].value == (9 + 3) / (3 + 1)


HARNESS = """\
task: ours
dataset_path: json
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{text}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


def test_accuracies_are_the_harness_own(tiny_llama, llama, rows, tmp_path):
    pytest.importorskip("lm_eval")
    import lm_eval
    from lm_eval.tasks import TaskManager

    docs = [{name: row[name] for name in ("text", "choices", "answer")} for row in rows]
    source = write_rows(tmp_path / "docs.jsonl", docs)
    (tmp_path / "ours.yaml").write_text(HARNESS + f"dataset_kwargs: {{data_files: {{test: {source}}}}}\n")
    found = lm_eval.simple_evaluate(
        "hf",
        {"pretrained": tiny_llama, "dtype": "float32", "add_bos_token": True},
        ["ours"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        device="cpu",
        log_samples=True,
    )
    choice = task(kind="choice", max_length=128)
    encoded = choice.encode(rows, llama[1])
    scores = choice.score(llama[0], encoded, llama[1])
    ours, theirs = choice.measure(scores, encoded), found["results"]["ours"]
    assert ours["accuracy"].value == pytest.approx(theirs["acc,none"])
    assert ours["accuracy_norm"].value == pytest.approx(theirs["acc_norm,none"])
    samples = sorted(found["samples"]["ours"], key=lambda sample: sample["doc_id"])
    for line, sample in zip(choice.lines(scores, encoded), samples, strict=True):
        said = [float(answer[0][0]) for answer in sample["resps"]]
        assert line["log_likelihoods"] == pytest.approx(said, rel=1e-4)


# --- training ------------------------------------------------------------------------------------------------------


TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


@pytest.mark.parametrize("chat", [False, True])
def test_the_right_option_is_learnt_as_a_completion_is(llama, rows, chat):
    tokenizer = llama[1]
    settings = {"max_length": 128, "template": "Question: {text}\nAnswer: ", "chat_template": chat}
    if chat:
        tokenizer = llama[1].__class__.from_pretrained(llama[1].name_or_path)
        tokenizer.chat_template = TEMPLATE
    choice, sft = task(kind="choice", **settings), task(kind="sft", **settings)
    learnt = choice.learnt(choice.encode(rows, tokenizer))
    pairs = [{"prompt": row["text"], "completion": row["choices"][row["answer"]]} for row in rows]
    expected = sft.encode(datasets.Dataset.from_list(pairs), tokenizer)
    assert learnt.to_list() == expected.to_list()


def test_a_question_that_does_not_fit_is_left_out(llama, rows):
    with pytest.warns(
        UserWarning, match=r"test: \d+ of 32 rows are left out: they are longer than task\.max_length = 33"
    ):
        encoded = task(kind="choice", max_length=33).encode(rows, llama[1], "test")
    assert 0 < len(encoded) < 32


@pytest.mark.parametrize("packing", [False, True])
def test_a_run_resumes_and_its_adapter_can_be_used(tiny_llama, tmp_path, packing):
    data = write_rows(tmp_path / "arc.jsonl", ROWS)
    text = recipe_text(
        tiny_llama, data, tmp_path / "runs", task={"kind": "choice", "max_length": 96, "packing": packing},
        ggpo={"sigma": 0.1, "rule": "relative", "beta": 0.5}, validate_every=2, training={"save_steps": 2},
    )  # fmt: skip
    recipe = parse_recipe(text, "r.yaml")
    run = train(recipe, QUIET)[0]
    assert set(run.metrics["evaluation"]["test"]) == {"accuracy", "accuracy_norm", "loss"}
    assert run.metrics["evaluation"]["train"]["accuracy"]["n"] == 24
    whole = shutil.copytree(run.folder, tmp_path / "whole")
    runs.unfinish(run.folder)
    shutil.rmtree(run.folder / "checkpoints" / "checkpoint-4")
    runs.assert_same(train(recipe, QUIET)[0].folder, whole)
    lines = [json.loads(line) for line in (whole / "predictions" / "test.jsonl").read_text().splitlines()]
    assert {len(line["log_likelihoods"]) for line in lines} == {2, 3}
    if not packing:
        for command in runs.USES:
            runs.works(runs.invoke(*runs.USES[command](run.folder, tmp_path / command)))
