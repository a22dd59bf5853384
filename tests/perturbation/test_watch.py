"""Sizes that cannot be right: a loss scale that is left in the gradients, and weights whose squares overflow."""

import warnings

import pytest
import torch

from lora_ggpo.perturbation import GGPO, GGPOConfig
from lora_ggpo.perturbation.watch import FIRST_STEPS, LATER_STEPS

from .nets import adapted, batch, loss_of, net


class Scaler:
    """The part of a GradScaler that is there without a GPU."""

    def __init__(self, scale):
        self.scale = scale

    def get_scale(self):
        return self.scale


def train(scale=1.0, given=False, late=False, **settings):
    """Gradient norms and warnings of three steps under a loss scale that is told to step(), or is not."""
    model = adapted(net(), dtype=torch.float32)
    ggpo = GGPO(model, GGPOConfig(**{"sigma": 0.01, "beta": 1e-3, **settings}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            model.zero_grad()
            now = 1.0 if late and step < 2 else scale
            (loss_of(model(batch(0, dtype=torch.float32))) * now).backward()
            ggpo.step(scaler=Scaler(now)) if given else ggpo.step()
            assert not caught or not given
    norms = {key: value for key, value in ggpo.state_dict().items() if "norms" in key}
    return norms, [str(w.message) for w in caught if "implausibly large" in str(w.message)]


def test_a_scaler_is_divided_out():
    plain, _ = train(redraw="optimizer-step")
    scaled, messages = train(65536.0, given=True, redraw="optimizer-step")
    assert not messages
    torch.testing.assert_close(scaled, plain, rtol=1e-4, atol=0)


def test_no_scaler_is_none():
    model = adapted(net())
    ggpo = GGPO(model)
    loss_of(model(batch(0))).backward()
    ggpo.step(scaler=None)


@pytest.mark.parametrize(("late", "rule"), [(False, "paper"), (True, "paper"), (True, "relative")])
def test_a_loss_scale_that_is_not_told_is_said_once(late, rule):
    _, messages = train(65536.0, late=late, rule=rule)
    assert len(messages) == 1
    assert "scaler=scaler" in messages[0]


@pytest.mark.parametrize("rule", ["paper", "relative", "sd-scripts"])
def test_training_without_a_scale_is_plausible(rule):
    assert train(rule=rule)[1] == []


def overflow(model, names=("up",)):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(f"{part}.lora_B" in name for part in names):
                parameter.fill_(1e20)


def test_weights_whose_squares_overflow_are_an_error_and_no_noise_of_infinite_size():
    model = adapted(net(), dtype=torch.float32)
    ggpo = GGPO(model, GGPOConfig(sigma=0.3))
    x = batch(0, dtype=torch.float32)
    loss_of(model(x)).backward()
    ggpo.step()
    overflow(model)
    model(x)
    sizes = {layer.name.rpartition(".")[2]: layer.tau for layer in ggpo.layers}
    assert all(size.isfinite().all() for size in sizes.values())
    assert sizes["up"].max() == 0 < sizes["down"].min()
    with pytest.raises(FloatingPointError, match=r"training diverges.*model\.up is not finite"):
        ggpo.metrics()
    with pytest.raises(FloatingPointError, match="training diverges"):
        ggpo.step()


def test_sizes_are_looked_at_now_and_then():
    """After each of the first steps, and seldom after them: to look waits for the GPU."""
    model = adapted(net(), dtype=torch.float32)
    ggpo = GGPO(model, GGPOConfig(sigma=0.3, beta=0))
    looks = []
    ggpo._watch.look = lambda groups: looks.append(ggpo._steps)
    for _ in range(3 * LATER_STEPS):
        ggpo._captured = True
        ggpo.step()
    assert looks == [*range(1, FIRST_STEPS + 1), *range(LATER_STEPS, 3 * LATER_STEPS + 1, LATER_STEPS)]
