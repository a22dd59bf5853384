"""Which layers the noise reached: counted, and said where it should have reached one and did not."""

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_ggpo.perturbation import GGPO, GGPOConfig

from .nets import TARGETS, Net, adapted, batch, loss_of, net


class FusedLora(torch.autograd.Function):
    """x W0^T + s x A^T B^T + bias with a backward pass by hand, as Unsloth's and Axolotl's kernels have it: the weights
    of a projection are read, and its forward is never called."""

    @staticmethod
    def forward(ctx, x, w0, bias, a, b, s):
        ctx.save_for_backward(x, w0, a, b)
        ctx.s = s
        return x @ w0.T + bias + s * (x @ a.T) @ b.T

    @staticmethod
    def backward(ctx, dy):
        x, w0, a, b = ctx.saved_tensors
        da, db = ctx.s * (dy @ b).T @ x, ctx.s * dy.T @ (x @ a.T)
        return dy @ w0 + ctx.s * (dy @ b) @ a, None, None, da, db, None


def fused(projection):
    def forward(x):
        base, name = projection.base_layer, projection.active_adapters[0]
        a, b = projection.lora_A[name].weight, projection.lora_B[name].weight
        return FusedLora.apply(x, base.weight, base.bias, a, b, projection.scaling[name])

    return forward


class Routed(Net):
    """A network whose branch `up`, `down` runs if it is told to, by its layers or by a fused kernel."""

    branch = "layers"

    def forward(self, x):
        h = torch.tanh(self.inp(x))
        if self.branch == "none":
            return self.head(h)
        up, down = (fused(p) if self.branch == "fused" else p for p in (self.up, self.down))
        return self.head(h + down(torch.tanh(up(h))))


def routed(branch, **settings):
    torch.manual_seed(0)
    model = adapted(Routed())
    model.base_model.model.branch = branch
    return model, GGPO(model, GGPOConfig(**{"sigma": 0.3, "beta": 0, **settings}))


def one_step(model, ggpo, i=0):
    model.zero_grad()
    loss_of(model(batch(i))).backward()
    ggpo.step()


def test_layers_that_a_fused_kernel_bypasses_are_named_once_and_counted():
    model, ggpo = routed("fused")
    model_without, plain = routed("none")
    assert ggpo.metrics() == {}
    with pytest.warns(UserWarning, match="2 of 4 adapted layers train without") as caught:
        one_step(model, ggpo)
    (message,) = [str(w.message) for w in caught]
    assert "model.up, base_model.model.down" in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one_step(model, ggpo)
        one_step(model_without, plain)
    found = ggpo.metrics()
    sizes = {name: getattr(model.base_model.model, name).base_layer.weight.numel() for name in TARGETS}
    assert found["ggpo/coverage"] == 2 / 4
    assert found["ggpo/coverage_parameters"] == (sizes["inp"] + sizes["head"]) / sum(sizes.values())
    assert found["ggpo/up/relative_noise"] == found["ggpo/down/tau"] == 0
    assert found["ggpo/inp/relative_noise"] == pytest.approx(0.3)
    weights = {
        layer.name.rpartition(".")[2]: (layer.base.weight + layer.module.get_delta_weight("default")).square().sum()
        for layer in ggpo.layers
    }
    share = (weights["inp"] + weights["head"]) / sum(weights.values())
    assert found["ggpo/relative_noise"] == pytest.approx(0.3 * share.sqrt().item())


def test_a_bypassed_layer_is_an_error_under_strict():
    model, ggpo = routed("fused", strict=True)
    with pytest.raises(RuntimeError, match="lora_mlp_kernel"):
        one_step(model, ggpo)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_branch_that_does_not_run_or_does_not_train_is_no_error(zeros, frozen):
    """An expert that got no token; a branch whose adapter is frozen, run by a kernel of its own."""
    model, ggpo = routed("fused" if frozen else "none", strict=True)
    for name, parameter in model.named_parameters():
        if frozen and ("up" in name or "down" in name):
            parameter.requires_grad_(False)
    for i in range(2):
        model.zero_grad(set_to_none=not zeros)
        if zeros:
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        loss_of(model(batch(i))).backward()
        ggpo.step()
    assert ggpo.metrics()["ggpo/coverage"] == 0.5


