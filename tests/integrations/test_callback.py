"""The callback in a real Trainer on two layers of MiniLM."""

import copy
import dataclasses
import json
import math

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback, integration_utils

from lora_ggpo.integrations.callback import GGPOCallback
from lora_ggpo.perturbation import GGPO, GGPOConfig

TEXTS = [
    "a fine film",
    "dull, and far too long",
    "warm and funny",
    "a mess",
    "I laughed",
    "nothing happens",
    "superb",
    "the worst of the year",
]
CONFIG = GGPOConfig(sigma=0.2, beta=0.5, rule="relative", ema=0.5, schedule="cosine")


@pytest.fixture(scope="module")
def short(minilm):
    """(model, tokenizer): the first two layers of MiniLM, and its head."""
    model = copy.deepcopy(minilm[0])
    del model.bert.encoder.layer[2:]
    model.config.num_hidden_layers = 2
    return model, minilm[1]


@pytest.fixture
def build(short, tmp_path):
    """Makes a Trainer of 6 steps, of 2 micro-batches each, on a fresh copy of `short`; keywords are its arguments."""
    model, tokenizer = short
    data = [dict(tokenizer(text), labels=int(i % 2 == 0)) for i, text in enumerate(TEXTS)]

    def make(config=CONFIG, folder="run", callbacks=None, layers=2, **kwargs):
        torch.manual_seed(0)
        base = copy.deepcopy(model)
        del base.bert.encoder.layer[layers:]
        peft = get_peft_model(base, LoraConfig(r=4, target_modules=["query", "value"]))
        arguments = TrainingArguments(
            output_dir=tmp_path / folder,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            logging_steps=1,
            disable_tqdm=True,
            use_cpu=True,
            seed=3,
            **{"max_steps": 6, "save_steps": 3, "report_to": [], **kwargs},
        )
        callbacks = ([GGPOCallback(config)] if config else []) if callbacks is None else callbacks
        return Trainer(peft, arguments, train_dataset=data, processing_class=tokenizer, callbacks=callbacks)

    return make


def logged(trainer):
    return [{k: v for k, v in row.items() if k in ("loss", "step") or "ggpo" in k} for row in _losses(trainer)]


def _losses(trainer):
    return [row for row in trainer.state.log_history if "loss" in row]


def adapter(trainer):
    return {k: v for k, v in trainer.model.state_dict().items() if "lora_" in k or "modules_to_save" in k}


@pytest.mark.parametrize(("step", "restore_callbacks"), [(2, True), (3, False)])
def test_resumed_training_is_the_uninterrupted_one(build, tmp_path, step, restore_callbacks):
    if step % 2 and transformers.__version__ < "5":
        pytest.skip("transformers 4 does not resume exactly within an epoch, without GGPO either")
    whole = build(save_steps=step)
    whole.train()
    resumed = build(save_steps=step, restore_callback_states_from_checkpoint=restore_callbacks)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
    assert len(logged(whole)) == 6
    assert logged(resumed) == logged(whole)
    for key, value in adapter(whole).items():
        assert torch.equal(adapter(resumed)[key], value), key


def test_resuming_a_run_that_had_no_ggpo(build, tmp_path):
    """It works, and differs from the run that had it: the state does matter for the test above."""
    whole = build()
    whole.train()
    path = tmp_path / "run" / "checkpoint-3" / "trainer_state.json"
    state = json.loads(path.read_text())
    assert state["stateful_callbacks"].pop("GGPOCallback")["args"] == {"config": CONFIG.to_dict()}
    path.write_text(json.dumps(state))
    resumed = build()
    resumed.train(resume_from_checkpoint=str(path.parent))
    assert logged(resumed)[:3] == logged(whole)[:3]
    assert logged(resumed)[3:] != logged(whole)[3:]
    assert "GGPOCallback" in resumed.state.stateful_callbacks


