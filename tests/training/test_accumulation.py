"""An optimizer step is the step of one full batch, in whatever micro-batches and processes its rows come."""

import json
import shutil
import socket
from importlib.util import find_spec

import pytest
import torch
from peft.tuners.lora.monteclora import BufferedMontecloraSampler
from torch import distributed

from lora_ggpo.methods.ascent import SAM
from lora_ggpo.methods.optimizers import Posterior
from lora_ggpo.methods.thin import MGPO, BiLoRA
from tests import processes
from tests.training.accumulation import (
    ADAM,
    CASES,
    IVON,
    METHODS,
    assert_same,
    by_hand,
    by_trainer,
    constant_draws,
    make_recipe,
    run_process,
    write_data,
)

# Rows of a micro-batch, micro-batches of a step. The last leaves a shorter last step, with a smaller last micro-batch.
SPLITS = [(32, 1), (8, 4), (5, 7)]
COMBINED = [(case, method) for case in CASES for method in METHODS if (case, method) != ("regression", "smoothed")]
# Every case has noise, and two are shown without it as well.
THOROUGH = [pair for pair in COMBINED if pair[1] != "ggpo" and pair[0] not in ("sft", "classification")]
THOROUGH.remove(("seq2seq-classification", "smoothed"))  # whose labels are not shifted


@pytest.fixture(scope="module")
def models(tiny_llama, tiny_t5, tmp_path_factory):
    """(decoder, encoder-decoder) without dropout, whose draws would differ with the batches."""
    copy = tmp_path_factory.mktemp("models") / "t5"
    shutil.copytree(tiny_t5, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"dropout_rate": 0.0}))
    return tiny_llama, str(copy)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("accumulation") / "data"
    write_data(folder)
    return folder


@pytest.mark.parametrize(
    ("case", "method"), [pytest.param(*pair, marks=[pytest.mark.thorough] * (pair in THOROUGH)) for pair in COMBINED]
)
def test_micro_batches_are_one_batch(models, data, case, method, tmp_path):
    expected = {}
    for batch, micro_batches in SPLITS:
        recipe = make_recipe(models, data, case, batch, micro_batches, METHODS[method])
        rows = batch * micro_batches
        if rows not in expected:
            expected[rows] = by_hand(recipe, tmp_path, rows)
        assert_same(by_trainer(recipe, tmp_path), expected[rows])


@pytest.mark.parametrize("ggpo", ["null", "{sigma: 0.2, rule: relative, beta: 0.5, redraw: optimizer-step}"])
def test_adalora_regularises_once_a_step(models, data, ggpo, tmp_path):
    """Its ranks are cut behind the first step, so one step it is."""
    settings = ["adapter.type=adalora", "adapter.init_lora_weights=true", f"ggpo={ggpo}"]
    recipe = make_recipe(models, data, "sft", 16, 4, settings)
    (loss, norm, _), expected = by_trainer(recipe, tmp_path), by_hand(recipe, tmp_path, 64)
    assert (loss, norm) == (pytest.approx(expected[0], rel=1e-5), pytest.approx(expected[1], rel=1e-5))


def test_monteclora_adds_its_divergence_once_a_step(models, data, tmp_path, monkeypatch):
    monkeypatch.setattr(BufferedMontecloraSampler, "get", constant_draws)
    settings = ["adapter.monteclora_config={num_samples: 3, sample_scaler: 0.1, kl_loss_weight: 0.01}", *ADAM]
    for batch, micro_batches in SPLITS:
        recipe = make_recipe(models, data, "sft", batch, micro_batches, settings)
        assert_same(by_trainer(recipe, tmp_path), by_hand(recipe, tmp_path, batch * micro_batches))


@pytest.mark.skipif(not find_spec("ivon"), reason="ivon-opt is not installed")
def test_ivon_draws_once_a_step(models, data, tmp_path):
    for batch, micro_batches in SPLITS:
        recipe = make_recipe(models, data, "sft", batch, micro_batches, IVON)
        expected = by_hand(recipe, tmp_path, batch * micro_batches, lambda _, optimizer: Posterior(optimizer, 0))
        assert_same(by_trainer(recipe, tmp_path), expected)


