"""sd-scripts' own train_network.py, with the releases that it pins, as the docs give its arguments."""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .contract import run, tags
from .surfaces import DOCS

ROW = "| sd-scripts, its `train_network.py` | sd-scripts 48d368f | 2 | 100% | no, nor with `networks.lora` |"
OURS = ["--network_module", "lora_ggpo.integrations.kohya", "--network_args"]
NETWORKS = {
    "plain": ["--network_module", "networks.lora"],
    "still": [*OURS, "ggpo_sigma=0"],
    "noisy": [*OURS, "ggpo_sigma=0.3", "ggpo_rule=relative", "ggpo_beta=0.5"],
}
SETTINGS = {
    "pretrained_model_name_or_path": "model",
    "tokenizer_cache_dir": "tokenizers",
    "train_data_dir": "pictures",
    "resolution": 128,
    "train_batch_size": 2,
    "max_train_steps": 2,
    "learning_rate": 1e-2,
    "network_dim": 4,
    "optimizer_type": "AdamW",
    "mixed_precision": "no",
    "save_model_as": "safetensors",
    "seed": 7,
    "max_data_loader_n_workers": 0,
    "log_with": "tensorboard",
}


@pytest.mark.skipif("SD_SCRIPTS" not in os.environ, reason="SD_SCRIPTS names no copy of sd-scripts")
@pytest.mark.skipif(not find_spec("imagesize"), reason="needs what sd-scripts needs")
def test_it_trains_as_the_docs_say(tmp_path):
    (tmp_path / "stand-ins").mkdir()
    shutil.copy(Path(__file__).with_name("sd_scripts_small.py"), tmp_path / "stand-ins")
    found, printed = {}, {}
    for name, network in NETWORKS.items():
        settings = {**SETTINGS, "output_dir": name, "output_name": "saved", "logging_dir": f"{name}/log"}
        given = [part for key, value in settings.items() for part in (f"--{key}", value)]
        printed[name] = run("sd_scripts_small", *given, *network, folder=tmp_path)
        found[name] = load_file(tmp_path / name / "saved.safetensors")
    plain, still, noisy = found.values()
    assert plain.keys() == still.keys() == noisy.keys()
    assert all(torch.equal(still[name], plain[name]) for name in plain)
    trained = [name for name in plain if not name.endswith("alpha")]
    assert not any(torch.equal(noisy[name], plain[name]) for name in trained)
    assert "GGPO: the noise reached 100%, 100% of" in " ".join(printed["noisy"].split())
    assert {"norm/avg_grad_norm", "norm/avg_combined_norm"} <= tags(tmp_path / "noisy")
    assert any(row.startswith(ROW) for row in (DOCS / "images.md").read_text(encoding="utf-8").splitlines())