def test_training_is_that_of_a_plain_loop_and_its_diagnostics_are_logged(build):
    """Same losses as GGPO.step() by hand; every logged loss has the metrics of its step, beside the Trainer's own."""
    trainer = build(save_strategy="no")
    seen = []

    class Recorder(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    trainer.add_callback(Recorder())
    trainer.train()

    by_hand = build(config=None, save_strategy="no")
    loop = {}

    class Loop(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            loop["ggpo"] = GGPO(model, CONFIG, total_steps=6)

        def on_optimizer_step(self, args, state, control, **kwargs):
            loop["ggpo"].step()

    by_hand.add_callback(Loop())
    by_hand.train()
    rows = _losses(trainer)
    assert [row["loss"] for row in rows] == [row["loss"] for row in _losses(by_hand)]
    assert all(
        {"ggpo/gradient_share", "ggpo/relative_noise", "ggpo/query/tau", "grad_norm"} <= row.keys() for row in rows
    )
    assert rows[0]["ggpo/relative_noise"] == 0  # the cosine ramp begins at 0
    assert [row["ggpo/relative_noise"] for row in rows[1:]] == pytest.approx(
        [0.2 * (1 - math.cos(math.pi * t / 6)) / 2 for t in range(1, 6)], rel=1e-3
    )
    assert [row["ggpo/gradient_share"] for row in rows[1:]] == pytest.approx([0.5] * 5, rel=1e-3)
    assert "ggpo/tau" in seen[0]
    assert not any(key.startswith("ggpo") for row in seen if "train_runtime" in row for key in row)


class Writer:
    """Stands in for TensorBoard's SummaryWriter: keeps {step: {tag: value}}."""

    def __init__(self):
        self.scalars = {}

    def add_scalar(self, tag, value, step):
        self.scalars.setdefault(step, {})[tag] = value

    def add_text(self, *_):
        pass

    flush = close = lambda self: None


def test_trackers_are_given_the_diagnostics(build, monkeypatch):
    """transformers' own TensorBoard callback, which the Trainer puts before those that it is given."""
    writer = Writer()

    class Tracker(TensorBoardCallback):
        def __init__(self):  # without its look for the package
            self.tb_writer, self._SummaryWriter, self.logging_dir = writer, None, None

    calls = []

    class Last(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            calls.append(state.global_step)

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Tracker)
    callbacks = [GGPOCallback(CONFIG), Last()]
    trainer = build(callbacks=callbacks, save_strategy="no", max_steps=2, report_to=["tensorboard"])
    before = list(trainer.callback_handler.callbacks)
    trainer.train()
    for row in _losses(trainer):
        tags = {f"train/{key}": value for key, value in row.items() if key.startswith("ggpo/")}
        assert len(tags) > 9
        assert tags.items() <= writer.scalars[row["step"]].items()
    assert calls == [0]  # the move has the others called once each, in their order
    after = trainer.callback_handler.callbacks
    assert after == [callbacks[0], *(one for one in before if one is not callbacks[0])]
    trainer.train()
    assert trainer.callback_handler.callbacks == after


@pytest.mark.parametrize("loaded", [None, "is_loaded_in_4bit", "is_loaded_in_8bit"])
def test_several_gpus_in_one_process_are_refused(build, loaded):
    """The Trainer's rule: DataParallel, but for quantised models. Nothing is attached when that is said."""

    class Arguments:
        n_gpu, world_size = 2, 1

    trainer = build(callbacks=[], max_steps=1)
    model, callback = trainer.model, GGPOCallback(CONFIG)
    if loaded:
        setattr(model.base_model.model, loaded, True)
        trainer.state.max_steps = 1
        callback.on_train_begin(Arguments(), trainer.state, None, model=model)
        callback.on_train_end(Arguments(), trainer.state, None)
    else:
        with pytest.raises(ValueError, match="one process a GPU with torchrun"):
            callback.on_train_begin(Arguments(), trainer.state, None, model=model)
    assert not any("forward" in vars(module) for module in model.modules() if isinstance(module, torch.nn.Linear))


def test_noise_changes_training_and_sigma_0_does_not(build):
    losses = []
    for config in (None, GGPOConfig(sigma=0), CONFIG):
        trainer = build(config=config, save_strategy="no", max_steps=3)
        trainer.train()
        losses.append([row["loss"] for row in _losses(trainer)])
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


@pytest.mark.parametrize("noise", ["factored", pytest.param("dense", marks=pytest.mark.thorough)])
@pytest.mark.slow
def test_a_compiled_run_is_the_eager_one(build, noise):
    """Batches differ in length; dense noise breaks the graph at each layer."""
    config = dataclasses.replace(CONFIG, noise=noise)
    torch._dynamo.reset()
    runs = []
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        trainer = build(config=config, save_strategy="no", max_steps=3, layers=1, **compiled)
        trainer.train()
        runs.append(logged(trainer))
    torch._dynamo.reset()
    assert len(runs[0]) == 3
    for eager, found in zip(*runs, strict=True):
        assert found == pytest.approx(eager, rel=1e-3)
    assert runs[1][-1]["ggpo/coverage"] == 1


def test_callback_detaches_and_stock_peft_loads_what_it_saved(build, short, tmp_path):
    trainer = build(max_steps=3)
    keys = set(trainer.model.state_dict())
    trainer.train()
    model = trainer.model
    assert set(model.state_dict()) == keys
    assert not any("forward" in vars(module) for module in model.modules() if isinstance(module, torch.nn.Linear))
    GGPO(model).detach()
    inputs = short[1](TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
        loaded = PeftModel.from_pretrained(copy.deepcopy(short[0]), tmp_path / "run" / "checkpoint-3").eval()
        assert torch.equal(loaded(**inputs).logits, logits)


class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt


def test_training_can_begin_again_after_an_interruption(build):
    """Ctrl-C skips on_train_end, and auto_find_batch_size begins again after running out of memory."""
    callback = GGPOCallback(CONFIG)
    trainer = build(callbacks=[callback, Interrupt()], save_strategy="no", max_steps=3)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Interrupt)
    trainer.train()
    assert trainer.state.global_step == 3
    assert not any(
        "forward" in vars(module) for module in trainer.model.modules() if isinstance(module, torch.nn.Linear)
    )


def test_loss_scale_is_read_before_the_step_and_divided_out():
    class Scaler:
        scale = 1024.0

        def get_scale(self):
            return self.scale

    class Optimizer:
        scaler = Scaler()

    class Recorder:
        scales = ()

        def step(self, scale):
            self.scales += (scale,)

    callback, optimizer = GGPOCallback(CONFIG), Optimizer()
    callback.ggpo = Recorder()
    callback.on_pre_optimizer_step(None, None, None, optimizer=optimizer)
    Scaler.scale = 512.0  # the optimizer's step updates it
    callback.on_optimizer_step(None, None, None, optimizer=optimizer)
    optimizer.scaler = None
    callback.on_pre_optimizer_step(None, None, None, optimizer=optimizer)
    callback.on_optimizer_step(None, None, None, optimizer=optimizer)
    assert callback.ggpo.scales == (1024.0, 1.0)


def test_state_before_training_and_its_way_back():
    callback = GGPOCallback(CONFIG)
    state = json.loads(json.dumps(callback.state()))
    assert GGPOCallback.from_state(state).config == CONFIG
