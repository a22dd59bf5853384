"""IVON against the equations of its paper (arXiv 2402.17641, algorithm 1), in dense float64."""

import io

import pytest
import torch
from transformers import TrainingArguments

from lora_ggpo.methods.optimizers import Posterior, ivon

from ..perturbation.nets import adapted, batch, loss_of, net

pytest.importorskip("ivon")
ESS, H0, RATE, DELTA, CLIP = 50.0, 0.25, 40.0, 0.01, 1e-3
BETA1, BETA2 = 0.9, 0.99999


@pytest.fixture
def args(tmp_path):
    return TrainingArguments(output_dir=str(tmp_path), learning_rate=RATE, weight_decay=DELTA, use_cpu=True)


def begun(args, seed=0):
    model = adapted(net(), seed=seed)
    optimizer = ivon(model, args, ESS, H0)
    return model, optimizer, Posterior(optimizer, seed=1)


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def take_step(model, optimizer, posterior, i):
    """Two micro-batches; returns the weights at which each was computed, and the gradient of both."""
    trained, seen = [p for p in model.parameters() if p.requires_grad], []

    def closure(x):
        seen.append(flat(trained))
        loss = loss_of(model(x))
        loss.backward()
        return loss.detach()

    for part in (0, 1):
        posterior.backward(lambda part=part: closure(batch(2 * i + part)))
    gradient = flat(p.grad for p in trained)
    optimizer.step()
    optimizer.zero_grad()
    return seen, gradient


def test_ivon_is_its_papers_algorithm(args):
    model, optimizer, posterior = begun(args)
    trained = [p for p in model.parameters() if p.requires_grad]
    m = flat(trained)
    g, h, draws = torch.zeros_like(m), torch.full_like(m, H0), []
    for step in range(1, 6):
        (theta, again), gradient = take_step(model, optimizer, posterior, step)
        assert torch.equal(theta, again)  # one draw a step
        draws.append((theta - m) * (ESS * (h + DELTA)).sqrt())
        f = gradient * (theta - m) * ESS * (h + DELTA)
        g = BETA1 * g + (1 - BETA1) * gradient
        h = BETA2 * h + (1 - BETA2) * f + 0.5 * (1 - BETA2) ** 2 * (h - f) ** 2 / (h + DELTA)
        m = m - RATE * ((g / (1 - BETA1**step) + DELTA * m) / (h + DELTA)).clamp(-CLIP, CLIP)
        torch.testing.assert_close(flat(trained), m, rtol=1e-9, atol=1e-12)
    normal = torch.cat(draws)  # 5 x 213 values
    assert abs(normal.mean()) < 4 / len(normal) ** 0.5
    assert abs(normal.square().mean() - 1) < 4 * (2 / len(normal)) ** 0.5
    assert abs(torch.corrcoef(torch.stack(draws[:2]))[0, 1]) < 0.35


def test_draws_depend_on_seed_and_step_alone(args):
    found = []
    for noise in (0, 1):
        torch.manual_seed(noise)
        model, optimizer, posterior = begun(args)
        torch.manual_seed(noise)
        found.append([take_step(model, optimizer, posterior, i)[0][0] for i in range(2)])
        assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(noise))  # what others draw from
    assert all(map(torch.equal, *found))


def test_a_state_dict_is_all_there_is_to_resume(args):
    model, optimizer, posterior = begun(args)
    file = io.BytesIO()
    for i in range(3):
        take_step(model, optimizer, posterior, i)
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    for i in range(3, 6):
        take_step(model, optimizer, posterior, i)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    resumed, other, draws = begun(args, seed=5)
    resumed.load_state_dict(weights)
    other.load_state_dict(state)
    for i in range(3, 6):
        take_step(resumed, other, draws, i)
    assert all(map(torch.equal, model.parameters(), resumed.parameters()))


def test_a_parameter_without_a_gradient_stays(args):
    model = adapted(net())
    model.unused = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = ivon(model, args, ESS, H0)
    posterior = Posterior(optimizer, 0)
    posterior.backward(lambda: loss_of(model(batch(0))).backward())
    optimizer.step()
    assert model.unused.count_nonzero() == 0
