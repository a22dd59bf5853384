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
    rises, slopes = benchmark.pairs(model, batch, GGPOConfig(sigma=0.1, seed=1), range(3))
    assert len(set(rises)) == len(set(slopes)) == 3
    assert (rises, slopes) == benchmark.pairs(model, batch, GGPOConfig(sigma=0.1, seed=1), range(3))
    assert (rises[1:], slopes[1:]) == benchmark.pairs(model, batch, GGPOConfig(sigma=0.1, seed=1), range(1, 3))
    assert benchmark.pairs(model, batch, GGPOConfig(sigma=0.0), range(2)) == ([0.0, 0.0], [0.0, 0.0])


def test_slope_is_of_first_order_and_rise_of_second(benchmark, model_and_batch):
    """Twice the same noise: twice the slope and four times the rise, which only W + eps and W - eps together give."""
    model, batch = model_and_batch
    benchmark.without_dropout(model.double())
    (rise, slope), (rise_of_twice, slope_of_twice) = (
        [values[0] for values in benchmark.pairs(model, batch, GGPOConfig(sigma=sigma, beta=0.0, seed=1), range(1))]
        for sigma in (1e-3, 2e-3)
    )
    assert slope_of_twice == pytest.approx(2 * slope, rel=1e-2)
    assert rise_of_twice == pytest.approx(4 * rise, rel=1e-2)


def test_a_rise_is_not_measured_beside_dropout(benchmark, model_and_batch):
    model, batch = model_and_batch
    model.train()
    with pytest.raises(RuntimeError, match="something else is random"):
        benchmark.pairs(model, batch, GGPOConfig(sigma=0.1), range(1))


def test_factored_noise_is_held_against_all_dense_draws(benchmark):
    """A kind of twice the rise is told from dense noise, and one of the same values is not."""
    values = torch.randn(40, generator=torch.Generator().manual_seed(0)).add(5).tolist()
    twice = [2 * value for value in values]
    chunks = [
        {"sigma": sigma, "noise": kind, "first": 0, "rise": twice if kind == "factored, k = 1" else values}
        for sigma in benchmark.SIGMAS
        for kind in benchmark.KINDS
    ]
    rows = benchmark.compared([{**chunk, "slope": values} for chunk in chunks])
    first, eighth = (next(r for r in rows if r["noise"] == f"factored, k = {k}") for k in (1, 8))
    assert first["ratio"] == pytest.approx(2)
    assert first["ratio"] - first["ratio_half"] > 1
    assert first["welch_p_holm"] < 1e-6
    assert first["ks_rise_p_holm"] < 1e-6
    assert first["ks_slope_p"] == 1
    assert eighth["ratio"] == pytest.approx(1)
    assert eighth["welch_p_holm"] == 1
