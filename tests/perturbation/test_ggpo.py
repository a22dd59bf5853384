"""The object of a training loop: draws, schedules, checkpointing, precision, resumption."""

import copy
import math
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lora_ggpo.perturbation import GGPO, GGPOConfig

from .nets import TARGETS, Checkpointed, adapted, batch, gradients, loss_of, net

EXACT = {"rtol": 0, "atol": 0}


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def train(model, ggpo, optimizer, steps, start=0):
    losses = []
    dtype = next(model.parameters()).dtype
    for step in range(start, start + steps):
        for micro in range(2):
            loss = loss_of(model(batch(2 * step + micro, dtype=dtype))) / 2
            loss.backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(trainable(model), 1.0)
        optimizer.step()
        if ggpo:
            ggpo.step()
        optimizer.zero_grad()
    return losses


# --- when noise is drawn ---


def test_each_forward_pass_draws_anew_and_the_seed_decides():
    x, outputs = batch(0), {}
    for seed in (0, 0, 1):
        model = adapted(net())
        GGPO(model, GGPOConfig(sigma=0.3, seed=seed))
        y = [model(x), model(x)]
        assert not torch.allclose(*y)
        if seed in outputs:
            assert torch.equal(outputs[seed][0], y[0])
            assert torch.equal(outputs[seed][1], y[1])
        outputs[seed] = y
    assert not torch.allclose(outputs[0][0], outputs[1][0])


def test_one_draw_for_all_micro_batches_of_an_optimizer_step():
    model, x = adapted(net()), batch(0)
    ggpo = GGPO(model, GGPOConfig(sigma=0.3, redraw="optimizer-step"))
    first = model(x)
    assert torch.equal(model(x), first)
    loss_of(model(x)).backward()
    assert torch.equal(model(x), first)
    ggpo.step()
    second = model(x)
    assert not torch.allclose(second, first)
    assert torch.equal(model(x), second)


def test_evaluation_between_two_steps_does_not_move_the_noise():
    model, x = adapted(net()), batch(0)
    GGPO(model, GGPOConfig(sigma=0.3))
    twin = copy.deepcopy(model)
    model.eval()(x)
    assert torch.equal(model.train()(x), twin(x))


# --- how large it is ---


@pytest.mark.parametrize(
    ("schedule", "factor"), [("linear", lambda t: t / 4), ("cosine", lambda t: (1 - math.cos(math.pi * t / 4)) / 2)]
)
@pytest.mark.parametrize("rule", ["paper", "sd-scripts"])
def test_schedule_ramps_the_size_of_the_noise(schedule, factor, rule):
    model, full = adapted(net()), adapted(net())
    stock = copy.deepcopy(model)
    ggpo = GGPO(model, GGPOConfig(sigma=0.3, schedule=schedule, rule=rule), total_steps=4)
    reference = GGPO(full, GGPOConfig(sigma=0.3, rule=rule))
    x = batch(0)
    for step in range(6):
        y = model(x)
        full(x)
        if step == 0:
            torch.testing.assert_close(y, stock(x), rtol=1e-12, atol=1e-14)  # a ramp starts without noise
        for layer, other in zip(ggpo.layers, reference.layers, strict=True):
            size = 0 if layer.tau is None else layer.tau
            torch.testing.assert_close(other.tau * factor(min(step, 4)), size + torch.zeros_like(other.tau))
        for one, it in ((model, ggpo), (full, reference)):
            one.zero_grad()
            loss_of(stock(x) * 0 + one(x)).backward()
            it.step()
            # Equal gradients, so that only the schedule differs.
        for mine, theirs in zip(ggpo._groups, reference._groups, strict=True):
            mine.gradient = theirs.gradient.clone()


def test_a_ramp_without_the_number_of_steps_is_refused_at_once():
    model = adapted(net())
    with pytest.raises(ValueError, match="total_steps"):
        GGPO(model, GGPOConfig(schedule="cosine"))
    GGPO(model)


def test_noise_follows_the_weights_after_each_step():
    model = adapted(net())
    ggpo = GGPO(model, GGPOConfig(sigma=0.3, beta=0))
    model(batch(0))
    loss_of(model(batch(0))).backward()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 1
    ggpo.step()
    model(batch(0))
    for layer in ggpo.layers:
        weight = layer.base.weight + layer.module.get_delta_weight("default")
        torch.testing.assert_close(layer.tau, 0.3 * (weight.square().sum(1) / layer.n).sqrt())


