"""Before the benchmark of the noise measures a rise of the loss, it is zero where it must be."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch

from lora_ggpo import GGPOConfig
from lora_ggpo.models.adapters import add_adapter
from lora_ggpo.models.architecture import HEADED

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "noise_quality.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("noise_quality", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model_and_batch(minilm):
    model, tokenizer = minilm
    adapted = add_adapter(copy.deepcopy(model), {"r": 4, "target_modules": "all-linear"}, HEADED)
    batch = {**tokenizer(["a fine film", "dull and long"], return_tensors="pt", padding=True)}
    return adapted, {**batch, "labels": torch.tensor([1, 0])}


def test_the_model_has_dropout_that_nn_dropout_does_not_hold(model_and_batch):
    """The flaw that the mode below mends: attention drops out although every nn.Dropout is off."""
    model, batch = model_and_batch
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    assert len({model(**batch).loss.item() for _ in range(4)}) > 1


def test_passes_without_noise_are_bit_equal(benchmark, model_and_batch):
    model, batch = model_and_batch
    benchmark.without_dropout(model)
    assert len({model(**batch).loss.item() for _ in range(4)}) == 1


def test_noise_is_there_and_is_the_only_chance(benchmark, model_and_batch):
    model, batch = model_and_batch
    benchmark.without_dropout(model)
    rises = benchmark.rises(model, batch, GGPOConfig(sigma=0.1, seed=1), draws=3)
    again = benchmark.rises(model, batch, GGPOConfig(sigma=0.1, seed=1), draws=3)
    assert len(set(rises)) == 3
    assert rises.tolist() == again.tolist()
    assert benchmark.rises(model, batch, GGPOConfig(sigma=0.0), draws=2).tolist() == [0.0, 0.0]


def test_a_rise_is_not_measured_beside_dropout(benchmark, model_and_batch):
    model, batch = model_and_batch
    model.train()
    with pytest.raises(RuntimeError, match="something else is random"):
        benchmark.rises(model, batch, GGPOConfig(sigma=0.1), draws=1)
