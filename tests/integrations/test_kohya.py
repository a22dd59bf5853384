"""sd-scripts: the network module in its training loop, with a stand-in of the same signatures and with its own code."""

import os
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_ggpo.integrations import kohya
from lora_ggpo.perturbation.own import _PARTS
from lora_ggpo.perturbation.scales import ESTIMATORS

from . import sd_scripts
from .surfaces import CLOSE, check_noise, weight_norms


# The names of these classes are those that sd-scripts looks for.
class Transformer2DModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 12), nn.Linear(6, 6)

    def forward(self, x, states):
        q, v = self.qkv(x).chunk(2, -1)
        return x + self.out(torch.tanh(q + states.mean(1, keepdim=True)) * v)


class ResnetBlock2D(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x):
        return x + torch.tanh(self.conv(x))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.attention = ResnetBlock2D(), Transformer2DModel()
        self.reentrant = None  # keeps activations; else gradient checkpointing, of this kind

    def forward(self, x, states):
        x = self._call(self.block, x.requires_grad_())
        return self._call(self.attention, x.flatten(2).transpose(1, 2), states)

    def _call(self, part, *inputs):
        return part(*inputs) if self.reentrant is None else checkpoint(part, *inputs, use_reentrant=self.reentrant)


class CLIPMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(6, 6)

    def forward(self, x):
        return torch.tanh(self.fc1(x))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.mlp = nn.Embedding(9, 6), CLIPMLP()

    def forward(self, tokens):
        return self.mlp(self.embedding(tokens))


NETWORKS = {"stand-in": sd_scripts.stub, "sd-scripts": sd_scripts.real}


@pytest.fixture(params=NETWORKS)
def networks(request, monkeypatch):
    """``networks.lora``, as it is imported in sd-scripts' process."""
    modules = NETWORKS[request.param]()
    if modules is None:
        pytest.skip("SD_SCRIPTS names no copy of sd-scripts")
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    before = dict(_PARTS)
    yield modules["networks.lora"]
    _PARTS.clear()
    _PARTS.update(before)


def models(dtype=torch.float32):
    torch.manual_seed(0)
    return Encoder().to(dtype), UNet().to(dtype)