def test_a_layer_that_one_micro_batch_of_a_step_reaches_is_not_bypassed():
    model, ggpo = routed("layers", strict=True)
    loss_of(model(batch(0))).backward()
    model.base_model.model.branch = "none"
    loss_of(model(batch(1))).backward()
    ggpo.step()
    assert ggpo.metrics()["ggpo/coverage"] == 0.5  # of the last pass


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_all_layers_are_covered_from_the_first_step_on(schedule):
    model = adapted(net())
    ggpo = GGPO(model, GGPOConfig(sigma=0.3, schedule=schedule, strict=True), total_steps=4)
    for i in range(2):
        one_step(model, ggpo, i)
        assert ggpo.metrics()["ggpo/coverage"] == ggpo.metrics()["ggpo/coverage_parameters"] == 1


@pytest.mark.parametrize(("branch", "share"), [("layers", 1.0), ("fused", 0.5)])
@pytest.mark.slow
def test_a_compiled_model_is_counted_alike(branch, share):
    torch._dynamo.reset()
    model, ggpo = routed(branch)
    compiled = torch.compile(model, backend="aot_eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        one_step(compiled, ggpo)
    assert ggpo.metrics()["ggpo/coverage"] == share
    assert any("train without GGPO's noise" in str(w.message) for w in caught) == (branch == "fused")
    torch._dynamo.reset()


def test_a_part_that_is_called_directly_beside_the_model_is_named():
    model, ggpo = routed("none")
    inner = model.base_model.model
    h = torch.tanh(inner.up(torch.ones(2, 8, dtype=torch.float64)))
    (loss_of(model(batch(0))) + h.square().sum()).backward()
    with pytest.warns(UserWarning, match=r"1 of 4 .*model\.up\."):
        ggpo.step()


def test_a_strict_step_that_saw_no_gradient_is_an_error():
    model = adapted(net())
    ggpo = GGPO(model, GGPOConfig(strict=True))
    loss_of(model.base_model(batch(0))).backward()
    with pytest.raises(RuntimeError, match="saw no gradient"):
        ggpo.step()


def test_projections_fused_into_one_show_in_the_coverage():
    """diffusers' fuse_qkv_projections: one new weight stands for several layers, which get no gradient any more."""

    class FusedQkv(Net):
        def forward(self, x):
            weight = torch.cat([self.up.weight, self.up.weight])  # PEFT shows W0 here
            return self.head(torch.tanh(self.inp(x)) + self.down(torch.tanh(self.inp(x) @ weight.T)[:, :14]))

    torch.manual_seed(0)
    model = adapted(FusedQkv())
    ggpo = GGPO(model, GGPOConfig(sigma=0.3))
    one_step(model, ggpo)
    assert ggpo.metrics()["ggpo/coverage"] == 3 / 4


# --- what is never called, and what is no LoRA ---


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.attention = nn.Linear(6, 6), nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        h = self.up(x)[None]
        return self.attention(h, h, h, need_weights=False)[0][0]


def test_out_proj_of_multihead_attention_is_skipped_with_the_reason():
    model = get_peft_model(Attending(), LoraConfig(r=2, target_modules=["up", "out_proj"], init_lora_weights=False))
    with pytest.warns(UserWarning, match="out_proj .*reads the weight of its out_proj and never calls it"):
        ggpo = GGPO(model.train(), GGPOConfig(sigma=0.3))
    assert [layer.name for layer in ggpo.layers] == ["base_model.model.up"]
    loss_of(model(batch(0, dtype=torch.float32))).backward()
    ggpo.step()
    assert ggpo.metrics()["ggpo/coverage"] == 1 / 2
    assert ggpo.metrics()["ggpo/coverage_parameters"] == 36 / 72


# --- DataParallel ---


def replica_of(model):
    """As torch.nn.parallel.replicate() makes one of each module; on one device the weights are the model's own."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, copy in copies.items():
        for name, child in module._modules.items():
            setattr(copy, name, None if child is None else copies[child])
        for name, parameter in module._parameters.items():
            setattr(copy, name, parameter)
    return copies[model]


@pytest.mark.parametrize("training", [True, False])
def test_a_replica_of_data_parallel_is_refused(training):
    model = adapted(net()).train(training)
    GGPO(model)
    with pytest.raises(RuntimeError, match="torchrun"):
        replica_of(model)(batch(0))


def test_data_parallel_over_several_devices_is_refused_and_over_one_it_is_not():
    wrapped = nn.DataParallel(adapted(net()))
    ggpo = GGPO(wrapped)
    loss_of(wrapped(batch(0))).backward()
    ggpo.step()
    assert ggpo.metrics()["ggpo/coverage"] == 1
    ggpo.detach()
    wrapped.device_ids = [0, 1]
    with pytest.raises(ValueError, match="torchrun"):
        GGPO(wrapped)
