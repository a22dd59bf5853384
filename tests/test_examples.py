"""Every example runs as it stands, on a small model and real text, and saves what stock PEFT loads."""

import json
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.processes import Process

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
EXAMPLES = [path for path in EXAMPLES if path.stem != "diffusers_lora"]  # tests/integrations/test_diffusers.py


def _label(row):
    return {"text": row["text"], "label": int(row["label"] == "positive")}


def _completion(row):
    return {"prompt": _asked(row), "completion": f" {row['label']}"}


def _pair(row):
    other = {"positive": "negative", "negative": "positive"}[row["label"]]
    return {"prompt": _asked(row), "chosen": f" {row['label']}", "rejected": f" {other}"}


def _wanted(row):
    return {"prompt": _asked(row), "completion": " positive", "label": row["label"] == "positive"}


def _answer(row):
    return {"prompt": _asked(row), "answer": row["label"]}


def _asked(row):
    return f"{row['text'][:200]}\nSentiment:"


OF_TRL = {
    "trl_sft": (_completion, AutoModelForCausalLM, {}),
    "trl_dpo": (_pair, AutoModelForCausalLM, {}),
    "trl_kto": (_wanted, AutoModelForCausalLM, {}),
    "trl_grpo": (_answer, AutoModelForCausalLM, {}),
    "trl_reward": (_pair, AutoModelForSequenceClassification, {"num_labels": 1}),
}
"""Rows, class of the model and its arguments; the other examples classify with an encoder."""


def run_script(command):
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example(example, reviews, tiny_bert, tiny_llama, tmp_path):
    of_trl = example.stem in OF_TRL
    if of_trl and not find_spec("trl"):
        pytest.skip("needs trl")
    shape, loader, options = OF_TRL.get(example.stem, (_label, AutoModelForSequenceClassification, {}))
    model = tiny_llama if of_trl else tiny_bert
    rows = [shape(json.loads(line)) for line in reviews.read_text().splitlines()]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [str(example), "--model", model, "--data", "rows.jsonl", "--steps", "2", "--output", "saved"]
    ran = Process(run_script, command, folder=tmp_path)
    assert ran.wait() == 0, ran.stderr
    assert "GGPO" not in ran.stderr  # it warns of nothing
    loaded = PeftModel.from_pretrained(loader.from_pretrained(model, **options), tmp_path / "saved")
    trained = [name for name, value in loaded.named_parameters() if "lora_B" in name and value.any()]
    assert trained
