"""SAM against a few lines of dense reference in float64."""

import pytest
import torch
from torch.func import functional_call

from lora_ggpo.methods.ascent import SAM, adapter_parameters, base_weights

from ..perturbation.nets import adapted, batch, gradients, loss_of, net


def gradient_at(model, values, x):
    """dL/dw of every parameter in `values`, at these values."""
    leaves = {name: value.clone().requires_grad_(True) for name, value in values.items()}
    loss = loss_of(functional_call(model, leaves, (x,)))
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def closure_of(model, x):
    def closure():
        loss = loss_of(model(x))
        loss.backward()
        return loss.detach()

    return closure


@pytest.mark.parametrize("space", ["adapter", "weights"])
def test_sam_takes_the_gradient_at_the_worse_point(space):
    model, x, rho = adapted(net()), batch(0), 0.3
    values = parameters(model)
    moved = [name for name in values if ("base_layer.weight" if space == "weights" else "lora_") in name]
    at_w = gradient_at(model, values, x)
    norm = torch.stack([at_w[name].square().sum() for name in moved]).sum().sqrt()
    worse = {name: value + (rho / norm * at_w[name] if name in moved else 0) for name, value in values.items()}
    expected = gradient_at(model, worse, x)

    loss = SAM(model, rho, space).backward(closure_of(model, x))

    assert loss == loss_of(model(x))
    found = gradients(model)
    assert found.keys() == {name for name in values if "lora_" in name}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12, msg=name)
        assert not torch.allclose(gradient, at_w[name], rtol=1e-3)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, values[name]), name
        assert parameter.requires_grad == ("lora_" in name), name


def test_sam_accumulates_over_micro_batches():
    parts = []
    for i in (0, 1):
        model = adapted(net())
        SAM(model, 0.3).backward(closure_of(model, batch(i)))
        parts.append(gradients(model))
    model = adapted(net())
    sam = SAM(model, 0.3)
    for i in (0, 1):
        sam.backward(closure_of(model, batch(i)))
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, parts[0][name] + parts[1][name])


def test_sam_moves_all_parameters_of_a_model_without_adapter():
    model = net().double()
    assert {id(p) for p in adapter_parameters(model)} == {id(p) for p in model.parameters()}
    with pytest.raises(ValueError, match="nothing to move"):
        SAM(model, space="weights")


def test_weights_are_put_back_when_the_second_pass_fails():
    model, calls = adapted(net()), []
    values, closure = parameters(model), closure_of(model, batch(0))

    def failing():
        calls.append(0)
        if len(calls) == 2:
            raise RuntimeError
        return closure()

    with pytest.raises(RuntimeError):
        SAM(model, 0.3).backward(failing)
    assert all(torch.equal(p, values[name]) for name, p in model.named_parameters())


def test_a_tied_base_weight_is_moved_once():
    model = adapted(net())
    first, second = [module for module in model.modules() if hasattr(module, "lora_A")][:2]
    second.base_layer.weight = first.base_layer.weight
    assert len(base_weights(model)) == 3
