"""The fused LoRA forward without noise, against PEFT's own."""

import pytest
import torch
from peft import LoraConfig

from lora_ggpo.perturbation.fuse import fuse_lora
from lora_ggpo.perturbation.layers import perturbed_by

from .nets import batch, clone, gradients, loss_of
from .test_layers import ADAPTERS, build

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
NEVER_FUSED = {"dora", "dora, conv1d", "dora, dropout", "dropout"}


def compare(model, own, tolerance=None):
    """Outputs and all gradients of a fused model and of PEFT's, in a forward and backward pass each."""
    for one in (model, own):
        one.zero_grad()
    x, same = (batch(0).requires_grad_() for _ in range(2))
    torch.manual_seed(0)
    y = model(x)
    torch.manual_seed(0)
    expected = own(same)
    for output in (y, expected):
        loss_of(output).backward()
    torch.testing.assert_close(y, expected, **(tolerance or CLOSE))
    torch.testing.assert_close(x.grad, same.grad, **(tolerance or CLOSE))
    torch.testing.assert_close(gradients(model), gradients(own), **(tolerance or CLOSE))


@pytest.mark.parametrize("case", ADAPTERS)
def test_same_function_as_pefts(case, monkeypatch):
    model, _ = build(case)
    own = clone(model)
    fuse_lora(model)
    fused = []
    for layer in (perturbed_by(module) for module in model.modules()):
        if layer is not None:
            monkeypatch.setattr(layer, "_fused", lambda x, f=layer._fused: fused.append(1) or f(x))
    compare(model, own)
    assert bool(fused) == (case not in NEVER_FUSED)


def test_adapters_that_become_active_later():
    model, _ = build("plain")
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=9, target_modules=["up", "head"], init_lora_weights=False))
    own = clone(model.double())
    fuse_lora(model)
    for names in ("default", "other", ["default", "other"], "default"):
        for one in (model, own):
            one.base_model.set_adapter(names)
        compare(model, own)


def test_autocast_has_the_precision_of_pefts():
    model, _ = build("plain")
    own = clone(model.float())
    fuse_lora(model)
    x = batch(0).float()
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = model(x), own(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


def test_evaluation_and_a_switched_off_adapter_are_pefts_bit_for_bit():
    model, _ = build("plain")
    own = clone(model)
    fuse_lora(model)
    with model.disable_adapter(), own.disable_adapter():
        assert torch.equal(model(batch(0)), own(batch(0)))
    model.eval(), own.eval()
    assert torch.equal(model(batch(0)), own(batch(0)))


def test_detach_leaves_nothing():
    model, _ = build("plain")
    hooks = len(model._forward_pre_hooks)
    fuse_lora(model)()
    assert not any("forward" in vars(module) for module in model.modules())
    assert len(model._forward_pre_hooks) == hooks
    fuse_lora(model)  # as a model that was never fused
