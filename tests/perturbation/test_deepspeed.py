"""Processes under DeepSpeed ZeRO, two on gloo or one on each GPU on NCCL, against one on the same global batches."""

import socket

import pytest
from peft import LoraConfig
from torch import multiprocessing

from lora_ggpo import GGPO

from .distributed_run import parts, worlds
from .nets import TARGETS
from .test_distributed import CONFIG, DORA, assert_same_training, one_process, read

pytest.importorskip("deepspeed")

CUT = {"stage": 3, "stage3_param_persistence_threshold": 0}  # cuts even the smallest parameter
CONV1D = LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, fan_in_fan_out=True)
AGREE = {**CONFIG, "ranks": "agree"}
DIFFER = {**CONFIG, "ranks": "differ"}
ONE_DRAW = {**AGREE, "redraw": "optimizer-step"}
CLIP = 0.3  # below the norm of every step's gradient

# (ZeRO's settings, GGPO's, adapter, micro-batches a process, clipping)
CASES = {
    "1": ({"stage": 1}, DIFFER, None, 1, 0.0),
    "2": ({"stage": 2}, DIFFER, None, 1, 0.0),
    "2-clipped": ({"stage": 2}, AGREE, None, 1, CLIP),
    "2-accumulated": ({"stage": 2}, ONE_DRAW, None, 2, 0.0),
    "3": (CUT, DIFFER, None, 1, 0.0),
    "3-clipped": (CUT, AGREE, None, 1, CLIP),
    "3-accumulated": (CUT, ONE_DRAW, None, 2, 0.0),
    "3-dora": (CUT, AGREE, DORA, 1, 0.0),
    "3-conv1d": (CUT, AGREE, CONV1D, 1, 0.0),
    "3-small-kept-whole": ({"stage": 3}, AGREE, None, 1, 0.0),
}
TRAINER = (CUT, DIFFER, CLIP)


@pytest.fixture(scope="module", params=worlds(), ids=str)
def processes(request, tmp_path_factory):
    """The device, and what each process has at the end of every case."""
    from .deepspeed_run import run

    (device, world), folder = request.param, tmp_path_factory.mktemp("deepspeed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(run, (device, world, CASES, TRAINER, str(folder), port), nprocs=world)
    return device, read(folder, [*CASES, "trainer"], world)


@pytest.mark.parametrize("name", CASES)
def test_processes_are_one_process_on_the_global_batch(name, processes):
    (zero, config, adapter, _, clip), (device, found) = CASES[name], processes
    draws = 1 if config["ranks"] == "agree" else len(found[name])
    expected = one_process(config, adapter, draws, clip or float("inf"), device)
    for one in found[name]:
        assert_same_training(one, expected)
        assert (one["empty"] > 0) == (zero is CUT)  # what was compared was cut indeed


def test_trainer_under_zero_is_one_process_on_the_global_batch(processes):
    device, found = processes
    expected = one_process(DIFFER, None, len(found["trainer"]), CLIP, device)
    for one in found["trainer"]:
        assert_same_training(one, expected)


def test_clipping_matters():
    """Without it the clipped runs above would be the others, and norms read too late would look right."""
    clipped, free = (one_process(AGREE, None, 1, clip)["losses"] for clip in (CLIP, float("inf")))
    assert abs(clipped[-1] - free[-1]) > 1e-2 * abs(free[-1])


def test_without_its_optimizer_zero_is_refused():
    model = parts(None)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter._hp_mapping = None  # as stages 1 and 2 mark what they train
    with pytest.raises(ValueError, match=r"give GGPO the optimizer that deepspeed.initialize\(\)"):
        GGPO(model)
