"""The callback in a real Lightning Trainer, held against a loop by hand."""

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM

from lora_ggpo import GGPO, GGPOConfig
from tests.integrations.contract import assert_documented, block

pl = pytest.importorskip("lightning.pytorch")

from lightning.pytorch.loggers.logger import DummyLogger  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402

from lora_ggpo.integrations.lightning import GGPOLightningCallback  # noqa: E402

CONFIG = GGPOConfig(sigma=0.3, beta=0.5, rule="relative", ema=0.5, schedule="cosine")
STEPS = 4


class Module(pl.LightningModule):
    """Trains a causal language model that it holds."""

    def __init__(self, model, automatic=True):
        super().__init__()
        self.inner = model
        self.automatic_optimization = automatic

    def training_step(self, batch, _):
        loss = self.inner(input_ids=batch[0], labels=batch[0]).loss
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def configure_optimizers(self):
        return optimizer_of(self.inner)


class Recorder(DummyLogger):
    """Keeps what a tracker would be given: {step: metrics}."""

    def __init__(self):
        super().__init__()
        self.rows = {}

    def log_metrics(self, metrics, step):
        self.rows.setdefault(step, {}).update(metrics)


@pytest.fixture(scope="module")
def model(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama)


def adapted(model):
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(copy.deepcopy(model), lora).train()


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def batches(same=False):
    """2 * STEPS batches of 2 rows, or as often the first one."""
    ids = torch.randint(3, 400, (4 * STEPS, 8), generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(ids[:2].repeat(2 * STEPS, 1) if same else ids), batch_size=2)


def weights(model):
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def fit(module, callbacks, folder, steps=STEPS, ckpt_path=None, same=False, **settings):
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=callbacks,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"logger": False, "enable_checkpointing": False, "log_every_n_steps": 1, **settings},
    )
    trainer.fit(module, batches(same), ckpt_path=ckpt_path)
    return trainer


def by_hand(model, config, accumulation, clip, scaler=None):
    """Trains the model as Lightning should; returns the GGPO."""
    optimizer = optimizer_of(model)
    ggpo = GGPO(model, config, total_steps=STEPS)
    for number, (ids,) in enumerate(batches(), 1):
        with torch.autocast("cpu", torch.float16, enabled=scaler is not None, cache_enabled=False):
            loss = model(input_ids=ids, labels=ids).loss / accumulation
        (scaler.scale(loss) if scaler else loss).backward()
        if number % accumulation:
            continue
        if scaler:
            scaler.unscale_(optimizer)
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        ggpo.step(scaler=scaler)
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        optimizer.zero_grad()
        if ggpo.state_dict()["steps"] == STEPS:
            break
    ggpo.detach()
    return ggpo


@pytest.mark.parametrize(("accumulation", "clip"), [(1, None), (2, 0.1)])
def test_training_is_that_of_a_plain_loop(model, tmp_path, accumulation, clip):
    callback, mine, theirs = GGPOLightningCallback(CONFIG), adapted(model), adapted(model)
    fit(Module(mine), [callback], tmp_path, accumulate_grad_batches=accumulation, gradient_clip_val=clip)
    ggpo = by_hand(theirs, CONFIG, accumulation, clip)
    assert_equal(weights(mine), weights(theirs))
    assert_equal(callback.state_dict(), ggpo.state_dict())
    assert not any("forward" in vars(module) for module in mine.modules() if isinstance(module, torch.nn.Linear))


def test_manual_optimisation_counts_each_step(model, tmp_path):
    mine, theirs = adapted(model), adapted(model)
    fit(Module(mine, automatic=False), [GGPOLightningCallback(CONFIG)], tmp_path)
    by_hand(theirs, CONFIG, 1, None)
    assert_equal(weights(mine), weights(theirs))


def test_noise_changes_training_and_sigma_0_does_not(model, tmp_path):
    trained = {}
    for name, callbacks in {
        "plain": [],
        "still": [GGPOLightningCallback(GGPOConfig(sigma=0))],
        "noisy": [GGPOLightningCallback(GGPOConfig(sigma=0.3))],
    }.items():
        fit(Module(inner := adapted(model)), callbacks, tmp_path)
        trained[name] = weights(inner)
    assert_equal(trained["plain"], trained["still"])
    assert not torch.equal(*(next(iter(trained[name].values())) for name in ("plain", "noisy")))


