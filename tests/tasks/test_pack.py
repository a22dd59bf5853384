"""Packed rows against the same examples one at a time."""

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from lora_ggpo.errors import UserError
from lora_ggpo.models.load import load_model
from lora_ggpo.tasks.pack import _best_fit, attend_apart, check_packing, flatten, pack
from tests.tasks.make import task

CONFIG = task(kind="sft", max_length=48)


@pytest.fixture(scope="module")
def llama(tiny_llama):
    return load_model(tiny_llama)


@pytest.fixture(scope="module")
def rows(llama):
    data = [{"prompt": f"the {'film ' * (n % 5)}", "completion": f"is {'good ' * (n % 7)}"} for n in range(30)]
    return CONFIG.encode(Dataset.from_list(data), llama[1])


def losses(model, batch):
    """Loss of each learnt token, in the order of their rows."""
    logits = model(**{name: values for name, values in batch.items() if name != "labels"}, use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], ignore_index=-100, reduction="none")
    return loss[batch["labels"][:, 1:] != -100]


def test_packed_examples_have_the_losses_they_have_alone(llama, rows):
    model, tokenizer = llama
    packed = pack(rows, 48)
    assert len(packed) < len(rows) / 2
    collate = task(kind="sft").collator(tokenizer)
    with torch.no_grad():
        alone = torch.cat([losses(model, collate([row])) for row in rows])
        together = losses(model, collate(packed.to_list()))
        worth = losses(model, {k: v for k, v in collate(packed.to_list()).items() if k != "position_ids"})
    torch.testing.assert_close(together.sort().values, alone.sort().values, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(worth.sort().values, alone.sort().values, rtol=1e-3)  # positions are what matters


def test_a_row_holds_whole_examples(rows):
    packed = pack(rows, 48)
    begins = [[place for place, position in enumerate(row["position_ids"]) if position == 0] for row in packed]
    found = [
        row["input_ids"][begin:end]
        for row, starts in zip(packed, begins, strict=True)
        for begin, end in zip(starts, [*starts[1:], row["length"]], strict=True)
    ]
    assert sorted(found) == sorted(rows["input_ids"])
    assert all(row["length"] == len(row["input_ids"]) == len(row["labels"]) <= 48 for row in packed)
    assert all(row["labels"][start] == -100 for row, starts in zip(packed, begins, strict=True) for start in starts)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_packs_hold_every_row_once_and_are_not_too_many(lengths):
    packs = _best_fit(lengths, 20)
    assert sorted(row for pack in packs for row in pack) == list(range(len(lengths)))
    sizes = [sum(lengths[row] for row in pack) for pack in packs]
    assert max(sizes) <= 20
    assert sum(size <= 10 for size in sizes) <= 1  # two that are half empty would have been one


def test_models_that_keep_examples_apart_and_others(llama, monkeypatch):
    check_packing(llama[0])
    bloom = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(UserError, match=r"task\.packing: this kind of model (takes no position_ids|lets packed)"):
        check_packing(bloom)
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda _: None)
    with pytest.raises(UserError, match=r"lets packed examples see one another; set task.packing: false"):
        check_packing(llama[0])


SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 400}


def mistral(**settings):
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SIZES, **settings))


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("packed", [False, True])
def test_examples_without_padding_have_the_losses_and_gradients_they_have_alone(rows, llama, window, packed):
    model, collate = mistral(sliding_window=window), task(kind="sft").collator(llama[1])
    alone = torch.cat([losses(model, collate([row])) for row in rows])
    alone.sum().backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    assert attend_apart(model)
    batch = flatten(list(pack(rows, 48) if packed else rows))
    assert batch["input_ids"].shape == (1, sum(rows["length"]))
    together = losses(model, batch)
    torch.testing.assert_close(together.sort().values, alone.sort().values, rtol=1e-5, atol=1e-6)
    together.sum().backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], wanted, rtol=1e-4, atol=1e-4)
    seen = losses(model, {name: of for name, of in batch.items() if name != "cu_seq_lens_q"})
    assert not torch.allclose(seen.sort().values, alone.sort().values, rtol=1e-3)  # the borders are what matters


def test_padded_rows_are_attended_to_as_before(rows, llama):
    model, batch = mistral(), task(kind="sft").collator(llama[1])(list(rows)[:9])
    before = losses(model, batch)
    assert attend_apart(model)
    assert attend_apart(model)
    torch.testing.assert_close(losses(model, batch), before, rtol=0, atol=0)


def test_models_that_cannot_attend_apart_are_left_as_they_were():
    bloom = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2))
    half, eager = mistral().bfloat16(), mistral(attn_implementation="eager")
    for model in (bloom, half, eager):
        before = model.config._attn_implementation
        assert not attend_apart(model)
        assert model.config._attn_implementation == before
    assert attend_apart(GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2)))
