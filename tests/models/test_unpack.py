"""What is kept of a GGUF file, against the libraries' own reading of it; the file is tiny, and packed in 4 bits."""

import os

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lora_ggpo.errors import UserError
from lora_ggpo.models import unpack
from lora_ggpo.models.load import load_model
from lora_ggpo.models.unpack import unpacked

WIDTH, INNER, TEXT = 64, 96, "A film, at last!"


def write_gguf(path, seed=0):
    """A Llama of one layer with random weights, whose tokens are bytes."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // 2)
    tokens = [*bytes_to_unicode().values(), "fi", "<|end|>"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["f i"])
    writer.add_eos_token_id(len(tokens) - 1)
    shapes = {"attn_q": (WIDTH, WIDTH), "attn_k": (WIDTH // 2, WIDTH), "attn_v": (WIDTH // 2, WIDTH)}
    shapes |= {"attn_output": (WIDTH, WIDTH), "ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH)}
    shapes |= {"ffn_down": (WIDTH, INNER)}
    shapes = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()} | {"token_embd.weight": (258, WIDTH)}
    rng = np.random.default_rng(seed)
    for name, shape in shapes.items():
        packed = gguf.quantize(rng.standard_normal(shape, dtype=np.float32), gguf.GGMLQuantizationType.Q4_1)
        writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    for name in ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight"):
        writer.add_tensor(name, rng.random(WIDTH, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_gguf(tmp_path / "tiny.gguf")


def own_reading(file):
    options = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(
        **options, dtype="float32", quantization_config=GgufConfig(dequantize=True)
    )
    return model, AutoTokenizer.from_pretrained(**options)


def weights(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def test_it_is_what_the_libraries_read(file):
    model, tokenizer = load_model(str(file))
    own, own_tokenizer = own_reading(file)
    torch.testing.assert_close(weights(model), weights(own), rtol=0, atol=0)
    ids = tokenizer(TEXT).input_ids
    assert ids == own_tokenizer(TEXT).input_ids
    assert tokenizer.decode(ids) == TEXT
    assert model.config.rope_parameters == own.config.rope_parameters


def test_a_file_is_unpacked_once_and_again_when_it_changes(file, monkeypatch):
    taken, made = [], unpack._unpack
    monkeypatch.setattr(unpack, "_unpack", lambda *args: taken.append(args) or made(*args))
    first = weights(load_model(str(file))[0])
    torch.testing.assert_close(weights(load_model(str(file))[0]), first, rtol=0, atol=0)
    assert len(taken) == 1
    write_gguf(file, seed=1)
    os.utime(file, ns=(1, 1))
    second = weights(load_model(str(file))[0])
    assert len(taken) == 2
    assert not torch.equal(first["model.embed_tokens.weight"], second["model.embed_tokens.weight"])
    assert [folder.name for folder in unpacked(file).parent.iterdir()] == [unpacked(file).name]


def test_what_another_process_made_meanwhile_stays(file, monkeypatch):
    made = unpack._unpack

    def twice(*args):
        monkeypatch.setattr(unpack, "_unpack", made)
        (unpacked(file) / "theirs").touch()
        made(*args)

    monkeypatch.setattr(unpack, "_unpack", twice)
    assert (unpacked(file) / "theirs").is_file()


def test_a_cache_that_cannot_be_written_is_told(file, tmp_path, monkeypatch):
    (tmp_path / "taken").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "taken"))
    with pytest.raises(UserError, match="taken"):
        load_model(str(file))


def test_a_damaged_file_is_told_and_leaves_nothing(file):
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(str(file))
    assert not list((file.parent / "cache").rglob("*.safetensors"))