# --- what is left alone ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sigma_0_is_plain_lora_bit_for_bit(dtype):
    runs = []
    for config in (None, GGPOConfig(sigma=0), GGPOConfig(sigma=0, beta=1, rule="sd-scripts")):
        model = adapted(net(), LoraConfig(r=3, lora_dropout=0.2, target_modules=TARGETS), dtype=dtype)
        ggpo = GGPO(model, config) if config else None
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        torch.manual_seed(3)
        runs.append((train(model, ggpo, optimizer, steps=20), copy.deepcopy(model.state_dict())))
    for losses, state in runs[1:]:
        assert losses == runs[0][0]
        assert all(torch.equal(value, runs[0][1][key]) for key, value in state.items())
    assert ggpo.metrics() == {}


@pytest.mark.parametrize("noise", ["factored", "dense"])
@pytest.mark.slow
def test_w0_is_bit_identical_after_200_bf16_steps(noise):
    model = adapted(net(), dtype=torch.bfloat16)
    frozen = {k: p.detach().clone() for k, p in model.named_parameters() if not p.requires_grad}
    before = {k: p.detach().clone() for k, p in model.named_parameters() if p.requires_grad}
    ggpo = GGPO(model, GGPOConfig(sigma=0.3, noise=noise))
    optimizer = torch.optim.SGD(trainable(model), lr=1e-2)
    for step in range(200):
        loss_of(model(batch(step % 5, dtype=torch.bfloat16))).backward()
        optimizer.step()
        ggpo.step()
        optimizer.zero_grad()
    parameters = dict(model.named_parameters())
    assert len(frozen) == 8
    for name, value in frozen.items():
        assert torch.equal(parameters[name].view(torch.int16), value.view(torch.int16)), name
    assert any(not torch.equal(parameters[name], value) for name, value in before.items())


# --- gradient checkpointing ---


def checkpointed(reentrant):
    torch.manual_seed(2)
    model = adapted(Checkpointed(), LoraConfig(r=2, lora_alpha=5, target_modules=["up", "down"]))
    model.base_model.model.reentrant = reentrant
    return model, GGPO(model, GGPOConfig(sigma=0.3, beta=1.0))


def one_pass(model, ggpo, x):
    loss_of(model(x)).backward()


def sum_of_two(model, ggpo, x):
    (loss_of(model(x)) + loss_of(model(0.5 * x))).backward()


def outputs_first(model, ggpo, x):
    y = [model(x), model(0.5 * x)]
    (loss_of(y[0]) + loss_of(y[1])).backward()


def first_in_first_out(model, ggpo, x):
    losses = [loss_of(model(x)), loss_of(model(0.5 * x)), loss_of(model(2 * x))]
    for loss in losses:
        loss.backward()


def last_in_first_out(model, ggpo, x):
    losses = [loss_of(model(x)), loss_of(model(0.5 * x)), loss_of(model(2 * x))]
    for loss in reversed(losses):
        loss.backward()


def evaluation_between(model, ggpo, x):
    loss = loss_of(model(x))
    with torch.no_grad():
        model(2 * x)
        with model.disable_adapter():
            model(x)
    loss.backward()


