"""What peft takes without a word, or with a traceback, of settings that only the model can tell are wrong."""

import copy
import warnings

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lora_ggpo.errors import UserError
from lora_ggpo.models.adapters import add_adapter
from lora_ggpo.models.architecture import CAUSAL


@pytest.fixture
def llama():
    """Two layers; weights of 32 x 32 (o_proj, q_proj), 16 x 32 (k_proj, v_proj), and 64 x 32 around them."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, num_key_value_heads=2, pad_token_id=0, **sizes))


def batches():
    ids = torch.randint(0, 50, (4, 12), generator=torch.Generator().manual_seed(0))
    yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@pytest.mark.parametrize(("init", "largest"), [("pissa", 16), ("pissa_niter_4", 16), ("olora", 16), ("lora_ga", 8)])
def test_starting_values_have_no_more_ranks_than_the_weight_has_directions(llama, init, largest):
    fields = {"init_lora_weights": init, "target_modules": ["q_proj", "k_proj"]}
    with pytest.raises(
        UserError, match=rf"r is {largest + 1}, .*(k_proj {largest} at most|two .* for each rank).*; lower it"
    ):
        add_adapter(copy.deepcopy(llama), fields | {"r": largest + 1}, CAUSAL, batches=batches)
    add_adapter(copy.deepcopy(llama), fields | {"r": largest}, CAUSAL, batches=batches)
    patterned = fields | {"r": largest + 1, "rank_pattern": {"k_proj": largest}}
    adapted = add_adapter(llama, patterned, CAUSAL, batches=batches)
    ranks = {name: p.shape for name, p in adapted.named_parameters() if "lora_A" in name}
    assert {shape[0] for shape in ranks.values()} == {largest, largest + 1}


@pytest.mark.parametrize("init", ["pissa", "lora_ga"])
def test_the_usual_layers_are_adapted_where_none_are_named(llama, init):
    adapted = add_adapter(llama, {"r": 4, "init_lora_weights": init}, CAUSAL, batches=batches)
    layers = {name.split(".")[-4] for name, _ in adapted.named_parameters() if "lora_A" in name}
    assert layers == {"q_proj", "v_proj"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_replication": [[0, 9]]}, "adapter is rejected by torch: index 2 is out of range"),
        ({"layer_replication": [[1, 1]]}, "adapter matches no layer"),
        ({"trainable_token_indices": [3, 50]}, "adapter is rejected by .*: index 50 is out of bounds .* size 50"),
        ({"trainable_token_indices": {"nope": [1]}}, "adapter matches no layer: Target modules {'nope'} not found"),
        (
            {"target_modules": "all-linear", "layers_to_transform": [0]},
            "adapter.layers_to_transform is rejected by peft",
        ),
        ({"layers_to_transform": [9]}, "adapter matches no layer: Target modules .*layers_to_transform"),
        ({"exclude_modules": ["q_proj", "v_proj"]}, "adapter matches no layer: .*exclude_modules"),
        ({"megatron_config": {"x": 1}}, "adapter is rejected by peft: No module named 'megatron'"),
        ({"init_lora_weights": "loftq", "loftq_config": {"x": 9}}, "adapter.loftq_config|adapter is rejected by peft"),
        (
            {"init_lora_weights": "orthogonal", "r": 3},
            "adapter is rejected by peft: Orthogonal initialization requires",
        ),
    ],
)
def test_what_the_model_has_not_is_one_sentence(llama, fields, message):
    with pytest.raises(UserError, match=message) as caught:
        add_adapter(llama, {"r": 4, "target_modules": ["q_proj", "v_proj"]} | fields, CAUSAL, batches=batches)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "warning"),
    [
        ({"target_modules": ["q_proj", "qproj"]}, "adapter.target_modules has 'qproj', which matches no layer"),
        ({"exclude_modules": ["nope"]}, "adapter.exclude_modules has 'nope', which matches no layer"),
        ({"modules_to_save": ["nope"]}, "adapter.modules_to_save has 'nope', which matches no layer"),
        (
            {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["q_proj"]},
            "adapter.target_modules has 'q_proj', which",
        ),
        ({"layers_to_transform": [0, 9]}, "adapter.layers_to_transform has 9, which matches no layer"),
        ({"alora_invocation_tokens": [5]}, "This adapter can be trained and used, but not merged: aLoRA"),
    ],
)
def test_what_has_no_effect_or_no_merge_is_said_before_training(llama, fields, warning):
    with pytest.warns(UserWarning, match=warning):
        add_adapter(llama, {"r": 4, "target_modules": ["q_proj"]} | fields, CAUSAL)


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"type": "adalora"}, {"lora_dropout": 0.1, "r": 2}])
def test_nothing_is_said_of_what_can_be_merged_and_no_weight_moves(llama, fields):
    before = llama.model.layers[0].self_attn.q_proj.weight.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message="Note that `r` is not used in AdaLora")
        adapted = add_adapter(llama, {"r": 4, "target_modules": ["q_proj"]} | fields, CAUSAL, total_steps=10)
    assert torch.equal(adapted.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight, before)
