"""Noise in evaluation mode, against dense weights."""

import pytest
import torch

from lora_ggpo.perturbation import GGPO, GGPOConfig
from lora_ggpo.perturbation.predict import noisy_evaluation

from .nets import adapted, batch, conv1d, net


def trained(**kwargs):
    return adapted(net(**kwargs)).eval()


@pytest.mark.parametrize("noise", ["factored", "dense"])
@pytest.mark.parametrize("kwargs", [{}, {"linear": conv1d}])
@torch.no_grad()
def test_a_draw_is_the_dense_weight_with_its_noise(noise, kwargs):
    model = trained(**kwargs)
    with noisy_evaluation(model, GGPOConfig(sigma=0.3, beta=5.0, noise=noise)) as draw:
        draw(4, 0.5)
        y = model(batch(0))
        layers = [module.forward.__self__ for module in model.modules() if "forward" in vars(module)]
        eps = {layer.name.rpartition(".")[2]: layer.noise.matrix() for layer in layers}
        tau = {layer.name.rpartition(".")[2]: layer.tau for layer in layers}
    dense = model.merge_and_unload()
    for name, noise_of in eps.items():
        weight = getattr(dense, name).weight
        w = weight.t() if kwargs else weight
        torch.testing.assert_close(tau[name], 0.15 * (w.square().sum(1) / w.shape[1]).sqrt(), rtol=1e-9, atol=0)
        w += noise_of.to(w)
    torch.testing.assert_close(y, dense(batch(0)), rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_draws_differ_repeat_and_go():
    model = trained()
    clean = model(batch(0))
    with noisy_evaluation(model, GGPOConfig(sigma=0.3)) as draw:
        found = []
        for number in (0, 1, 0):
            draw(number, 1.0)
            found.append(model(batch(0)))
        draw(0, 0.0)
        assert torch.equal(model(batch(0)), clean)
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], clean)
    assert torch.equal(model(batch(0)), clean)
    assert not any("forward" in vars(module) for module in model.modules())


@torch.no_grad()
def test_the_mean_rise_is_that_of_the_hessian():
    """Of a linear layer's squared output: E |(W + eps) x|^2 - |W x|^2 = sum_i tau_i^2 |x|^2."""
    model = trained()
    layer = model.base_model.model.inp
    x = batch(0)
    clean, rises = layer(x).square().sum(), []
    with noisy_evaluation(model, GGPOConfig(sigma=0.3)) as draw:
        for number in range(2000):
            draw(number, 1.0)
            rises.append(layer(x).square().sum() - clean)
        tau = layer.forward.__self__.tau
    rises = torch.stack(rises)
    expected = tau.square().sum() * x.square().sum()
    assert float(rises.mean()) == pytest.approx(float(expected), abs=4 * float(rises.std()) / 2000**0.5)


def test_a_model_in_training_under_ggpo_is_refused():
    model = adapted(net())
    GGPO(model)
    with pytest.raises(ValueError, match="perturbed already"), noisy_evaluation(model, GGPOConfig()):
        pass