def batches(count, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    draw = {"generator": generator, "dtype": dtype}
    return [(torch.randint(9, (2, 4), generator=generator), torch.randn(2, 6, 4, 4, **draw)) for _ in range(count)]


def build(module, dtype=torch.float32, steps=8, **settings):
    """A network of rank 2 on a text encoder and a denoiser, with convolutions, its B away from 0."""
    encoder, unet = models(dtype)
    torch.manual_seed(1)
    network = module.create_network(1.0, 2, 3.0, None, encoder, unet, None, dropout=None, conv_dim="2", **settings)
    if hasattr(network, "prepare_network"):
        network.prepare_network(sd_scripts.arguments(steps))
    network.apply_to(encoder, unet, True, True)
    for name, parameter in network.named_parameters():
        if "lora_up" in name:
            nn.init.normal_(parameter, std=0.3)
    return network.to(dtype), encoder, unet


NOISY = {"ggpo_sigma": "0.2", "ggpo_rule": "relative", "ggpo_beta": "0.5"}


def test_each_layer_is_perturbed_and_sigma_zero_is_sd_scripts_own(networks):
    plain, *rest = build(networks)
    own = sd_scripts.train(plain, *rest, batches(4))
    zero, *rest = build(kohya, ggpo_sigma="0")
    assert sd_scripts.train(zero, *rest, batches(4)) == own
    for name, value in plain.state_dict().items():
        assert torch.equal(zero.state_dict()[name], value), name

    noisy, *rest = build(kohya, **NOISY)
    losses = sd_scripts.train(noisy, *rest, batches(4))
    assert all(a != b for a, b in zip(losses, own, strict=True))
    assert [sorted(layer.name for layer in ggpo.layers) for ggpo in noisy.ggpos] == [
        ["mlp.fc1"],
        ["attention.out", "attention.qkv", "block.conv"],
    ]
    assert [ggpo.metrics()["ggpo/coverage"] for ggpo in noisy.ggpos] == [1, 1]


def test_the_noise_is_exact_and_absent_where_nothing_trains(networks):
    network, encoder, unet = build(kohya, torch.float64, **NOISY)
    (tokens, picture), *_ = batches(1, torch.float64)
    plain = unet(picture, encoder(tokens))
    network.train()
    network.on_step_start(encoder.eval(), unet.eval())
    for ggpo in network.ggpos:
        for layer in ggpo.layers:
            check_noise(layer, images=(4, 4))
    assert not torch.equal(unet(picture, encoder(tokens)), plain)
    with torch.no_grad():
        assert torch.equal(unet(picture, encoder(tokens)), plain)
    network.eval()
    assert torch.equal(unet(picture, encoder(tokens)), plain)


def test_an_optimizer_step_is_counted_once_and_norms_are_logged(networks):
    network, encoder, unet = build(kohya, **NOISY)
    seen = {}
    sd_scripts.train(network, encoder, unet, batches(6), accumulate=2, seen=seen)
    assert [ggpo._steps for ggpo in network.ggpos] == [3, 3]
    assert [ggpo._forwards for ggpo in network.ggpos] == [6, 6]
    _, gradients, weights = seen["logged"][-1]
    assert gradients.shape == weights.shape == (4,)
    assert (gradients > 0).all()
    layer = network.ggpos[1].layers[0]
    expected = layer.base.weight.flatten(1).norm(dim=1).mean()
    assert weights.min() > 0
    assert abs(weights - expected).min() < 0.5 * expected


def test_norms_are_those_of_all_micro_batches_before_clipping(networks):
    """||G_i|| is the estimate from the gradients as they were accumulated: clipping to 1e-3 changes nothing of it."""
    found = []
    for clip in (1e-3, 1e3):
        network, encoder, unet = build(kohya, ggpo_sigma="1e-9", ggpo_beta="0.5")
        seen = {}
        sd_scripts.train(network, encoder, unet, batches(2), accumulate=2, clip=clip, lr=1e-12, seen=seen)
        found.append(seen["logged"][-1][1])
    torch.testing.assert_close(found[0], found[1])


def test_norms_are_those_of_all_processes(networks):
    """The loop writes the mean over processes behind GGPO's back: norms follow it, here to a third."""
    found = []
    for mean in (None, lambda gradient: gradient / 3):
        network, encoder, unet = build(kohya, ggpo_sigma="1e-9", ggpo_beta="0.5")
        seen = {}
        sd_scripts.train(network, encoder, unet, batches(1), lr=1e-12, seen=seen, mean=mean)
        found.append(seen["logged"][-1][1])
    torch.testing.assert_close(found[0], 3 * found[1])


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(networks, reentrant):
    """What runs again in the backward pass, in a model in evaluation mode, has the noise of its forward pass."""
    found = []
    for kind in (None, reentrant):
        network, encoder, unet = build(kohya, torch.float64, **NOISY)
        unet.reentrant = kind
        losses = sd_scripts.train(network, encoder, unet, batches(3, torch.float64))
        found.append((losses, list(network.parameters())))
    torch.testing.assert_close(found[0], found[1], **CLOSE)


def test_saved_weights_are_sd_scripts_own(networks, tmp_path):
    network, encoder, unet = build(kohya, **NOISY)
    sd_scripts.train(network, encoder, unet, batches(2))
    network.save_weights(str(tmp_path / "own.pt"), torch.float32, None)
    saved = torch.load(tmp_path / "own.pt")
    assert saved.keys() == build(networks)[0].state_dict().keys()
    other, encoder, unet = build(networks)
    other.load_weights(str(tmp_path / "own.pt"))
    for name, value in other.state_dict().items():
        assert torch.equal(value, network.state_dict()[name]), name

    file = str(tmp_path / "own.pt")
    again, weights = kohya.create_network_from_weights(1.0, file, None, [Encoder()], UNet(), for_inference=True)
    assert not isinstance(again, kohya.NoisyNetwork)
    assert weights.keys() == saved.keys()
    again, _ = kohya.create_network_from_weights(1.0, file, None, [Encoder()], UNet(), **NOISY)
    assert isinstance(again, kohya.NoisyNetwork)
    assert again.is_mergeable()


def test_a_resumed_run_is_the_uninterrupted_one(networks, tmp_path):
    settings = {**NOISY, "ggpo_schedule": "linear", "ggpo_ema": "0.5"}
    network, *rest = build(kohya, **settings)
    whole = sd_scripts.train(network, *rest, batches(8), accumulate=2, seen={"save": (tmp_path / "state", 4)})
    network, *rest = build(kohya, **settings)
    resumed = sd_scripts.train(network, *rest, batches(8)[4:], accumulate=2, seen={"resume": tmp_path / "state"})
    assert resumed == whole[4:]
    network, *rest = build(kohya, **settings)
    assert sd_scripts.train(network, *rest, batches(8)[4:], accumulate=2) != whole[4:]


@pytest.mark.parametrize("networks", ["stand-in"], indirect=True)
def test_split_queries_keys_and_values(networks):
    network, encoder, unet = build(kohya, torch.float64, split_qkv="True", **NOISY)
    sd_scripts.train(network, encoder, unet, batches(2, torch.float64))
    layer = next(layer for layer in network.ggpos[1].layers if layer.name == "attention.qkv")
    lora = layer.adapter
    products = [up.weight @ down.weight for down, up in zip(lora.lora_down, lora.lora_up, strict=True)]
    dense = layer.base.weight + lora.scale * torch.cat(products)
    torch.testing.assert_close(weight_norms(layer), dense.detach().square().sum(1), **CLOSE)
    check_noise(layer)
    assert network.ggpos[1].state_dict()["gradient_norms_squared.attention.qkv"].any()


def test_the_loss_scale_is_that_of_the_loop_that_calls():
    def loop(scale):
        accelerator = type("Accelerator", (), {"scaler": None})
        if scale:
            accelerator.scaler = type("Scaler", (), {"get_scale": staticmethod(lambda: scale)})
        return called(), accelerator

    def called():
        return kohya._loss_scale(sys._getframe())

    assert loop(None)[0] == 1.0
    assert loop(1024.0)[0] == 1024.0


def test_settings_come_as_text():
    given = {"ggpo_sigma": "1e-2", "ggpo_noise": "dense", "ggpo_strict": "true", "ggpo_rise": "None", "ggpo_seed": "3"}
    config, rest = kohya._settings({**given, "conv_dim": "4", "dropout": None})
    assert rest == {"conv_dim": "4", "dropout": None}
    assert (config.sigma, config.noise, config.strict, config.rise, config.seed) == (0.01, "dense", True, None, 3)
    assert kohya._settings({"ggpo_gradient": "lstsq"})[0].gradient in ESTIMATORS
    with pytest.raises(ValueError, match="GGPOConfig has no field 'sigmas'"):
        kohya._settings({"ggpo_sigmas": "1"})
    with pytest.raises(ValueError, match="sigma must be a finite number"):
        kohya._settings({"ggpo_sigma": "much"})


def test_the_network_is_the_one_of_the_model():
    for name, expected in {"flux_models": "lora_flux", "sd3_models": "lora_sd3", "sdxl_original_unet": "lora"}.items():
        cls = type("Model", (), {"__module__": f"library.{name}"})
        assert kohya._NETWORKS.get(type(cls()).__module__.rpartition(".")[2], "lora") == expected


@pytest.mark.skipif("SD_SCRIPTS" not in os.environ, reason="SD_SCRIPTS names no copy of sd-scripts")
@pytest.mark.parametrize("networks", ["sd-scripts"], indirect=True)
def test_flux_of_sd_scripts(networks):
    """Its own transformer and its own network for it, which has a GGPO of its own."""
    from library import flux_models

    torch.manual_seed(0)
    sizes = {"in_channels": 4, "vec_in_dim": 6, "context_in_dim": 6, "hidden_size": 16, "mlp_ratio": 2.0, "theta": 100}
    shape = {"num_heads": 2, "depth": 1, "depth_single_blocks": 1, "axes_dim": [2, 2, 4], "qkv_bias": True}
    flux = flux_models.Flux(flux_models.FluxParams(**sizes, **shape, guidance_embed=False)).double()
    flux.requires_grad_(False)
    network = kohya.create_network(1.0, 2, 3.0, None, [None, None], flux, **NOISY)
    network.apply_to([], flux, False, True)
    network.double().train()
    inputs = {
        "img": torch.randn(1, 5, 4),
        "img_ids": torch.zeros(1, 5, 3),
        "txt": torch.randn(1, 3, 6),
        "txt_ids": torch.zeros(1, 3, 3),
        "timesteps": torch.tensor([0.3]),
        "y": torch.randn(1, 6),
    }
    inputs = {key: value.double() for key, value in inputs.items()}
    plain = flux(**inputs)
    for _ in range(2):
        network.on_step_start([], flux)
        noisy = flux(**inputs)
        noisy.square().mean().backward()
        network.update_grad_norms()
        network.zero_grad()
    assert not torch.equal(noisy, plain)
    network.count_step()
    (ggpo,) = network.ggpos
    assert len(ggpo.layers) == len(network.unet_loras)
    assert ggpo.metrics()["ggpo/coverage"] == 1
    for layer in ggpo.layers[:3]:
        check_noise(layer)
