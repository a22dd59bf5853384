"""What is saved is taken by those who serve it: vLLM by its rules for adapters, transformers 4.57 by loading it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_ggpo.recipe.recipe import parse_recipe
from lora_ggpo.training.merge import merge_run
from lora_ggpo.training.run import train
from lora_ggpo.workspace.progress import Reporter
from tests.recipes import GUIDED, recipe_text, write_pairs

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TEXT = "A fine film and 12 more words."


# --- vLLM ------------------------------------------------------------------------------------------------------------

LLAMA = {*ALL, "embed_tokens", "lm_head"}
"""Layers of a Llama that vLLM has adapters for."""

INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
NOT_HELD = ("use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora")


def vllm_refusals(folder, max_lora_rank=16, layers=LLAMA):
    """Why vLLM 0.33.0 refuses an adapter: the rules of PEFTHelper.validate_legal (vllm/lora/peft_helper.py), of
    parse_fine_tuned_lora_name (vllm/lora/utils.py) and of LoRAModel.from_local_checkpoint (vllm/lora/lora_model.py)."""
    config = json.loads((folder / "adapter_config.json").read_text())
    found = [name for name in ("r", "lora_alpha", "target_modules") if name not in config]
    found += [name for name in NOT_HELD if config.get(name)]
    init, kept = config.get("init_lora_weights", True), config.get("modules_to_save") or []
    found += ["init_lora_weights"] if isinstance(init, str) and init.lower() not in INITS else []
    found += ["modules_to_save"] if set(kept) - {"classifier", "score"} else []
    found += ["bias"] if config.get("bias", "none") != "none" else []
    found += ["rank"] if max([config["r"], *(config.get("rank_pattern") or {}).values()]) > max_lora_rank else []
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        names = [name for name in file.keys() if not re.search(r"\.(embed_tokens|lm_head)\.base_layer\.weight$", name)]  # noqa: SIM118
    for name in names:
        layer = re.fullmatch(r"base_model\.model\.(.+?)\.(?:lora_[AB]\.weight|lora_embedding_[AB])", name)
        head = re.search(r"\.(score|classifier)\.(weight|bias)$", name)
        if not head and (not layer or layer[1].rpartition(".")[2] not in layers):
            found.append(name)
    return found


@pytest.fixture(scope="module")
def trained(tiny_llama, tmp_path_factory):
    """Trains two steps with adapter settings; returns the run's folder."""
    rows = write_pairs(tmp_path_factory.mktemp("rows") / "rows.jsonl")

    def run(**adapter):
        output = tmp_path_factory.mktemp("run")
        settings = {"r": 2, "target_modules": ALL, **adapter}
        short = {"ggpo": GUIDED, "training": {"max_steps": 2}, "score_rows": 2}
        text = recipe_text(tiny_llama, rows, output, adapter=settings, **short)
        return train(parse_recipe(text, "test"), Reporter(quiet=True))[0].folder

    return run


@pytest.fixture(scope="module")
def plain(trained):
    return trained()


def test_vllm_takes_a_plain_adapter_up_to_its_rank(plain):
    assert vllm_refusals(plain / "adapter") == []
    assert vllm_refusals(plain / "adapter", max_lora_rank=1) == ["rank"]
    assert len(vllm_refusals(plain / "adapter", layers=LLAMA - {"o_proj"})) == 4  # A and B of two layers


def test_vllm_takes_what_moves_the_base_weights_with_twice_the_rank(trained):
    """PiSSA's own form is one that vLLM refuses: the weights it was trained on are not those of the base model."""
    adapter = trained(init_lora_weights="pissa") / "adapter"
    assert vllm_refusals(adapter, max_lora_rank=4) == []
    assert vllm_refusals(adapter, max_lora_rank=3) == ["rank"]
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa"}))
    assert vllm_refusals(adapter, max_lora_rank=4) == ["init_lora_weights"]


def test_vllm_refuses_dora(trained):
    found = vllm_refusals(trained(use_dora=True) / "adapter")
    assert found[0] == "use_dora"
    assert all(name.endswith("lora_magnitude_vector") for name in found[1:])


# --- transformers 4.57 ------------------------------------------------------------------------------------------------

OLDEST = Path(sys.prefix) / "oldest"  # as the Makefile installs it
LOAD = """
import sys
import torch, transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base, adapter, merged, text, out = sys.argv[1:]
found = {"version": transformers.__version__}
for name, folder in {"adapter": adapter, "merged": merged}.items():
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(base if name == "adapter" else merged)
    model = PeftModel.from_pretrained(model, adapter) if name == "adapter" else model
    batch = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        found[name] = batch["input_ids"], model.eval()(**batch).logits
torch.save(found, out)
"""


@pytest.mark.skipif(not OLDEST.is_dir(), reason="needs the oldest releases that `make oldest` installs")
def test_adapter_and_merged_folder_load_in_transformers_4_57(plain, tiny_llama, tmp_path):
    merge_run(plain, tmp_path / "merged")
    arguments = [tiny_llama, plain / "adapter", tmp_path / "merged", TEXT, tmp_path / "found.pt"]
    environment = {**os.environ, "PYTHONPATH": str(OLDEST)}
    subprocess.run([sys.executable, "-c", LOAD, *map(str, arguments)], check=True, env=environment)
    found = torch.load(tmp_path / "found.pt")
    assert found["version"].startswith("4.57")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), plain / "adapter")
    batch = tokenizer(TEXT, return_tensors="pt")
    with torch.no_grad():
        logits = model.eval()(**batch).logits
        with model.disable_adapter():
            assert (model(**batch).logits - logits).abs().max() > 1e-4  # or nothing would be compared
    for ids, then in (found["adapter"], found["merged"]):
        assert torch.equal(ids, batch["input_ids"])
        torch.testing.assert_close(then, logits, rtol=1e-4, atol=1e-5)
