"""TRL's preference, policy and reward trainers on a model that has an adapter: noise is in training passes alone.

TRL copies the adapter to one named "ref" and switches to it for the reference pass, generates with the model in
training mode, and estimates KL terms without gradients: none of these may see noise, nor be taken for what is trained.
"""

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lora_ggpo import GGPO, GGPOCallback, GGPOConfig
from lora_ggpo.perturbation.layers import PerturbedLayer
from tests.integrations.contract import assert_contract

CONFIG = GGPOConfig(sigma=0.3, rule="relative", beta=0.5)
STEPS, LAYERS = 2, 14
PAIRS = [{"prompt": f"the film {n} is", "chosen": f" good {n}", "rejected": f" a bad {n}"} for n in range(8)]
LABELLED = [{"prompt": f"the film {n} is", "completion": f" good {n}", "label": n % 2 == 0} for n in range(8)]
PROMPTS = [{"prompt": row["prompt"]} for row in PAIRS]
KINDS = {
    "SFT": (LABELLED, {"max_length": 32}, {}),
    "DPO": (PAIRS, {"max_length": 32}, {}),
    "KTO": (LABELLED, {"max_length": 32}, {}),
    "GRPO": (
        PROMPTS,
        {"num_generations": 2, "max_completion_length": 4, "beta": 0.1},  # beta above 0: with a reference pass
        {"reward_funcs": lambda completions, **_: [float(n % 2) for n in range(len(completions))]},
    ),
    "Reward": (PAIRS, {"max_length": 32}, {}),
}


@pytest.fixture
def train(tiny_llama, tmp_path, monkeypatch):
    """Trains 2 steps of a TRL trainer on a tiny Llama with an adapter; returns it, (active adapter, in a training pass)
    of every call of a layer that was noisy, and the sum of ||G||^2 of every step."""

    def run(kind, config=CONFIG, checkpointing=False, wrapped=True):
        calls, norms = [], []
        forward, step = PerturbedLayer.forward, GGPO.step

        def call(layer, x, *arguments, **options):
            training = torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1
            if layer._perturbs() and layer.noise is not None:
                calls.append((*layer.module.active_adapters, training))
            return forward(layer, x, *arguments, **options)

        def count(ggpo, *arguments, **options):
            step(ggpo, *arguments, **options)
            norms.append(sum(float(group.gradient.sum()) for group in ggpo._groups if group.gradient is not None))

        rows, settings, options = KINDS[kind]
        with monkeypatch.context() as patch:
            patch.setattr(PerturbedLayer, "forward", call)
            patch.setattr(GGPO, "step", count)
            trainer = _trainer(
                kind, tiny_llama, config, rows, options, wrapped, **_arguments(tmp_path, checkpointing), **settings
            )
            trainer.train()
        return trainer, calls, norms

    return run


def _arguments(folder, checkpointing):
    return {
        "output_dir": str(folder / "out"),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "seed": 0,
        "gradient_checkpointing": checkpointing,
    }


def _trainer(kind, folder, config, rows, options, wrapped=True, **arguments):
    torch.manual_seed(0)
    if kind == "Reward":
        model, task = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1), "SEQ_CLS"
    else:
        model, task = AutoModelForCausalLM.from_pretrained(folder), "CAUSAL_LM"
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type=task, init_lora_weights=False)
    return getattr(trl, f"{kind}Trainer")(
        model=get_peft_model(model, adapter) if wrapped else model,
        peft_config=None if wrapped else adapter,
        args=getattr(trl, f"{kind}Config")(**arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder, pad_token="<unk>"),
        callbacks=[GGPOCallback(config)] if config else [],
        **options,
    )


def logged(trainer):
    return [(row["loss"], row["grad_norm"]) for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_in_training_passes_alone(train, kind):
    trainer, calls, norms = train(kind)
    assert calls == [("default", True)] * (LAYERS * STEPS)
    assert len(norms) == STEPS
    assert all(norm > 0 for norm in norms)
    assert [row["ggpo/coverage"] for row in trainer.state.log_history if "loss" in row] == [1.0] * STEPS
    again, repeated, same = train(kind, checkpointing=True)
    assert repeated == [("default", True)] * (LAYERS * STEPS * 2)
    assert torch.tensor(logged(again)).allclose(torch.tensor(logged(trainer)), rtol=1e-4)
    assert same == pytest.approx(norms, rel=1e-3)


@pytest.mark.parametrize("kind", ["DPO", "KTO", "GRPO"])
def test_a_reference_without_the_adapter_is_free_of_noise(train, kind):
    """TRL makes the adapter itself, and switches it off for the reference pass."""
    trainer, calls, norms = train(kind, wrapped=False)
    assert "ref" not in trainer.model.peft_config
    assert calls == [("default", True)] * (LAYERS * STEPS)
    assert all(norm > 0 for norm in norms)


@pytest.mark.parametrize("kind", KINDS)
def test_without_noise_it_is_the_plain_trainer(train, kind):
    plain, still = (logged(train(kind, config)[0]) for config in (None, GGPOConfig(sigma=0)))
    assert still == plain


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_as_the_docs_say(tiny_llama, tmp_path, kind):
    pytest.importorskip("tensorboard")
    rows, settings, options = KINDS[kind]

    def fit(name, ggpo, resume):
        folder = tmp_path / name / "out"
        saving = {"output_dir": str(folder), "save_strategy": "steps", "save_steps": 1, "report_to": ["tensorboard"]}
        config = ggpo and GGPOConfig(**ggpo)
        arguments = {**_arguments(tmp_path, False), **saving, **settings}
        trainer = _trainer(kind, tiny_llama, config, rows, options, wrapped=False, **arguments)
        trainer.train(resume_from_checkpoint=resume and str(resume))
        return folder

    assert_contract(fit, f"TRL {kind}", "trl")
