"""The model card of a run by the hub's own parser, and its upload to a stand-in of the hub."""

import base64
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

from tests.training.runs import invoke, refused, works

REPO = "somebody/reviews"


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a run of a classifier."""
    return shutil.copytree(finished[1].folder, tmp_path / "reviews" / "seed-0")


def test_the_hubs_parser_reads_the_card(run):
    card = ModelCard.load(run / "adapter" / "README.md")
    metrics = json.loads((run / "metrics.json").read_text())["evaluation"]
    assert card.data.library_name == "peft"
    assert card.data.pipeline_tag == "text-classification"
    assert {"lora", "ggpo", "lora-ggpo"} <= set(card.data.tags)
    results = {(one.dataset_split, one.metric_type): one.metric_value for one in card.data.eval_results}
    for name in ("validation", "test"):
        assert results[name, "accuracy"] == metrics[name]["accuracy"]["value"]
    assert not any(name.startswith("train") for name, _ in results)
    accuracy = metrics["test"]["accuracy"]
    assert f"{accuracy['value']:.4f} ± {accuracy['se']:.4f}" in card.text
    for words in ("AutoPeftModelForSequenceClassification", "learning_rate: 0.005", "torch 2", "2502.14538", "seed 0"):
        assert words in card.text


def test_a_card_tells_nothing_of_the_machine(run, tmp_path_factory):
    text = (run / "adapter" / "README.md").read_text()
    assert str(tmp_path_factory.getbasetemp()) not in text
    assert "/" not in ModelCard.load(run / "adapter" / "README.md").data.base_model


class Hub(BaseHTTPRequestHandler):
    """What an upload asks of the hub; `received` holds the files of each commit, `refusing` a status."""

    received: ClassVar[dict[str, bytes]] = {}
    made: ClassVar[list[dict]] = []
    refusing = 0

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.refusing:
            self.answer({"error": "not allowed here"}, self.refusing)
        elif self.path == "/api/repos/create":
            self.made.append(json.loads(body))
            self.answer({"url": f"{self.address}/{REPO}", "name": REPO})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif self.path == f"/api/models/{REPO}/preupload/main":
            files = json.loads(body)["files"]
            self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif self.path == f"/api/models/{REPO}/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.received[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            commit = {"commitUrl": f"{self.address}/{REPO}/commit/1", "commitOid": "1", "hookOutput": ""}
            self.answer({**commit, "success": True})
        else:
            self.answer({"error": f"unknown: {self.path}"}, 404)

    def do_GET(self):
        self.answer({"error": "not there"}, 404)

    def answer(self, content, status=200):
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    class Own(Hub):
        received, made, refusing = {}, [], 0

    server = ThreadingHTTPServer(("127.0.0.1", 0), Own)
    Own.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("lora_ggpo.training.push.HfApi", lambda: huggingface_hub.HfApi(Own.address, token="hf_x"))
    yield Own
    server.shutdown()


def test_push_uploads_the_weights_and_their_card(run, hub):
    result = works(invoke("push", run, REPO, "--private"))
    assert f"{hub.address}/{REPO}/commit/1" in result.stdout
    assert "private" in (hub.made[0].get("visibility"), *hub.made[0])  # its name differs by release
    sent = {file.name: file.read_bytes() for file in (run / "adapter").iterdir()}
    assert hub.received == sent
    assert {"README.md", "adapter_model.safetensors", "adapter_config.json"} <= set(sent)


def test_what_the_hub_refuses_is_one_sentence(run, hub):
    hub.refusing = 403
    refused(invoke("push", run, REPO), "The hub has not taken")
    refused(invoke("push", run, "a/b/c"), "'a/b/c' cannot be the name of a repository")


def test_other_weights_than_were_scored_are_not_pushed(run, hub):
    (run / "adapter" / "adapter_config.json").write_text("{}")
    refused(invoke("push", run, REPO), "adapter")
    assert not hub.received
