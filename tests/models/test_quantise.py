"""QLoRA runs: MiniLM with its linear layers in 4 and 8 bits, a few steps."""

import functools
import hashlib

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from lora_ggpo.cli import app
from lora_ggpo.errors import UserError
from lora_ggpo.models.adapters import count_parameters
from lora_ggpo.models.architecture import HEADED, label_head
from lora_ggpo.models.load import load_model
from lora_ggpo.models.quantise import Quantisation
from lora_ggpo.perturbation.weights import _dequantise
from lora_ggpo.recipe.recipe import load_recipe
from lora_ggpo.sharpness.point import load_point
from lora_ggpo.training.callbacks import RunCallback
from lora_ggpo.training.forecast import forecast
from lora_ggpo.training.merge import merge_run
from lora_ggpo.training.reuse import evaluate_run, load_trained
from lora_ggpo.training.run import train
from lora_ggpo.workspace.progress import Reporter
from tests.recipes import write_guided

bnb = pytest.importorskip("bitsandbytes")

QUIET = Reporter(quiet=True)
CLASSES = {"nf4": bnb.nn.Linear4bit, "int8": bnb.nn.Linear8bitLt}
SHORT = ("model=minilm", "training.max_steps=8", "adapter.lora_dropout=0", "data.label_noise=0", "validate_every=null")
SHORT += ("data.train_size=24", "task.max_length=12")


@functools.cache
def _load(kind, **settings):
    quantisation = Quantisation(kind, torch.float32, torch.device("cpu"), **settings)
    torch.manual_seed(0)
    return load_model("minilm", HEADED, label_head(["negative", "positive"]), quantisation=quantisation)[0]


def _bytes(model):
    """Digest of each base weight as it is stored."""
    layers = {name.replace(".base_layer", ""): m for name, m in model.named_modules() if type(m) in CLASSES.values()}
    return {
        name.removeprefix("base_model.model."): hashlib.sha256(layer.weight.data.numpy().tobytes()).hexdigest()
        for name, layer in layers.items()
    }


