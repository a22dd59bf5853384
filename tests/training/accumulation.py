"""Optimizer steps over micro-batches, by the trainer of a run and by a loop written out in torch."""

import gc
import json
import math
import os

import torch
from peft.tuners.lora.monteclora import MontecloraSampler
from torch.nn import functional as F

from lora_ggpo import GGPO
from lora_ggpo.methods.optimizers import ivon
from lora_ggpo.recipe.recipe import parse_recipe
from lora_ggpo.tasks import TASKS
from lora_ggpo.training.build import build_model, build_trainer, training_arguments
from lora_ggpo.training.trainer import EpochSampler
from tests.recipes import recipe_text

CLIP = 0.2
METHODS = {
    "lora": [],
    "ggpo": ["ggpo={sigma: 0.3, rule: relative, beta: 0.5, redraw: optimizer-step, ranks: agree}"],
    "smoothed": ["training.label_smoothing_factor=0.2"],
}
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.5),
    "adamw_torch": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, eps=1e-3, weight_decay=0),
}
ADAM = ["training.optim=adamw_torch", "training.learning_rate=0.01", "training.adam_epsilon=1e-3"]
IVON = ["optimizer={kind: ivon, ess: 1e4, hess_init: 0.01}", "training.learning_rate=20.0"]
KINDS = [kind for kind in TASKS if kind not in ("choice", "dpo")]  # theirs are tested where they are
CASES = {kind: (kind, []) for kind in KINDS} | {"packed": ("sft", ["task.packing=true"])}
ROWS = 80  # 64 to train on
WISHART = 1.5


def constant_draws(buffer):
    """In place of MonteCLoRA's random ones."""
    sampler = buffer.model
    shape = sampler.num_samples, sampler.in_features, sampler.out_features
    return {
        "z_mvn": torch.linspace(-2, 2, math.prod(shape)).view(shape),
        "z_wishart": WISHART * torch.eye(sampler.out_features),
        "z_dirichlet": torch.linspace(-1, 1, sampler.num_samples),
    }


def write_data(folder):
    """One file for each kind, of rows of very different lengths."""
    folder.mkdir()
    texts = [f"film {n} " + "was so " * (n * 7 % 13) for n in range(ROWS)]
    for kind in KINDS:
        if kind == "sft":
            rows = [{"prompt": text, "completion": "good " * (n * 5 % 11 + 1)} for n, text in enumerate(texts)]
        else:
            labels = [n * 3 % 7 / 2 if kind == "regression" else ["bad", "good"][n * 5 % 3 % 2] for n in range(ROWS)]
            rows = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
        (folder / f"{kind}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def make_recipe(models, data, case, batch, micro_batches, overrides=()):
    """`models`: (decoder, encoder-decoder), both without dropout."""
    kind, settings = CASES[case]
    seq2seq = kind.startswith("seq2seq")
    targets = ["q", "v", "wi"] if seq2seq else ["q_proj", "v_proj", "up_proj"]
    text = recipe_text(
        models[seq2seq],
        data / f"{kind}.jsonl",
        "unused",
        task={"kind": kind, "max_length": 48},
        data={"validation_fraction": 0.1, "test_fraction": 0.1},
        adapter={"lora_alpha": 4, "target_modules": targets, "init_lora_weights": False},
        training={
            "max_steps": -1,
            "num_train_epochs": 1,
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": micro_batches,
            **({} if overrides == IVON else {"optim": "sgd"}),
            "learning_rate": 0.5,
            "lr_scheduler_type": "constant",
            "max_grad_norm": CLIP,
            "train_sampling_strategy": "random",
        },
    )
    return parse_recipe(text, "r.yaml", [*settings, *overrides])


def begun(recipe, folder):
    """(model, tokenizer, encoded rows, arguments) of a run."""
    args = training_arguments(recipe, folder, recipe.seeds[0])
    splits = recipe.task.type.load(recipe.data)
    return *build_model(recipe, args, splits), args


def by_trainer(recipe, folder):
    """(loss of each step, gradient norm of each step, weights at the end)"""
    model, tokenizer, rows, args = begun(recipe, folder)
    trainer = build_trainer(recipe, args, model, tokenizer, rows)
    trainer.train()
    log = [row for row in trainer.state.log_history if "grad_norm" in row]
    return [row["loss"] for row in log], [row["grad_norm"] for row in log], trained(model)


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def by_hand(recipe, folder, rows_a_step, ascent=None, rows_a_part=None):
    """As `by_trainer`, with all rows of an optimizer step in one batch, whose loss is their mean.

    Args:
        ascent: Makes what moves the weights for the gradient, of model and optimizer.
        rows_a_part: Rows that it moves the weights for together; None is all of a step. (A label a row, that is.)
    """
    model, tokenizer, rows, args = begun(recipe, folder)
    ggpo = recipe.ggpo and GGPO(model, recipe.ggpo_config(0))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = ivon(model, args, 1e4, 0.01) if recipe.optimizer else OPTIMIZERS[args.optim](parameters)
    move = ascent(model, optimizer).backward if ascent else lambda closure: closure()
    parameters = [p for p in model.parameters() if p.requires_grad]
    collate, losses, norms = recipe.task.type.collator(tokenizer), [], []
    steps = split(list(EpochSampler([1] * len(rows), 0, None)), rows_a_step)
    for step in steps[: args.max_steps if args.max_steps > 0 else None]:
        losses.append(0.0)
        for part in split(step, rows_a_part or len(step)):

            def closure(part=part, step=step):
                model.train()
                loss = mean_loss(model, collate(rows.select(part).to_list()), args.label_smoothing_factor)
                loss = (loss + regularisation(model)) * (len(part) / len(step))
                loss.backward()
                return loss.detach()

            losses[-1] += move(closure).item()
        norms.append(torch.stack([p.grad.square().sum() for p in parameters]).sum().sqrt().item())
        for parameter in parameters:
            parameter.grad *= min(1.0, CLIP / norms[-1])
        optimizer.step()
        if ggpo:
            ggpo.step()
        optimizer.zero_grad()
    return losses, norms, trained(model)


def split(rows, size):
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def mean_loss(model, batch, smoothing):
    """Mean over all labels in `batch` of -(1 - smoothing) log p(label) - smoothing mean_k log p(k)."""
    labels = batch.pop("labels")
    if model.config.is_encoder_decoder:
        begin = torch.full((len(labels), 1), model.config.decoder_start_token_id)
        batch["decoder_input_ids"] = torch.cat([begin, labels[:, :-1].clamp(min=0)], dim=1)
    logits = model(**batch, use_cache=False).logits
    if labels.is_floating_point():
        return (logits.squeeze(1) - labels).square().sum() / len(labels)
    if labels.dim() == 2 and not model.config.is_encoder_decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]
    there = labels != -100
    log_p = F.log_softmax(logits[there], dim=-1)
    of_label = log_p[torch.arange(len(log_p)), labels[there]]
    return -((1 - smoothing) * of_label + smoothing * log_p.mean(dim=-1)).sum() / len(log_p)


