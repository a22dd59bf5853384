"""MGPO and Bi-LoRA against their papers' formulas, in dense float64 matrices."""

import io
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_ggpo.errors import UserError
from lora_ggpo.methods.thin import MGPO, BiLoRA

from ..perturbation.nets import Checkpointed, adapted, batch, conv1d, gradients, loss_of, net
from .test_ascent import closure_of, gradient_at, parameters

KINDS = {"linear": nn.Linear, "Conv1D": conv1d}
SCALE = 5 / 3  # lora_alpha / r of `adapted`


def layers_of(model):
    """By name: the names of W0, A and B."""
    parts = ("base_layer", "lora_A.default", "lora_B.default")
    names = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    return {name: [f"{name}.{part}.weight" for part in parts] for name in names}


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def dense(kind, matrix):
    """A matrix (m, n) as that kind of layer stores it."""
    return matrix.T if kind == "Conv1D" else matrix


@pytest.mark.parametrize("kind", KINDS)
def test_mgpo_is_its_authors_formula(kind):
    """Each micro-batch at W0 + e; gradients are small enough for some layers to reach the bound."""
    model, rho, beta, mu = adapted(net(linear=KINDS[kind])), 0.2, 0.7, 0.8
    optimizer = torch.optim.AdamW(trained(model), lr=0.01, betas=(mu, 0.95))
    mgpo = MGPO(model, optimizer, rho, beta)
    start, momentum, averages, factors = parameters(model), {}, {}, []
    for step in range(4):
        values, accumulated = parameters(model), {}
        for part in (0, 1):
            moved = dict(values)
            for w, a, b in layers_of(model).values():
                if step:
                    v = SCALE * (momentum[b] @ values[a] + values[b] @ momentum[a])
                    factors.append(min(1 / averages[w], 10.0))
                    moved[w] = values[w] + dense(kind, -rho * v / v.norm() * factors[-1])
            scale = 0.02 if step < 2 else 0.4
            x = batch(2 * step + part)
            for name, gradient in gradient_at(model, moved, x).items():
                accumulated[name] = accumulated.get(name, 0) + scale * gradient
            mgpo.backward(lambda x=x, scale=scale: backward(model, x, scale))
            for name, gradient in gradients(model).items():
                torch.testing.assert_close(gradient, accumulated[name], rtol=1e-7, atol=1e-10, msg=name)
            for w, a, b in layers_of(model).values():
                norm = float((SCALE * (accumulated[b] @ values[a] + values[b] @ accumulated[a])).norm())
                averages[w] = beta * averages[w] + (1 - beta) * norm if w in averages else norm
        for name in gradients(model):
            momentum[name] = mu * momentum.get(name, 0) + (1 - mu) * accumulated[name]
        optimizer.step()
        optimizer.zero_grad()
    assert 10.0 in factors
    assert min(factors) < 5
    assert all(torch.equal(p, start[name]) for name, p in model.named_parameters() if not p.requires_grad)


def backward(model, x, scale):
    loss = scale * loss_of(model(x))
    loss.backward()
    return loss.detach()


def test_mgpo_without_a_past_is_the_plain_gradient():
    model = adapted(net())
    expected = gradient_at(model, parameters(model), batch(0))
    MGPO(model, torch.optim.AdamW(trained(model))).backward(closure_of(model, batch(0)))
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(model).items())