@pytest.fixture(scope="module")
def runs(reviews, tmp_path_factory):
    """{kind: (run, digests of the base weights after training)}"""
    made, after = {}, []

    def watch(self, args, state, control, **kwargs):
        after.append(_bytes(kwargs["model"]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunCallback, "on_train_end", watch)
        for kind in CLASSES:
            file = write_guided(tmp_path_factory.mktemp(kind), "minilm", reviews)
            recipe = load_recipe(file, [*SHORT, f"quantise={kind}"])
            made[kind] = (train(recipe, QUIET)[0], after[-1])
    return made


@pytest.mark.parametrize("kind", CLASSES)
def test_all_linear_layers_but_the_head_are_quantised(kind, minilm):
    model = _load(kind)
    linear = {name for name, part in minilm[0].named_modules() if type(part) is nn.Linear}
    quantised = {name for name, part in model.named_modules() if type(part) is CLASSES[kind]}
    assert linear - quantised == {"classifier"}
    assert type(model.classifier) is nn.Linear
    assert torch.equal(model.classifier.weight, minilm[0].classifier.weight)
    assert count_parameters(model) == (0, sum(p.numel() for p in minilm[0].parameters()))
    for name in sorted(quantised)[:3]:
        exact = minilm[0].get_submodule(name).weight.detach()
        error = _dequantise(model.get_submodule(name)).float() - exact
        assert 1e-4 < error.norm() / exact.norm() < (0.12 if kind == "nf4" else 0.02)


@pytest.mark.parametrize("kind", CLASSES)
def test_training_learns_and_leaves_the_quantised_weights(kind, runs):
    run, after = runs[kind]
    losses = [row["loss"] for row in run.log if "loss" in row]
    assert len(losses) == 8
    assert sum(losses[-3:]) < sum(losses[:3])
    assert run.log[0]["ggpo/relative_noise"] == pytest.approx(0.05, rel=1e-3)
    assert after == _bytes(_load(kind))
    assert len(after) == 37
    factors = load_file(run.folder / "adapter" / "adapter_model.safetensors")
    assert all(tensor.abs().max() > 0 for name, tensor in factors.items() if "lora_B" in name)
    assert run.metrics["training"]["parameters"] > 22_700_000


@pytest.mark.parametrize("kind", CLASSES)
def test_evaluation_loads_the_same_quantised_model(kind, runs):
    run, after = runs[kind]
    model = load_trained(run.folder)[0]
    assert _bytes(model) == after
    assert evaluate_run(run.folder, reporter=QUIET) == run.metrics["evaluation"]


def test_merging_is_into_unquantised_weights(runs, tmp_path):
    run, _ = runs["nf4"]
    difference, largest, quantised = merge_run(run.folder, tmp_path / "merged")
    assert difference < 1e-5 * max(1, largest)
    assert quantised[0] == "nf4"
    assert difference < quantised[1] < largest
    printed = CliRunner().invoke(app, ["merge", str(run.folder), str(tmp_path / "again")]).stdout
    assert f"from the run's, whose model was in nf4, by at most {quantised[1]:.1e}." in printed
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged["bert.encoder.layer.0.intermediate.dense.weight"].dtype == torch.float32


def test_no_sharpness_is_measured_around_quantised_weights(runs):
    with pytest.raises(UserError, match="was trained on weights in int8, around which no sharpness is measured"):
        load_point(runs["int8"][0].folder, "weights", "train", 8)


def test_an_interrupted_run_goes_on(runs, recipe_file, monkeypatch):
    step_end = RunCallback.on_step_end

    def cut(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise SystemError("power cut")
        return step_end(self, args, state, control, **kwargs)

    recipe = load_recipe(recipe_file, [*SHORT, "quantise=nf4"])
    with monkeypatch.context() as patch:
        patch.setattr(RunCallback, "on_step_end", cut)
        with pytest.raises(SystemError):
            train(recipe, QUIET)
    run = train(recipe, QUIET)[0]
    whole = runs["nf4"][0]
    assert [row["loss"] for row in run.log if "loss" in row] == [row["loss"] for row in whole.log if "loss" in row]
    assert run.metrics["evaluation"] == whole.metrics["evaluation"]


def test_gradient_checkpointing_and_bf16(recipe_file):
    settings = [*SHORT, "quantise=nf4", "training.gradient_checkpointing=true", "precision=bf16"]
    few = ["training.max_steps=2", "training.per_device_train_batch_size=2", "data.train_size=8"]
    run = train(load_recipe(recipe_file, [*settings, *few]), QUIET)[0]
    assert all(0 < row["grad_norm"] < 100 for row in run.log if "loss" in row)


def test_a_plan_counts_the_parameters_that_quantised_weights_stand_for(runs, recipe_file):
    recipe = load_recipe(recipe_file, [*SHORT, "quantise=nf4", "training.per_device_train_batch_size=2"])
    found = forecast(recipe, 1, QUIET)
    run = runs["nf4"][0]
    assert (found.trained, found.parameters) == load_trained(run.folder)[0].get_nb_trainable_parameters()
    # Half a byte for each of the 10.8 million weights of the linear layers and 1 byte in 64 of them for their scales.
    linear = 6 * (4 * 384 * 384 + 2 * 384 * 1536) + 384 * 384
    others = found.parameters - found.trained - linear
    assert found.memory["frozen weights"] == pytest.approx(4 * others + linear * (0.5 + 1 / 64), rel=0.01)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["adapter=null", "ggpo=null"], "override 'quantise=nf4': quantise nf4 needs an adapter: quantised"),
        (["adapter.init_lora_weights=pissa"], "quantise nf4 keeps the weights as they are, but adapter.init_lora_weig"),
        (["adapter.init_lora_weights=lora_ga"], "unquantised; choose true, gaussian or eva."),
        (["ggpo=null", "sam.space=weights"], "but sam.space weights moves them; use space adapter."),
        (["quantise=int8", "adapter.use_dora=true"], "quantise int8 hides the scales of the weights from peft's DoRA"),
        (["quantise=fp4"], "quantise must be 'nf4' or 'int8', not 'fp4'."),
    ],
)
def test_what_cannot_be_quantised(recipe_file, overrides, message):
    with pytest.raises(UserError) as error:
        load_recipe(recipe_file, ["quantise=nf4", *overrides])
    assert message in str(error.value)


def test_bitsandbytes_is_asked_for(recipe_file, monkeypatch):
    monkeypatch.setattr("transformers.quantizers.quantizer_bnb_4bit.is_bitsandbytes_available", lambda: False)
    with pytest.raises(UserError, match=r"cannot be loaded: .*requires bitsandbytes"):
        train(load_recipe(recipe_file, ["quantise=nf4"]), QUIET)