@pytest.mark.parametrize(("batch", "micro_batches"), SPLITS)
def test_mgpo_follows_the_gradient_of_each_micro_batch(models, data, batch, micro_batches, tmp_path):
    recipe = make_recipe(models, data, "classification", batch, micro_batches, ["mgpo.rho=0.5", *ADAM])
    expected = by_hand(recipe, tmp_path, batch * micro_batches, lambda *of: MGPO(*of, rho=0.5), batch)
    assert_same(by_trainer(recipe, tmp_path), expected)


def test_bi_lora_ascends_once_a_step(models, data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", lambda weight, **_: torch.nn.init.eye_(weight))
    for batch, micro_batches in SPLITS:
        recipe = make_recipe(models, data, "sft", batch, micro_batches, ["bi_lora={rho: 0.5, rank: 3}", *ADAM])
        expected = by_hand(recipe, tmp_path, batch * micro_batches, lambda *of: BiLoRA(*of, rho=0.5, rank=3))
        assert_same(by_trainer(recipe, tmp_path), expected)


SAM_IN = {space: f"sam={{rho: 0.5, space: {space}}}" for space in ("adapter", "weights")}


@pytest.mark.parametrize("space", SAM_IN)
def test_sam_moves_for_each_micro_batch(models, data, space, tmp_path):
    recipe = make_recipe(models, data, "classification", 5, 7, [SAM_IN[space]])
    assert_same(by_trainer(recipe, tmp_path), by_hand(recipe, tmp_path, 35, sam(space), 5))


def sam(space):
    return lambda model, _: SAM(model, rho=0.5, space=space)


TOGETHER = [pair for pair in COMBINED if pair not in THOROUGH and (pair[1] != "smoothed" or pair[0] == "sft")]
PROCESSES = {f"{case}-{method}": (case, 4, 4, METHODS[method]) for case, method in TOGETHER if case != "packed"}
PROCESSES |= {f"sam-{space}": ("classification", 4, 4, [SAM_IN[space]]) for space in SAM_IN}
if find_spec("ivon"):
    PROCESSES["ivon"] = ("classification", 4, 4, IVON)
AGREE = {name: ("classification", 4, 4, [f"{name}.rho=0.5", *ADAM]) for name in ("mgpo", "bi_lora")}
# Of packed rows there are not two full steps, and accelerate takes some twice so that all processes have as many.
PROCESSES["packed"] = ("packed", 4, 4, ["training.max_steps=1"])


@pytest.fixture(scope="module")
def together(models, data, tmp_path_factory):
    """What both of two processes have at the end of each case."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cases = PROCESSES | AGREE
    processes.spawn(run_process, (models, data, folder, cases, port), 2)
    return {name: [torch.load(folder / f"{name}-{rank}.pt") for rank in (0, 1)] for name in cases}


@pytest.mark.skipif(not distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("name", PROCESSES)
def test_processes_are_one_batch(models, data, together, name, tmp_path):
    """Steps of 2 processes x 4 micro-batches x 4 rows."""
    recipe = make_recipe(models, data, *PROCESSES[name])
    ascent = (sam(recipe.sam.space), 8) if recipe.sam else ()
    ascent = (lambda _, optimizer: Posterior(optimizer, 0),) if recipe.optimizer else ascent
    expected = by_hand(recipe, tmp_path, 32, *ascent)
    for found in together[name]:
        assert_same(found, expected)


@pytest.mark.skipif(not distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("name", AGREE)
def test_processes_that_move_weights_of_their_own_agree(together, name):
    (*_, one), (*_, other) = together[name]
    assert one.keys() == other.keys()
    assert all(torch.equal(weight, other[key]) for key, weight in one.items())