@pytest.mark.parametrize("kind", KINDS)
def test_bi_lora_is_its_papers_algorithm(kind):
    """Equations 9 and 10 of arXiv 2508.19564, where s is part of B and A."""
    model, rho, rate, names = adapted(net(linear=KINDS[kind])), 0.05, 0.1, {}
    plain = adapted(net(linear=KINDS[kind]))
    optimizer = torch.optim.SGD(trained(model), lr=rate)
    bi_lora = BiLoRA(model, optimizer, rho, rank=2)
    for name in layers_of(model):
        A2, B2 = (p.detach().clone() for p in model.get_submodule(name).ascending)
        assert A2.shape[0] == B2.shape[1] == 2
        assert B2.count_nonzero() == 0
        names[name] = [A2, B2]
    lengths = []
    for step in range(6):
        values = parameters(plain)
        moved = dict(values)
        for name, (w, _, _) in layers_of(plain).items():
            moved[w] = values[w] + dense(kind, SCALE * names[name][1] @ names[name][0])
        found = gradient_at(plain, moved, batch(step))
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                if parameter.requires_grad:
                    parameter -= rate * found[name]
        for name, (w, _, _) in layers_of(plain).items():
            (A2, B2), G = names[name], dense(kind, found[w])
            names[name] = [A2 + rate * SCALE * B2.T @ G, B2 + rate * SCALE * G @ A2.T]
        lengths.append(float(sum((SCALE * B2 @ A2).square().sum() for A2, B2 in names.values()).sqrt()))
        if lengths[-1] > rho:
            names = {name: [(rho / lengths[-1]) ** 0.5 * f for f in pair] for name, pair in names.items()}

        bi_lora.backward(closure_of(model, batch(step)))
        optimizer.step()
        optimizer.zero_grad()

        for name, value in parameters(plain).items():
            torch.testing.assert_close(model.get_parameter(name), value, rtol=1e-9, atol=1e-12, msg=name)
        for name, pair in names.items():
            for parameter, value in zip(model.get_submodule(name).ascending, pair, strict=True):
                torch.testing.assert_close(parameter.detach(), value, rtol=1e-9, atol=1e-12, msg=name)
    assert lengths[-1] > rho
    torch.testing.assert_close(model(batch(9)), plain(batch(9)))  # the second adapter is there in `backward` alone


def test_a_small_ball_leaves_bi_lora_where_it_is():
    model = adapted(net())
    optimizer = torch.optim.SGD(trained(model), lr=0.01)
    bi_lora = BiLoRA(model, optimizer, rho=100.0)
    bi_lora.backward(closure_of(model, batch(0)))
    raised = {name: p + 0.01 * -p.grad for name, p in model.named_parameters() if "ascending" in name}
    optimizer.step()
    assert raised
    for name, value in raised.items():
        torch.testing.assert_close(model.get_parameter(name), value)


MAKES = {"mgpo": partial(MGPO, rho=0.3), "bi_lora": partial(BiLoRA, rho=0.3)}


def begun(make, seed=0):
    model = adapted(net(), seed=seed)
    optimizer = torch.optim.AdamW(trained(model), lr=0.01)
    return model, optimizer, make(model, optimizer)


def take_steps(model, optimizer, ascent, steps):
    for step in steps:
        ascent.backward(closure_of(model, batch(step)))
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", MAKES)
def test_a_state_dict_is_all_there_is_to_resume(name):
    whole, file = begun(MAKES[name]), io.BytesIO()
    take_steps(*whole, range(3))
    torch.save([whole[0].state_dict(), whole[1].state_dict()], file)
    take_steps(*whole, range(3, 6))
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    torch.manual_seed(5)
    resumed = begun(MAKES[name], seed=5)
    resumed[0].load_state_dict({k: v for k, v in weights.items() if "ascending" not in k}, strict=False)
    resumed[1].load_state_dict(state)
    take_steps(*resumed, range(3, 6))
    for (key, one), other in zip(whole[0].named_parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(one, other), key


@pytest.mark.parametrize("name", MAKES)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_take_the_same_gradient(name, reentrant):
    found = []
    for kind in (None, reentrant):
        torch.manual_seed(0)
        model = adapted(Checkpointed(), LoraConfig(r=3, target_modules=["up", "down"]))
        optimizer = torch.optim.AdamW(trained(model), lr=0.01)
        ascent = MAKES[name](model, optimizer)
        model.get_base_model().reentrant = kind
        for step in range(3):
            optimizer.zero_grad()
            ascent.backward(closure_of(model, batch(step).requires_grad_(True)))
            optimizer.step()
        found.append(gradients(model))
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, msg=key)


def test_what_has_no_linear_layer_is_refused():
    model = get_peft_model(nn.Sequential(nn.Embedding(5, 3)), LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(UserError, match="names no linear layer"):
        MGPO(model, torch.optim.AdamW(trained(model)))