def dictionary_of_outputs(model, ggpo, x):
    loss = loss_of({"nested": [model(x)]}["nested"][0])
    model(x)
    loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "order",
    [
        one_pass,
        sum_of_two,
        outputs_first,
        first_in_first_out,
        last_in_first_out,
        evaluation_between,
        dictionary_of_outputs,
    ],
)
def test_gradient_checkpointing_sees_the_noise_of_its_forward_pass(reentrant, order):
    results = []
    for mode in (None, reentrant):
        model, ggpo = checkpointed(mode)
        x = batch(0).requires_grad_()
        order(model, ggpo, x)
        ggpo.step()
        first = gradients(model)
        order(model, ggpo, x)
        results.append((first, gradients(model), x.grad, ggpo.state_dict()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_a_real_model(minilm, reentrant):
    model, tokenizer = minilm
    inputs = tokenizer(["a fine film", "dull, and far too long"], padding=True, return_tensors="pt")
    labels = torch.tensor([1, 0])
    results = []
    for checkpointing in (False, True):
        base = copy.deepcopy(model)
        torch.manual_seed(0)
        peft = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).train()
        if checkpointing:
            base.enable_input_require_grads()
            base.gradient_checkpointing_enable({"use_reentrant": reentrant})
            assert base.is_gradient_checkpointing
        ggpo = GGPO(peft, GGPOConfig(sigma=0.1))
        torch.manual_seed(1)
        losses = [peft(**inputs, labels=labels).loss for _ in range(2)]
        losses[0].backward()
        losses[1].backward()
        ggpo.step()
        results.append((torch.stack(losses), gradients(peft), ggpo.state_dict()))
        ggpo.detach()
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


# --- precision ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_close_to_full_precision_with_the_same_noise(dtype):
    runs = []
    for enabled in (False, True):
        model = adapted(net(), dtype=torch.float32)
        ggpo = GGPO(model, GGPOConfig(sigma=0.3, beta=1.0))
        losses = []
        for step in range(2):
            model.zero_grad()
            with torch.autocast("cpu", dtype, enabled=enabled):
                y = model(batch(step, dtype=torch.float32))
            losses.append(loss_of(y.float()))
            losses[-1].backward()
            ggpo.step()
        assert all(g.isfinite().all() and g.dtype == torch.float32 for g in gradients(model).values())
        runs.append((torch.stack(losses), gradients(model), ggpo.metrics()["ggpo/gradient_share"]))
    (loss, gradient, share), (low_loss, low_gradient, low_share) = runs
    torch.testing.assert_close(low_loss, loss, rtol=0.03, atol=0.01)
    for name, value in gradient.items():
        assert (low_gradient[name] - value).norm() < 0.05 * value.norm(), name
    assert low_share == pytest.approx(share, rel=0.05)


# --- resumption ---


@pytest.mark.parametrize("redraw", ["micro-batch", "optimizer-step"])
@pytest.mark.parametrize("rule", ["paper", "relative"])
def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(redraw, rule, tmp_path):
    config = GGPOConfig(sigma=0.3, beta=0.8, rule=rule, redraw=redraw, ema=0.5, schedule="cosine")

    def start():
        model = adapted(net(), dtype=torch.float32)
        return model, GGPO(model, config, total_steps=6), torch.optim.AdamW(trainable(model), lr=1e-2)

    model, ggpo, optimizer = start()
    losses = train(model, ggpo, optimizer, steps=3)
    torch.save([model.state_dict(), ggpo.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    losses = train(model, ggpo, optimizer, steps=3, start=3)

    resumed, other, resumed_optimizer = start()
    states = torch.load(tmp_path / "state.pt", weights_only=True)
    for target, state in zip((resumed, other, resumed_optimizer), states, strict=True):
        target.load_state_dict(state)
    assert train(resumed, other, resumed_optimizer, steps=3, start=3) == losses
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in model.state_dict().items())
    torch.testing.assert_close(other.state_dict(), ggpo.state_dict(), **EXACT)
    assert other.metrics() == ggpo.metrics()


def test_state_is_a_copy_and_that_of_another_model_is_refused():
    model = adapted(net())
    ggpo = GGPO(model)
    loss_of(model(batch(0))).backward()
    ggpo.step()
    state = ggpo.state_dict()
    for value in state.values():
        value.zero_()
    assert max(v.abs().max() for k, v in ggpo.state_dict().items() if "." in k) > 0
    other = GGPO(adapted(net(), LoraConfig(r=2, target_modules=["up"])))
    with pytest.raises(ValueError, match="another model: no layer"):
        other.load_state_dict(state)


# --- the warning ---


def warned(rule, beta, steps, lr=0.0):
    model = adapted(net(), dtype=torch.float32)
    ggpo = GGPO(model, GGPOConfig(rule=rule, beta=beta))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(steps):
            model.zero_grad()
            loss_of(model(batch(step, dtype=torch.float32))).backward()
            ggpo.step()
    return [str(w.message) for w in caught if "gradient term" in str(w.message)]


@pytest.mark.parametrize(
    ("rule", "beta", "steps", "count"),
    [
        ("paper", 1e-6, 19, 0),
        ("paper", 1e-6, 20, 1),
        ("paper", 1e-6, 45, 1),
        ("paper", 1.0, 25, 0),
        ("paper", 0.0, 25, 0),
        ("relative", 1e-6, 25, 0),
        ("sd-scripts", 1e-6, 25, 1),
    ],
)
def test_warning_that_the_gradient_term_does_not_count(rule, beta, steps, count):
    messages = warned(rule, beta, steps)
    assert len(messages) == count
    if count:
        assert 'rule="relative"' in messages[0]
        assert "beta=1e-06" in messages[0]


def test_a_step_that_saw_no_gradient_is_reported_once():
    model = adapted(net())
    ggpo = GGPO(model, GGPOConfig(rule="relative"))
    loss_of(model.base_model(batch(0))).backward()  # not the forward of the model that was given
    with pytest.warns(UserWarning, match="saw no gradient"):
        ggpo.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ggpo.step()