@pytest.mark.parametrize("scale", [2.0**4, 2.0**10])
def test_the_loss_scale_of_16_mixed_is_divided_out(model, tmp_path, scale):
    callback, mine, theirs = GGPOLightningCallback(CONFIG), adapted(model), adapted(model)
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))
    fit(Module(mine), [callback], tmp_path, plugins=[precision], gradient_clip_val=0.1)
    ggpo = by_hand(theirs, CONFIG, 1, 0.1, torch.amp.GradScaler("cpu", init_scale=scale))
    assert_equal(weights(mine), weights(theirs))
    plain = by_hand(adapted(model), CONFIG, 1, 0.1).state_dict()
    for name, norms in callback.state_dict().items():
        if name.startswith("gradient"):
            assert float(norms.sum()) == pytest.approx(float(plain[name].sum()), rel=0.5), name
    assert_equal(callback.state_dict(), ggpo.state_dict())


def test_a_step_that_the_scaler_skips_leaves_the_norms(model, tmp_path):
    callback = GGPOLightningCallback(CONFIG)
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**100))
    fit(Module(adapted(model)), [callback], tmp_path, steps=1, plugins=[precision])
    norms = [value for name, value in callback.state_dict().items() if name.startswith("gradient")]
    assert norms
    assert not any(value.any() for value in norms)


def test_resumed_training_is_the_uninterrupted_one(model, tmp_path):
    """All batches are the same: Lightning begins a loader that has no state of its own from the beginning."""
    whole = adapted(model)
    saver = pl.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    saving = {"enable_checkpointing": True, "logger": (logger := Recorder())}
    fit(Module(whole), [saver, GGPOLightningCallback(CONFIG)], tmp_path, same=True, **saving)
    path = tmp_path / "step=2.ckpt"
    resumed = adapted(model)
    fit(Module(resumed), [GGPOLightningCallback(CONFIG)], tmp_path, ckpt_path=path, same=True)
    assert_equal(weights(resumed), weights(whole))

    checkpoint = torch.load(path, weights_only=False)
    assert checkpoint["callbacks"].pop("GGPOLightningCallback")["steps"] == 2
    torch.save(checkpoint, path)
    without = adapted(model)
    fit(Module(without), [GGPOLightningCallback(CONFIG)], tmp_path, ckpt_path=path, same=True)
    assert not torch.equal(*(next(iter(weights(one).values())) for one in (without, whole)))

    rows = [row for row in logger.rows.values() if "ggpo/coverage" in row]
    assert [row["ggpo/relative_noise"] for row in rows] == pytest.approx(
        [0.3 * (1 - math.cos(math.pi * t / STEPS)) / 2 for t in range(STEPS)], rel=1e-3, abs=1e-9
    )
    (coverage,) = {row["ggpo/coverage"] for row in rows}
    assert_documented("Lightning", "lightning", steps=STEPS, coverage=coverage, resumed=True, metrics="its loggers")


def test_the_model_is_found_or_named(model, tmp_path):
    """A module that holds two must say which; one that is not a PeftModel is taken by its name."""
    module = Module(adapted(model))
    module.other = adapted(model)
    with pytest.raises(ValueError, match="Module has the PEFT models inner, other"):
        fit(module, [GGPOLightningCallback(CONFIG)], tmp_path, steps=1)
    with pytest.raises(ValueError, match="Module has no PEFT model"):
        fit(Module(copy.deepcopy(model)), [GGPOLightningCallback(CONFIG)], tmp_path, steps=1)
    callback = GGPOLightningCallback(CONFIG, model="inner")
    fit(module, [callback], tmp_path, steps=1)
    assert callback.ggpo._model is module.inner


def test_the_block_of_the_docs(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"module": Module(adapted(model)), "loader": batches()}
    exec(block("GGPOLightningCallback"), names)
    assert names["trainer"].global_step == STEPS
