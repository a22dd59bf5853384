"""The recipes of recipes/paper on rows in the format of their data and small models of their architecture."""

import json
import warnings
from pathlib import Path

import pytest
import torch

from lora_ggpo.models.adapters import add_adapter
from lora_ggpo.recipe.recipe import load_recipe
from lora_ggpo.tasks import NO_LOSS
from lora_ggpo.training.build import training_arguments
from lora_ggpo.training.run import train
from lora_ggpo.workspace.progress import Reporter
from tests.data import glue

FOLDER = Path(__file__).parent.parent / "recipes" / "paper"
T5 = sorted(path.stem.removeprefix("t5-") for path in FOLDER.glob("t5-*.yaml"))
# What each label of GLUE is called in the answer, and the columns in the order in which the prompt has them.
ANSWERS = {subset: names for subset, (_, names) in glue.TASKS.items()} | {"mrpc": ["different", "equivalent"]}

# The prompts of LoRA-GA's reproduce/data.py, whose line breaks are spaces to T5's tokenizer.
PROMPTS = {
    "sst2": "classify the sentiment of the text: {0} result:",
    "cola": "classify the grammaticality of the text: {0} result:",
    "mrpc": "classify the semantic similarity of the text: {0} {1} result:",
    "mnli": "classify the semantic similarity of the text: {0} {1} result:",
    "qnli": "classify the semantic similarity of the question and the sentence: {0} {1} result:",
}

QUESTION, ANSWER = "Add one to {n}, please.", "That makes one more than {n}."
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{question}\n\n### Response:\n"
)
# recipe -> columns of its data, the prompt around the question, what stands before the answer
LLAMA = {
    "llama2-metamath": (("query", "response"), "Q: {question}\nA:", " "),
    "llama2-code-feedback": (("query", "answer"), ALPACA, ""),
    "llama2-wizardlm": (("instruction", "output"), ALPACA, ""),
}


def prepared(recipe):
    """(model with adapter, tokenizer, task, splits) of a recipe, as a run makes them."""
    splits = recipe.task.type.load(recipe.data)
    task = recipe.task.for_labels(splits.labels)
    model, tokenizer = task.load_model(recipe.model)
    return add_adapter(model, recipe.adapter_fields, task.architecture), tokenizer, task, splits


def loss(model, tokenizer, task, encoded):
    batch = task.collator(tokenizer)(encoded.to_list())
    with torch.no_grad():
        return model.eval()(**batch).loss


