"""What is saved says of itself what transformers 4 looks for, and is still the same to transformers 5."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lora_ggpo.models.load import load_model
from lora_ggpo.models.saving import save_model, save_tokenizer

TEXT = "A fine film,\n\n  and 12 more words."


def changed(file, values):
    content = {key: value for key, value in (json.loads(file.read_text()) | values).items() if value is not None}
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("named", "saved"),
    [
        ("PreTrainedTokenizerFast", "PreTrainedTokenizerFast"),
        ("TokenizersBackend", "PreTrainedTokenizerFast"),
        ("GPT2Tokenizer", "GPT2Tokenizer"),
        ("LlamaTokenizerFast", "LlamaTokenizerFast"),
    ],
)
def test_the_base_model_s_tokenizer_class_is_kept(tiny_llama, tmp_path, named, saved):
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    extra = {"tokenizer_class": named, "add_bos_token": False, "extra_special_tokens": ["<unk>"]}
    changed(base / "tokenizer_config.json", extra)
    tokenizer = load_model(str(base))[1]
    save_tokenizer(tokenizer, tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert (config["tokenizer_class"], config["add_bos_token"]) == (saved, False)
    assert "extra_special_tokens" not in config  # transformers 4 fails at a list there
    assert config["additional_special_tokens"] == ["<unk>"]
    shutil.copy(base / "config.json", tmp_path / "saved")  # says the kind of model, as beside a merged one
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert type(again) is type(tokenizer)
    assert again(TEXT).input_ids == tokenizer(TEXT).input_ids


def test_a_model_whose_files_name_no_tokenizer_class(smollm2, tmp_path):
    save_tokenizer(smollm2[1], tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(TEXT).input_ids == smollm2[1](TEXT).input_ids
    assert again.chat_template == smollm2[1].chat_template


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"rope_type": "linear", "factor": 2.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
)
def test_a_rotary_embedding_has_its_older_names_as_well(tmp_path, scaling):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    rope = {"rope_theta": 500_000.0, **(scaling or {"rope_type": "default"})}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes, rope_parameters=rope))
    save_model(model, tmp_path)
    saved = json.loads(Path(tmp_path / "config.json").read_text())
    assert (saved["rope_theta"], saved["rope_scaling"]) == (500_000.0, scaling)
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == model.config.rope_parameters
    changed(tmp_path / "config.json", {"rope_parameters": None})  # as transformers 4 sees it
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == model.config.rope_parameters
