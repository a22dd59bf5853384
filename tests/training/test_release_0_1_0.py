"""A run folder that release 0.1.0 made is still evaluated, resumed and merged, to the numbers that release gave.

run-0.1.0.tar.xz was made by commit 2ec88db: `lora-ggpo train recipe.yaml`, then of seed 1 all that follows step 5
deleted, as a kill leaves it. expected.json holds the scores of both seeds, the losses of seed 1 and the logits of the
merged model of seed 0, all as that commit computed them.
"""

import json
import tarfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from lora_ggpo.cli import app

ARCHIVE = Path(__file__).parents[1] / "fixtures" / "run-0.1.0.tar.xz"


@pytest.fixture
def expected(tmp_path, monkeypatch):
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return json.loads(Path("expected.json").read_text())


def lora_ggpo(*arguments):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result


def check_scores(scores, wanted, bound=2e-5):
    assert scores.keys() == wanted.keys()
    for name, metrics in wanted.items():
        for metric, of_metric in metrics.items():
            assert scores[name][metric]["value"] == pytest.approx(of_metric["value"], abs=bound), (name, metric)
            assert scores[name][metric]["n"] == of_metric["n"]


def test_evaluate(expected):
    lora_ggpo("eval", "old/seed-0")
    kept = json.loads(Path("old/seed-0/evaluation/sets-own.json").read_text())
    check_scores(kept["evaluation"], expected["seed-0"])


def test_resume(expected):
    lora_ggpo("train", "recipe.yaml")
    log = [json.loads(line) for line in Path("old/seed-1/log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in log]
    assert losses[:4] == pytest.approx(expected["losses"][:4], rel=1e-4)
    # That release drew its noise from a table, which is gone: from here on another draw of the same size.
    assert losses[4:] == pytest.approx(expected["losses"][4:], rel=2e-2)
    scores = json.loads(Path("old/seed-1/metrics.json").read_text())["evaluation"]
    check_scores(scores, expected["seed-1"], bound=5e-2)
    assert json.loads(Path("old/seed-1/training.json").read_text())["steps"] == 6


def test_merge(expected):
    lora_ggpo("merge", "old/seed-0", "merged")
    model = AutoModelForSequenceClassification.from_pretrained("merged").eval()
    tokenizer = AutoTokenizer.from_pretrained("merged")
    texts = [json.loads(line)["text"] for line in Path("reviews.jsonl").read_text().splitlines()[:4]]
    with torch.no_grad():
        logits = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    torch.testing.assert_close(logits, torch.tensor(expected["merged_logits"]), rtol=0, atol=1e-5)