def test_there_is_a_recipe_for_each_experiment():
    assert sorted(glue.TASKS) == T5
    assert sorted(path.stem for path in FOLDER.glob("*.yaml")) == sorted([*LLAMA, *(f"t5-{name}" for name in T5)])


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_settings_are_the_published_ones(path, tmp_path):
    recipe = load_recipe(path)
    training = training_arguments(recipe, tmp_path, 0)
    t5 = path.stem.startswith("t5")
    assert training.learning_rate == (1e-4 if t5 else 2e-5)
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 32
    assert (training.num_train_epochs, training.lr_scheduler_type, training.weight_decay) == (1, "cosine", 0.0)
    assert training.get_warmup_steps(1000) == 30
    assert training.optim.startswith("adamw")
    assert recipe.task.max_length == (128 if t5 else 1024)
    assert recipe.adapter_fields == {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
    ggpo = recipe.ggpo_config(0)
    assert (ggpo.rule, ggpo.sigma, ggpo.beta) == ("paper", 0.03, 0.01)
    assert recipe.output == f"runs/{path.stem}"


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
@pytest.mark.parametrize("subset", T5)
def test_t5_reads_the_row_and_answers_with_the_label(subset, form, tiny_t5, tmp_path):
    source = glue.save(tmp_path / subset, subset, form)
    recipe = load_recipe(FOLDER / f"t5-{subset}.yaml", [f"model={tiny_t5}", f"data.source={source}"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model, tokenizer, task, splits = prepared(recipe)
    encoded = task.encode(splits.test, tokenizer)
    rows = glue.rows(subset, "validation_matched" if subset == "mnli" else "validation")
    for given, row in zip(rows, encoded, strict=True):
        texts = [given[column] for column in glue.TASKS[subset][0]]
        assert tokenizer.decode(row["input_ids"]) == f"{PROMPTS[subset].format(*texts)}</s>"
        assert tokenizer.decode(row["labels"]) == f"{ANSWERS[subset][given['label']]}</s>"
    assert torch.isfinite(loss(model, tokenizer, task, encoded))


@pytest.mark.parametrize("name", LLAMA)
def test_llama_reads_the_question_and_learns_the_answer(name, tiny_llama, tmp_path):
    columns, prompt, space = LLAMA[name]
    file = tmp_path / "rows.jsonl"
    pairs = [(QUESTION.format(n=n), ANSWER.format(n=n)) for n in range(40)]
    file.write_text("\n".join(json.dumps(dict(zip(columns, pair, strict=True))) for pair in pairs))
    recipe = load_recipe(FOLDER / f"{name}.yaml", [f"model={tiny_llama}", f"data.source={file}", "data.train_size=30"])
    model, tokenizer, task, splits = prepared(recipe)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (30, 1, 1)
    encoded = task.encode(splits.train, tokenizer)
    for given, row in zip(splits.train, encoded, strict=True):
        question, answer = pairs[int(given["id"].removeprefix("rows.jsonl:")) - 1]
        learnt = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != NO_LOSS]
        read = row["input_ids"][: len(row["input_ids"]) - len(learnt)]
        assert read[0] == tokenizer.bos_token_id
        assert tokenizer.decode(read[1:]) == prompt.format(question=question)
        assert tokenizer.convert_ids_to_tokens(learnt)[-1] == "</s>"
        whole = prompt.format(question=question) + space + answer
        assert tokenizer.decode(row["input_ids"][1:-1]) == whole
    assert torch.isfinite(loss(model, tokenizer, task, encoded))


def test_llama_learns_single_turns_of_conversations(tiny_llama, tmp_path):
    file = tmp_path / "rows.jsonl"
    turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]
    chats = [[{**turn, "value": turn["value"].format(n=n)} for turn in turns * (1 + n % 2)] for n in range(20)]
    file.write_text("\n".join(json.dumps({"conversations": chat}) for chat in chats))
    settings = [f"model={tiny_llama}", f"data.source={file}", "data.train_size=null", "data.single_turn=true"]
    with pytest.warns(UserWarning, match="10 of 20 conversations are left out"):
        _, tokenizer, task, splits = prepared(load_recipe(FOLDER / "llama2-wizardlm.yaml", settings))
    row = task.encode(splits.train, tokenizer)[0]
    assert tokenizer.decode(row["input_ids"][1:-1]) == ALPACA.format(question=QUESTION.format(n=0)) + ANSWER.format(n=0)


def test_a_t5_run_from_recipe_to_scores(tiny_t5, tmp_path):
    settings = {
        "model": tiny_t5,
        "data.source": glue.save(tmp_path / "mnli", "mnli", "parquet"),
        "training.max_steps": 3,
        "training.learning_rate": 0.01,
        "training.use_cpu": True,
        "training.logging_steps": 1,
        "training.per_device_train_batch_size": 8,
        "seeds": [0],
        "output": tmp_path / "runs",
    }
    recipe = load_recipe(FOLDER / "t5-mnli.yaml", [f"{key}={value}" for key, value in settings.items()])
    run = train(recipe, Reporter(quiet=True))[0]
    scores = run.metrics["evaluation"]
    assert {"validation", "test", "validation_mismatched"} <= set(scores)
    assert set(scores["test"]) == {"accuracy", "f1", "mcc", "log_loss", "brier", "ece"}
    assert scores["test"]["accuracy"]["n"] == glue.SIZES["validation"]
    adapter = json.loads((run.folder / "adapter" / "adapter_config.json").read_text())
    assert adapter["task_type"] == "SEQ_2_SEQ_LM"
    assert "lm_head" not in adapter["target_modules"]
    assert all(row["ggpo/gradient_share"] >= 0 for row in run.log if "loss" in row)