def regularisation(model):
    """AdaLoRA's: how far its factors are from orthogonal, on average. MonteCLoRA's: the mean of its divergences."""
    samplers = [module for module in model.modules() if isinstance(module, MontecloraSampler)]
    if samplers:
        return torch.stack([divergence(sampler) for sampler in samplers]).mean()
    if model.peft_type != "ADALORA":
        return 0.0
    named = dict(model.named_parameters())
    factors = [p if "lora_A" in name else p.T for name, p in named.items() if "lora_A" in name or "lora_B" in name]
    far = [torch.linalg.matrix_norm(factor @ factor.T - torch.eye(len(factor))) for factor in factors]
    return model.peft_config["default"].orth_reg_weight * torch.stack(far).mean()


def divergence(sampler):
    """Of MonteCLoRA's variational distribution from its prior, as peft weighs it."""
    r, count, weight = sampler.out_features, sampler.num_samples, sampler.kl_loss_weight
    alpha, prior = sampler.expert_weights_prior.exp(), torch.full((count,), sampler.dirichlet_prior)
    above = (alpha - prior) * (torch.digamma(alpha) - torch.digamma(alpha.sum()))
    norms = torch.lgamma(alpha.sum()) - torch.lgamma(prior.sum())
    dirichlet = norms + (torch.lgamma(alpha) - torch.lgamma(prior)).sum() + above.sum()
    scales = 2 * sampler.std_prior  # logarithms of the diagonal of std std^T
    wishart = r / 2 * (scales.exp() - scales - 1).sum()
    variances = (scales.exp() * WISHART).clamp(min=1e-3)
    normal = count / 2 * (variances - variances.log() - 1).sum()
    return weight * (dirichlet + wishart + normal)


def run_process(rank, models, data, folder, cases, port):
    """One of two processes: carry out each of `cases` (name: arguments of `make_recipe`) and save what it ends with."""
    torch.set_num_threads(1)
    gc.freeze()
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in world.items()})
    for name, arguments in cases.items():
        recipe = make_recipe(models, data, *arguments)
        torch.save(by_trainer(recipe, folder), folder / f"{name}-{rank}.pt")


def assert_same(found, expected):
    for one, other in zip(found[:2], expected[:2], strict=True):
        assert len(one) == len(other) > 0
        assert all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(one, other, strict=True)), (one, other)
    assert found[2].keys() == expected[2].keys()
    for name, weight in expected[2].items():
        torch.testing.assert_close(found[2][name], weight, rtol=0, atol=1e-5, msg=name)
