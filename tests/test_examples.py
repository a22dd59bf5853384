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


@pytest.fixture(scope="module")
def rows(reviews, tmp_path_factory):
    """Files of the bundled reviews in the two shapes that the examples take."""
    folder = tmp_path_factory.mktemp("rows")
    given = [json.loads(line) for line in reviews.read_text().splitlines()]
    shapes = {
        "label": [{"text": row["text"], "label": int(row["label"] == "positive")} for row in given],
        "sft": [{"prompt": f"{row['text']}\nSentiment:", "completion": f" {row['label']}"} for row in given],
    }
    for name, shaped in shapes.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in shaped))
    return folder


def run_script(command):
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example(example, rows, tiny_bert, tiny_llama, tmp_path):
    sft = example.stem == "trl_sft"
    if sft and not find_spec("trl"):
        pytest.skip("needs trl")
    model = tiny_llama if sft else tiny_bert
    data = rows / ("sft.jsonl" if sft else "label.jsonl")
    command = [str(example), "--model", model, "--data", str(data), "--steps", "2", "--output", "saved"]
    ran = Process(run_script, command, folder=tmp_path)
    assert ran.wait() == 0, ran.stderr
    assert "GGPO" not in ran.stderr  # it warns of nothing
    loader = AutoModelForCausalLM if sft else AutoModelForSequenceClassification
    loaded = PeftModel.from_pretrained(loader.from_pretrained(model), tmp_path / "saved")
    trained = [name for name, value in loaded.named_parameters() if "lora_B" in name and value.any()]
    assert trained
