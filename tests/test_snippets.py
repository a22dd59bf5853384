"""What the documents tell people to type runs as it stands, and does not make the library warn."""

import ast
import builtins
import re
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

import lora_ggpo
from lora_ggpo.perturbation import GGPO, GGPOConfig
from lora_ggpo.recipe.recipe import parse_recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def ggpo_settings(text):
    """The settings of GGPO in Python and YAML snippets."""
    for arguments in re.findall(r"GGPOConfig\(([^()]+)\)", text):
        yield eval(f"GGPOConfig({arguments})", {"GGPOConfig": GGPOConfig})
    for block in re.findall(r"^```yaml\n(model:.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield parse_recipe(block, "docs").ggpo_config(0)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_snippets_choose_a_rule_whose_guidance_counts(page):
    """With the paper's rule and beta the gradient term is negligible, and the library says so after 20 steps."""
    for config in ggpo_settings(page.read_text(encoding="utf-8")):
        assert config.rule != "paper" or config.beta == 0, config


def test_snippets_are_found():
    found = {page.stem: len(list(ggpo_settings(page.read_text(encoding="utf-8")))) for page in PAGES}
    assert found["recipes"] == 2
    assert found["integration"] >= 4


# --- Python, carried out --------------------------------------------------------------------------------------------

BLOCKS = {
    f"{page.stem}-{index}": block
    for page in PAGES
    for index, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.M | re.S))
}
QUICK = {"max_steps": 2, "report_to": "none", "use_cpu": True, "logging_steps": 1, "save_strategy": "no"}


def encoder(folder):
    """What the blocks about a Trainer or a loop of one's own leave to the reader."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")).train()
    tokens = AutoTokenizer.from_pretrained(folder)(
        ["a fine film", "a dull mess"] * 4, return_tensors="pt", padding=True
    )
    rows = [{**{key: value[i] for key, value in tokens.items()}, "labels": i % 2} for i in range(8)]
    loader = torch.utils.data.DataLoader(rows, batch_size=4)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return {
        "model": model,
        "peft_model": model,
        "data": rows,
        "loader": loader,
        "batch": next(iter(loader)),
        "optimizer": torch.optim.AdamW(trained, lr=1e-3),
        "Trainer": Trainer,
        "args": TrainingArguments("checkpoints", **QUICK),
        "accelerator": Accelerator(cpu=True, gradient_accumulation_steps=2),  # the arguments reset what it shares
        "torch": torch,
        "GGPO": GGPO,
        "GGPOConfig": GGPOConfig,
        "lora_ggpo": lora_ggpo,
    }


def causal(folder):
    """The same for blocks about TRL."""
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(folder)
    config = partial(SFTConfig, bf16=False, max_length=16, **QUICK)
    rows = Dataset.from_list([{"prompt": "a fine film is", "completion": " good"}] * 8)
    return {
        "model": model,
        "data": rows,
        "rows": rows,
        "SFTConfig": config,
        "SFTTrainer": partial(SFTTrainer, processing_class=AutoTokenizer.from_pretrained(folder, pad_token="<unk>")),
        "LoraConfig": LoraConfig,
        "args": config(),
        "lora": LoraConfig(r=2),
    }


def missing(block, given):
    """Names that a block takes for granted and that are not given, and modules that are not installed."""
    nodes = list(ast.walk(ast.parse(block)))
    stored = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    stored |= {alias.asname or alias.name.partition(".")[0] for node in imports for alias in node.names}
    stored |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    stored |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    loaded = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    modules = {node.module for node in imports if isinstance(node, ast.ImportFrom) and node.module}
    modules |= {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    absent = {name for name in modules if not find_spec(name.partition(".")[0])}
    return (loaded - stored - set(dir(builtins)) - set(given)) | absent


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_of_python_runs_and_its_noise_reaches_all_layers(name, tiny_bert, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    block = BLOCKS[name]
    if "SFT" in block and not find_spec("trl"):
        pytest.skip("needs trl")
    given = causal(tiny_llama) if "SFT" in block else encoder(tiny_bert)
    if absent := missing(block, given):
        pytest.skip(f"takes for granted: {', '.join(sorted(absent))}")
    space = dict(given)
    exec(compile(block, name, "exec"), space)
    if trainer := space.get("trainer"):
        if not trainer.state.global_step:
            trainer.train()
        coverage = [row["ggpo/coverage"] for row in trainer.state.log_history if "ggpo/coverage" in row]
        assert coverage == [1, 1]
    elif ggpo := space.get("ggpo"):
        assert ggpo.metrics()["ggpo/coverage"] == 1


def test_the_blocks_that_people_copy_first_are_among_those_that_run():
    names = {"README-0", "integration-0", "integration-1", "integration-2"}
    given = {"Trainer", "model", "peft_model", "args", "data", "loader", "torch", "optimizer", "accelerator"}
    assert names <= set(BLOCKS)
    assert not any(missing(BLOCKS[name], given | {"GGPO", "GGPOConfig"}) for name in names)
