"""Which gradient G is, its moving average, and the diagnostics."""

import pytest
import torch

from lora_ggpo.perturbation import GGPO, GGPOConfig

from .nets import adapted, batch, loss_of, net
from .reference import Twin, gradient_estimate, row_norms_squared, tau

CLOSE = {"rtol": 1e-9, "atol": 1e-14}
SIGMA, BETA = 0.3, 3.0


@pytest.fixture
def model():
    return adapted(net())


def estimates(model, scale=1.0):
    """Dense ||G_i||^2 of each layer from the gradients that its factors hold now."""
    norms = {}
    for name in ("inp", "up", "down", "head"):
        module = model.base_model.model.get_submodule(name)
        b, a = module.lora_B["default"].weight, module.lora_A["default"].weight
        dense = gradient_estimate("lora", b.detach(), a.detach(), b.grad / scale, a.grad / scale, 5 / 3)
        norms[name] = row_norms_squared(dense)
    return norms


def remembered(ggpo):
    return {
        key.rpartition(".")[2]: value for key, value in ggpo.state_dict().items() if key.startswith("gradient_norms")
    }


def test_there_is_no_gradient_before_the_first_step(model):
    ggpo = GGPO(model)
    loss_of(model(batch(0))).backward()
    assert remembered(ggpo) == {}
    ggpo.step()
    torch.testing.assert_close(remembered(ggpo), estimates(model), **CLOSE)


def test_accumulated_gradient_counts_not_the_last_micro_batch(model):
    ggpo = GGPO(model)
    for i in range(3):
        (loss_of(model(batch(i))) / 3).backward()
    expected = estimates(model)
    ggpo.step()
    torch.testing.assert_close(remembered(ggpo), expected, **CLOSE)


