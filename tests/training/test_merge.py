"""A merged model computes what the adapted one does, also when it is read again: in float64, to rounding."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from typer.testing import CliRunner

from lora_ggpo.cli import app
from lora_ggpo.errors import UserError
from lora_ggpo.recipe.recipe import parse_recipe
from lora_ggpo.training import merge as module
from lora_ggpo.training.merge import merge_run, merged_model
from lora_ggpo.training.run import train
from lora_ggpo.workspace.progress import Reporter
from tests.recipes import recipe_text, write_pairs

SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = torch.arange(24).view(2, 12)
ADAPTERS = {
    "output layer of a tied model": {"target_modules": ["lm_head", "q_proj"]},
    "embeddings of a tied model": {"target_modules": ["embed_tokens"]},
    "both of a tied model": {"target_modules": ["embed_tokens", "lm_head"]},
    "both tied": {"target_modules": ["embed_tokens", "lm_head", "v_proj"], "ensure_weight_tying": True},
    "replicated layers": {"target_modules": "all-linear", "layer_replication": [[0, 2], [0, 2]]},
    "replicated layers, some adapted": {"target_modules": ["q_proj"], "layer_replication": [[0, 1], [0, 2]]},
    "biases of all linear layers": {"target_modules": "all-linear", "lora_bias": True},
    "biases of the mlp": {"target_modules": ["up_proj"], "lora_bias": True},
    "biases of attention": {"target_modules": ["q_proj", "o_proj"], "lora_bias": True},
    "DoRA of the output layer": {"target_modules": ["lm_head"], "use_dora": True},
}


def adapted(model, **settings):
    """`model` in float64 with an adapter whose every number is drawn at random."""
    torch.manual_seed(1)
    model = get_peft_model(model.double().eval(), LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", **settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.3 * torch.randn_like(parameter) + parameter.data * ("magnitude" in name))
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("case", ADAPTERS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_merged_in_float64(case, tied, tmp_path):
    if case == "both tied" and not tied:
        pytest.skip("there is nothing to tie")
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied))
    model = adapted(base, **ADAPTERS[case])
    expected = logits(model)
    merged_model(model).save_pretrained(tmp_path / "merged")
    again, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float64, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    torch.testing.assert_close(logits(again.eval()), expected, rtol=1e-9, atol=1e-9)
    assert again.config.tie_word_embeddings == (tied and "tied model" not in case and "output layer" not in case)


def test_a_bias_without_a_place_is_refused():
    """Qwen2's output projection has none, whatever is set."""
    model = adapted(Qwen2ForCausalLM(Qwen2Config(**SIZES)), target_modules=["o_proj"], lora_bias=True)
    said = r"lora_bias trained a bias of model\.layers\.0\.self_attn\.o_proj, which has none in a Qwen2ForCausalLM"
    with pytest.raises(UserError, match=said):
        merged_model(model)


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    data = write_pairs(folder / "data.jsonl")
    text = recipe_text(tiny_llama, data, folder / "runs", training={"max_steps": 2, "learning_rate": 5e-2})
    return train(parse_recipe(text, "r.yaml"), Reporter(quiet=True))[0].folder


def test_what_is_checked_is_what_was_saved(run, tmp_path, monkeypatch):
    """A weight that is lost on the way to the disk is found, and nothing stays."""
    real = module.merged_model

    def spoilt(model):
        merged = real(model)
        save = merged.save_pretrained

        def lossy(folder, **options):
            merged.model.norm.weight.zero_()
            save(folder, **options)

        monkeypatch.setattr(merged, "save_pretrained", lossy)
        return merged

    monkeypatch.setattr(module, "merged_model", torch.no_grad()(spoilt))
    with (
        torch.no_grad(),
        pytest.raises(UserError, match=r"logits differ by .* nothing is saved: a plain model of this"),
    ):
        merge_run(run, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        OSError(28, "No space left on device"),
    ],
)
def test_a_full_disk_is_one_sentence_and_leaves_nothing(run, error, tmp_path, monkeypatch):
    def full(self, folder, **_):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    result = CliRunner().invoke(app, ["merge", str(run), str(tmp_path / "merged")])
    assert result.exit_code == 2
    place = tmp_path / "merged"
    assert result.stderr.splitlines()[-1] == (
        f"error: The disk of {place} is full; free some space and give the same command again."
    )
    assert list(tmp_path.iterdir()) == []


def test_a_run_with_a_tied_output_layer_is_merged(tiny_llama, run, tmp_path):
    model = LlamaForCausalLM.from_pretrained(tiny_llama)
    peft = PeftModel.from_pretrained(model, run / "adapter").eval()
    difference, largest, _ = merge_run(run, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged), logits(peft), rtol=1e-4, atol=1e-4)
    assert difference <= 1e-4 * largest
