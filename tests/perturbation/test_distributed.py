"""Two processes on gloo, or one on each GPU on NCCL, against one process on the same global batches."""

import pytest
import torch
from peft import LoraConfig
from torch import distributed

from lora_ggpo import GGPO, GGPOConfig
from tests.processes import spawn

from .distributed_run import ROWS, STEPS, data, parts, run, sgd, worlds
from .nets import TARGETS, loss_of

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch without distributed")

CONFIG = {"sigma": 0.2, "rule": "relative", "beta": 0.6, "gradient": "lstsq", "ema": 0.5}
CLOSE = {"rtol": 2e-5, "atol": 1e-6}


def one_process(config, adapter, parts_of_a_batch, clip=float("inf"), device="cpu"):
    """The same training in this process, each batch as `parts_of_a_batch` micro-batches."""
    model = parts(adapter).to(device)
    optimizer, ggpo, losses = sgd(model), GGPO(model, GGPOConfig(**config)), []
    for step in range(STEPS):
        losses.append(0.0)
        for micro in data(step).float().to(device).chunk(parts_of_a_batch):
            loss = loss_of(model(micro)) / parts_of_a_batch
            loss.backward()
            losses[-1] += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        ggpo.step()
        optimizer.zero_grad()
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {"losses": losses, "state": state, "ggpo": ggpo.state_dict()}


def read(folder, names, world):
    """What each of the processes has at the end of every case."""
    paths = {name: [folder / f"{name}-{rank}.pt" for rank in range(world)] for name in names}
    return {name: [torch.load(path, map_location="cpu", weights_only=True) for path in paths[name]] for name in names}


def assert_same_training(one, expected):
    assert one["losses"] == pytest.approx(expected["losses"], rel=2e-5)
    assert one["state"].keys() == expected["state"].keys()
    for key, value in expected["state"].items():
        torch.testing.assert_close(one["state"][key], value.cpu(), **CLOSE, msg=key)
    norms = {key: value for key, value in expected["ggpo"].items() if "norms" in key}
    assert len(norms) == 4
    for key, value in norms.items():
        torch.testing.assert_close(one["ggpo"][key], value.cpu(), rtol=1e-4, atol=1e-7, msg=key)


DORA = LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, use_dora=True)
CASES = {
    f"{name}-{ranks}": (kind, {**CONFIG, "ranks": ranks}, adapter)
    for name, kind, adapter in [("ddp", "ddp", None), ("fsdp", "fsdp", None), ("fsdp-dora", "fsdp", DORA)]
    for ranks in ("agree", "differ")
}


@pytest.fixture(scope="module", params=worlds(), ids=str)
def processes(request, tmp_path_factory):
    """The device, and what each process has at the end of every case."""
    (device, world), folder = request.param, tmp_path_factory.mktemp("distributed")
    spawn(run, (device, world, CASES, str(folder)), world)
    return device, read(folder, [*CASES, "rise"], world)


@pytest.mark.parametrize("name", CASES)
def test_processes_are_one_process_on_the_global_batch(name, processes):
    """Noise that agrees is one draw for the global batch; noise that differs is one for each process's micro-batch."""
    (kind, config, adapter), (device, found) = CASES[name], processes
    world = len(found[name])
    expected = one_process(config, adapter, 1 if config["ranks"] == "agree" else world, device=device)
    for one in found[name]:
        assert_same_training(one, expected)
    if kind == "fsdp":
        whole = max(p.numel() for p in parts(adapter).parameters())
        assert all(one["largest"] <= whole // world for one in found[name])  # what was compared was sharded indeed


def test_the_noise_matters():
    """Without noise the two runs above would agree whatever became of it."""
    noisy, plain = (one_process({**CONFIG, "sigma": sigma}, None, 1)["losses"] for sigma in (0.2, 0.0))
    assert abs(noisy[-1] - plain[-1]) > 1e-3 * abs(plain[-1])
    differ = one_process({**CONFIG}, None, 2)["losses"]
    assert abs(noisy[-1] - differ[-1]) > 1e-4 * abs(noisy[-1])
    assert ROWS % 2 == 0


def test_processes_steer_by_their_mean_rise(processes):
    states = processes[1]["rise"]
    mean = 0.1 + 0.1 * (len(states) - 1) / 2
    for factor, curvature, measured, _ in (state.tolist() for state in states):
        assert measured == pytest.approx(mean)
        assert curvature == pytest.approx(mean)
        assert factor == pytest.approx(max((0.05 / mean) ** 0.5, 0.5))
