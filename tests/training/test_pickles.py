"""No pickle is read from anywhere: neither adapters, models nor checkpoints."""

import pickle
import shutil

import pytest
import torch

from lora_ggpo.training import checkpoints
from tests.training.runs import USES, invoke, refused

NO_TENSORS = "checkpoint-{} holds more or less than tensors and is not read; delete it"


class Payload:
    """What touches `path` when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture(params=["torch", "pickle"])
def plant(request, tmp_path):
    """Writes a file that touches a marker where somebody unpickles it, and afterwards looks for the marker."""
    marker, planted = tmp_path / "marker", []

    def plant(file):
        if request.param == "torch":
            torch.save({"weight": torch.zeros(1), "more": Payload(marker)}, file)
        else:
            file.write_bytes(pickle.dumps(Payload(marker), protocol=2))
        planted.append(file)

    yield plant
    assert planted
    assert not marker.exists()
    for file in planted:
        if file.exists():  # and it would have worked
            with file.open("rb") as opened:
                torch.load(opened, weights_only=False) if request.param == "torch" else pickle.load(opened)
            assert marker.exists()


@pytest.mark.parametrize("use", ["eval", "merge", "chat", "sharpness"])
@pytest.mark.parametrize("instead", [True, False])
def test_no_pickle_in_an_adapter_is_read(copy, use, instead, plant, tmp_path):
    for name in ("adapter_model.bin", "pytorch_model.bin", "training_args.bin"):
        plant(copy / "adapter" / name)
    if instead:
        shutil.move(copy / "adapter" / "adapter_model.safetensors", copy / "adapter" / "other.safetensors")
        refused(invoke(*USES[use](copy, tmp_path / "out")), "adapter_model.safetensors is missing")
    elif use != "sharpness":  # that takes a while, and reads the run as the others do
        result = invoke(*USES[use](copy, tmp_path / "out"))
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize("instead", [True, False])
def test_no_pickle_in_a_model_is_read(tiny_llama, whole, instead, plant, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "tokenizer.pkl"):
        plant(model / name)
    shutil.copy(whole[1] / "adapter" / "adapter_config.json", model)
    if instead:
        (model / "model.safetensors").unlink()
    for command in (["chat", model], ["train", whole[0], f"model={model}", f"output={tmp_path / 'runs'}"]):
        refused(invoke(*command), f"{model}")


STATE = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


@pytest.mark.parametrize(("step", "names"), [(4, STATE), *((3, [name]) for name in STATE)])
def test_no_pickle_in_a_checkpoint_is_read(whole, unfinished, step, names, plant):
    """Whoever plants it can make the seal as well: it is the loading that has to be safe."""
    folder = unfinished / "checkpoints"
    if step == 3:
        shutil.rmtree(folder / "checkpoint-4")
    for name in names:
        plant(folder / f"checkpoint-{step}" / name)
    checkpoints.seal(folder / f"checkpoint-{step}", None)
    result = invoke("train", whole[0], f"output={unfinished.parent}")
    if step == 3:
        refused(result, NO_TENSORS.format(step))
    else:  # all steps done, nothing but the weights is of use
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize("step", [3, 4])
def test_no_pickle_in_place_of_a_checkpoint_s_weights_is_read(whole, unfinished, step, plant):
    folder = unfinished / "checkpoints"
    if step == 3:
        shutil.rmtree(folder / "checkpoint-4")
    plant(folder / f"checkpoint-{step}" / "adapter_model.bin")
    (folder / f"checkpoint-{step}" / "adapter_model.safetensors").unlink()
    checkpoints.seal(folder / f"checkpoint-{step}", None)
    refused(invoke("train", whole[0], f"output={unfinished.parent}"), NO_TENSORS.format(step))
