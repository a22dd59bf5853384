"""LoRA classes of other libraries, with the lines that docs/layers.md shows for them."""

import pytest
import torch
from torch import nn

from lora_ggpo import GGPO, GGPOConfig
from lora_ggpo.perturbation.own import _PARTS

from .surfaces import CLOSE, assert_documented, check_noise, run_block, weight_norms

CONFIG = GGPOConfig(sigma=0.3, rule="relative", beta=0.5)


@pytest.fixture(autouse=True)
def registered():
    before = dict(_PARTS)
    yield
    _PARTS.clear()
    _PARTS.update(before)


def train(model, x):
    """Two steps with noise on each layer of a model that is its own again afterwards; returns its perturbed layers."""
    plain = model(x)
    ggpo = GGPO(model, GGPOConfig(sigma=0.0))
    assert torch.equal(model(x), plain)
    ggpo = GGPO(model, CONFIG)
    optimizer = torch.optim.SGD([p for layer in ggpo.layers for p in layer.trained()], lr=0.1)
    for _ in range(2):
        y = model(x)
        assert not torch.equal(y, plain)
        y.square().mean().backward()
        optimizer.step()
        ggpo.step()
        optimizer.zero_grad()
    assert ggpo.metrics()["ggpo/coverage"] == 1
    norms = [value for name, value in ggpo.state_dict().items() if name.startswith("gradient")]
    assert len(norms) == len(ggpo.layers)
    assert all(value.any() for value in norms)
    for layer in ggpo.layers:
        check_noise(layer)
    with torch.no_grad():
        trained = model(x)
    ggpo.detach()
    assert torch.equal(model(x), trained)
    return {layer.name: layer for layer in ggpo.layers}


class TestLitGPT:
    @pytest.fixture(autouse=True)
    def lora(self):
        self.lora = pytest.importorskip("litgpt.lora")
        run_block("layers.md", "LitGPT")

    @pytest.mark.parametrize("parts", [(True, True, True), (True, False, True)], ids=str)
    @pytest.mark.parametrize("groups", [4, 2])
    def test_queries_keys_and_values_in_one_layer(self, parts, groups):
        torch.manual_seed(0)
        shape = {"head_size": 4, "n_head": 4, "n_query_groups": groups}
        layer = self.lora.LoRAQKVLinear(
            16, 16 + 8 * groups, **shape, r=3, lora_alpha=5, enable_lora=parts, bias=True
        ).double()
        nn.init.normal_(layer.lora_B, std=0.3)
        seen = train(nn.Sequential(layer), torch.randn(2, 5, 16, dtype=torch.float64))
        dense = layer.linear.weight + layer.get_lora_AB()
        torch.testing.assert_close(weight_norms(seen["0"]), dense.square().sum(1), check_dtype=False, **CLOSE)

    def test_the_whole_model(self):
        torch.manual_seed(0)
        names = ("query", "key", "value", "projection", "mlp", "head")
        config = self.lora.Config(
            **{"n_layer": 2, "n_embd": 16, "n_head": 4, "n_query_groups": 2, "block_size": 16, "vocab_size": 32},
            **{"mlp_class_name": "LLaMAMLP", "intermediate_size": 24, "norm_class_name": "RMSNorm", "bias": False},
            **{"lora_r": 2, "lora_alpha": 4, "lora_dropout": 0.0},
            **{f"lora_{name}": name != "key" for name in names},
        )
        model = self.lora.GPT(config).double()
        self.lora.mark_only_lora_as_trainable(model)
        adapted = [name for name, one in model.named_modules() if isinstance(one, self.lora.LoRALayer)]
        seen = train(model, torch.randint(32, (2, 8)))
        assert sorted(seen) == sorted(adapted)
        assert_documented("LitGPT", "litgpt")


class TestLycoris:
    @pytest.fixture(autouse=True)
    def lycoris(self):
        self.lycoris = pytest.importorskip("lycoris")
        run_block("layers.md", "LyCORIS")

    @pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr"])
    def test_linear_layers_and_convolutions(self, algorithm):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Flatten(2), nn.Linear(9, 4)).double()
        model.requires_grad_(False)
        self.lycoris.LycorisNetwork.apply_preset({"target_module": ["Conv2d", "Linear"]})
        settings = {"linear_dim": 4, "linear_alpha": 2.0, "conv_dim": 4, "conv_alpha": 2.0}
        network = self.lycoris.create_lycoris(model, 1.0, algo=algorithm, **settings)
        network.apply_to()
        network.double()
        for parameter in network.parameters():
            if parameter.count_nonzero() == 0:
                nn.init.normal_(parameter, std=0.3)
            parameter.requires_grad_()
        seen = train(model, torch.randn(2, 3, 5, 6, dtype=torch.float64))
        assert sorted(seen) == ["0", "2"]
        assert_documented("LyCORIS", "lycoris-lora")
        for layer in seen.values():
            expected = layer.base.weight
            if algorithm == "lora":
                expected = expected + layer.adapter.get_diff_weight()[0]
            norms = expected.flatten(1).square().sum(1)
            torch.testing.assert_close(weight_norms(layer), norms, check_dtype=False, **CLOSE)
