"""Which blocks get LoRA by the size of their gradients, against autograd."""

import copy
from itertools import cycle

import torch
from peft.tuners.lora import LoraLayer

from lora_ggpo.methods.select import PROBE_BATCHES, block_gradients, select_blocks
from lora_ggpo.models.adapters import add_adapter
from lora_ggpo.models.architecture import HEADED

from .test_initialise import TEXTS, batches_of


def norms_by_autograd(model, batches):
    """Sums of ||dL/dW|| over the parameters of MiniLM's six layers and over the batches."""
    sizes = [0.0] * 6
    for batch in batches:
        for block in range(6):
            parameters = list(model.bert.encoder.layer[block].parameters())
            gradients = torch.autograd.grad(model.eval()(**batch).loss, parameters)
            sizes[block] += sum(gradient.norm().item() for gradient in gradients)
    return sizes


def test_gradients_of_blocks_are_autograds(minilm):
    model = copy.deepcopy(minilm[0]).requires_grad_(True)
    batches = list(batches_of(minilm)())
    expected = norms_by_autograd(model, batches)
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    sizes = block_gradients(model.train(), iter(batches))
    torch.testing.assert_close([sizes[block] for block in range(6)], expected)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["classifier.weight", "classifier.bias"]


def test_no_more_batches_are_taken_than_said(minilm):
    batch = next(batches_of(minilm)())
    drawn = cycle([batch])
    counted = iter(lambda: taken.append(1) or next(drawn), None)
    taken: list[int] = []
    block_gradients(copy.deepcopy(minilm[0]), counted)
    assert len(taken) == PROBE_BATCHES


def test_half_of_the_blocks_get_lora_and_those_with_the_largest_gradients(minilm):
    model, batches = copy.deepcopy(minilm[0]), batches_of(minilm)
    expected = norms_by_autograd(copy.deepcopy(model).requires_grad_(True), batches())
    largest = sorted(sorted(range(6), key=lambda block: -expected[block])[:3])
    assert select_blocks(model, iter(batches()), 0.5) == largest
    assert len(select_blocks(model, iter(batches()), 0.01)) == 1
    fields = {"r": 2, "target_modules": "all-linear", "layers_by_gradient": 0.5}
    adapted = add_adapter(model, fields, HEADED, batches=batches)
    blocks = {int(name.split("encoder.layer.")[1].split(".")[0]) for name in lora_names(adapted)}
    assert sorted(blocks) == largest
    assert sum(f"layer.{largest[0]}." in name for name in lora_names(adapted)) == 6
    assert adapted.peft_config["default"].layers_to_transform == largest
    encoded = minilm[1](TEXTS, padding=True, return_tensors="pt")
    assert adapted(**{name: encoded[name] for name in ("input_ids", "attention_mask")}).logits.isfinite().all()


def lora_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