@pytest.mark.parametrize("what", ["clip", "zero_grad", "optimizer", "all"])
def test_what_happens_between_backward_and_step_does_not_change_it(model, what):
    ggpo = GGPO(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    loss_of(model(batch(0))).backward()
    expected = estimates(model)
    if what in ("clip", "all"):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    if what in ("optimizer", "all"):
        optimizer.step()
    if what in ("zero_grad", "all"):
        optimizer.zero_grad()
    ggpo.step()
    torch.testing.assert_close(remembered(ggpo), expected, **CLOSE)


def test_gradients_that_are_written_as_the_backward_pass_ends_are_the_ones_read(model):
    """DistributedDataParallel writes averages over processes from a callback that it queues during the pass."""
    engine = torch.autograd.Variable._execution_engine
    queued = []

    def queue(_):
        if not queued:
            queued.append(engine.queue_callback(average))

    def average():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(0.5)

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(queue)
    ggpo = GGPO(model)
    loss_of(model(batch(0))).backward()
    assert queued
    expected = estimates(model)
    ggpo.step()
    torch.testing.assert_close(remembered(ggpo), expected, **CLOSE)


def test_step_before_means_the_step_before_only(model):
    ggpo = GGPO(model)
    for i in range(3):
        loss_of(model(batch(i))).backward()
        expected = estimates(model)
        ggpo.step()
        torch.testing.assert_close(remembered(ggpo), expected, **CLOSE)
        model.zero_grad()


def test_a_step_without_a_backward_pass_keeps_what_is_known(model):
    ggpo = GGPO(model)
    loss_of(model(batch(0))).backward()
    ggpo.step()
    expected = remembered(ggpo)
    ggpo.step()
    torch.testing.assert_close(remembered(ggpo), expected, rtol=0, atol=0)


def test_scale_of_the_loss_divides_out(model):
    ggpo = GGPO(model)
    (loss_of(model(batch(0))) * 1024).backward()
    expected = estimates(model, scale=1024)
    ggpo.step(grad_scale=1024)
    torch.testing.assert_close(remembered(ggpo), expected, **CLOSE)


@pytest.mark.parametrize("divided_out", [False, True], ids=["scaled", "by a scaler"])
@pytest.mark.parametrize("clip", [None, 0.25])
@pytest.mark.parametrize("gone", [False, True])
def test_the_rule_that_means_clipped_gradients_has_them_at_any_scale(model, divided_out, clip, gone):
    """Whether the scale is still on the gradients as the step is counted, as a scaler never leaves it."""
    ggpo = GGPO(model, GGPOConfig(rule="sd-scripts"))
    (loss_of(model(batch(0))) * 1024).backward()
    factor = 1.0 if clip is None or gone else clip
    expected = {name: norms * factor**2 for name, norms in estimates(model, scale=1024).items()}
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(factor / (1024 if divided_out else 1))
    if gone:
        model.zero_grad()
    ggpo.step(grad_scale=1024)
    torch.testing.assert_close(remembered(ggpo), expected, **CLOSE)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_step_of_non_finite_gradients_is_passed_over(model, bad):
    ggpo = GGPO(model, GGPOConfig(ema=0.5))
    loss_of(model(batch(0))).backward()
    ggpo.step()
    expected = remembered(ggpo)
    model.zero_grad()
    (loss_of(model(batch(1))) * bad).backward()
    ggpo.step()
    torch.testing.assert_close(remembered(ggpo), expected, rtol=0, atol=0)
    model.zero_grad()
    assert loss_of(model(batch(2))).isfinite()


def test_average_begins_at_the_first_finite_gradient(model):
    """An fp16 run begins with overflows: they must not pull the average towards 0."""
    ggpo = GGPO(model, GGPOConfig(ema=0.9))
    (loss_of(model(batch(0))) * float("inf")).backward()
    ggpo.step()
    model.zero_grad()
    loss_of(model(batch(1))).backward()
    expected = estimates(model)
    ggpo.step()
    torch.testing.assert_close(remembered(ggpo), expected, **CLOSE)


def test_moving_average(model):
    ggpo = GGPO(model, GGPOConfig(ema=0.75))
    average = None
    for i in range(4):
        model.zero_grad()
        loss_of(model(batch(i))).backward()
        new = estimates(model)
        average = new if average is None else {k: 0.75 * average[k] + 0.25 * new[k] for k in new}
        ggpo.step()
        torch.testing.assert_close(remembered(ggpo), average, **CLOSE)


def test_a_layer_without_gradient_has_norm_0(model):
    for name, parameter in model.named_parameters():
        if ".up.lora" in name:
            parameter.requires_grad_(False)
    ggpo = GGPO(model, GGPOConfig(rule="relative", beta=0.7))
    loss_of(model(batch(0))).backward()
    ggpo.step()
    assert remembered(ggpo)["up"].abs().max() == 0
    assert remembered(ggpo)["inp"].min() > 0
    model(batch(1))
    assert all(layer.tau.isfinite().all() and layer.tau.min() > 0 for layer in ggpo.layers)


def test_gradient_checks_by_autograd_grad_do_not_count_as_a_backward_pass(model):
    ggpo = GGPO(model)
    loss_of(model(batch(0))).backward()
    expected = estimates(model)
    model.zero_grad()
    ggpo.step()
    x = batch(1).requires_grad_()
    torch.autograd.grad(loss_of(model(x)), x)
    torch.testing.assert_close(remembered(ggpo), expected, **CLOSE)


@pytest.mark.parametrize("rule", ["paper", "relative", "sd-scripts"])
def test_metrics_against_dense_numbers(model, rule):
    beta = {"paper": BETA, "relative": 0.6, "sd-scripts": 0.05}[rule]
    config = GGPOConfig(sigma=SIGMA, beta=beta, rule=rule)
    ggpo = GGPO(model, config)
    assert ggpo.metrics() == {}
    loss_of(model(batch(0))).backward()
    assert ggpo.metrics()["ggpo/gradient_share"] == 0
    norms = estimates(model)
    ggpo.step()
    model(batch(1))
    found = ggpo.metrics()

    guided, total, weights, rows = {}, {}, {}, {}
    for name, g in norms.items():
        module = model.base_model.model.get_submodule(name)
        w = (module.base_layer.weight + module.get_delta_weight("default")).detach()
        gradient = torch.zeros_like(w)
        gradient[:, 0] = g.sqrt()
        others = module.base_layer.weight, module.lora_B["default"].weight @ module.lora_A["default"].weight
        total[name] = tau(rule, SIGMA, beta, w, gradient, *others).square().sum().item()
        alone = tau(rule, SIGMA, beta, w, 0 * gradient, *others).square().sum().item()
        alone *= 1 - beta if rule == "relative" else 1
        guided[name], weights[name], rows[name] = total[name] - alone, w.square().sum().item(), w.shape[0]
        n = w.shape[1]
        assert found[f"ggpo/{name}/gradient_share"] == pytest.approx(guided[name] / total[name], rel=1e-7)
        assert found[f"ggpo/{name}/relative_noise"] == pytest.approx((n * total[name] / weights[name]) ** 0.5)
        assert found[f"ggpo/{name}/tau"] == pytest.approx((total[name] / rows[name]) ** 0.5)
        if rule != "sd-scripts":
            assert found["ggpo/gradient_share"] > 0.01
        weights[name, "energy"] = n * total[name]
    energy = sum(weights[name, "energy"] for name in norms)
    assert found["ggpo/gradient_share"] == pytest.approx(sum(guided.values()) / sum(total.values()), rel=1e-7)
    assert found["ggpo/relative_noise"] == pytest.approx((energy / sum(weights[n] for n in norms)) ** 0.5)
    assert found["ggpo/tau"] == pytest.approx((sum(total.values()) / sum(rows.values())) ** 0.5)
    assert found["ggpo/coverage"] == found["ggpo/coverage_parameters"] == 1
    assert len(found) == 3 * 5 + 2
    if rule == "relative":
        assert found["ggpo/relative_noise"] == pytest.approx(SIGMA)


def test_relative_noise_without_guidance_is_sigma(model):
    ggpo = GGPO(model, GGPOConfig(sigma=SIGMA, beta=0))
    model(batch(0))
    assert ggpo.metrics()["ggpo/relative_noise"] == pytest.approx(SIGMA)


def test_layers_of_one_name_are_one_group_of_metrics_whatever_their_shapes():
    first, second = torch.nn.Linear(6, 4), torch.nn.Linear(4, 5)
    stack = torch.nn.Sequential(torch.nn.ModuleDict({"q": first}), torch.nn.ModuleDict({"q": second}))
    stack.forward = lambda x: second(torch.tanh(first(x)))
    from peft import LoraConfig

    both = adapted(stack, LoraConfig(r=2, target_modules=["q"]))
    both.base_model.model.forward = lambda x: both.base_model.model[1]["q"](both.base_model.model[0]["q"](x))
    ggpo = GGPO(both, GGPOConfig(sigma=SIGMA, beta=0))
    both(batch(0))
    assert {key for key in ggpo.metrics() if "/q/" in key} == {
        "ggpo/q/gradient_share",
        "ggpo/q/relative_noise",
        "ggpo/q/tau",
    }
    assert ggpo.metrics()["ggpo/q/relative_noise"] == pytest.approx(SIGMA)


def test_magnitude_of_dora_is_the_weight_norm():
    """DoRA's rows have the trained magnitude as norm: tau follows it after training moved it."""
    from peft import LoraConfig

    config = LoraConfig(r=3, lora_alpha=5, target_modules=["inp", "up", "down", "head"], use_dora=True)
    dora = adapted(net(), config)
    ggpo = GGPO(dora, GGPOConfig(sigma=SIGMA, beta=0))
    twin = Twin(dora.eval(), {"default": config}, GGPOConfig(sigma=SIGMA, beta=0))
    dora.train()(batch(0))
    for layer in ggpo.layers:
        size = twin.taus()[layer.name]
        magnitude = layer.module.lora_magnitude_vector["default"].weight
        torch.testing.assert_close(size, SIGMA * magnitude.abs() / layer.n**0.5, **CLOSE)
