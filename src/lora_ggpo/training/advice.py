"""What experience says of a recipe before it is trained: each check is a sentence with what to do, or nothing."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import TrainingArguments

from lora_ggpo.data import Splits
from lora_ggpo.data.spool import numbers
from lora_ggpo.recipe.recipe import Recipe
from lora_ggpo.training.build import optimizer_steps
from lora_ggpo.training.drawn import rows_of_epoch

MANY_PASSES, USUAL_RATE = 5.0, 5e-4
"""Passes over the rows, at LoRA's usual rate, that over-fit. docs/studies.md: on 500 reviews 3.8 passes do not, and 7.7
bring the validation log-loss above that of guessing."""

FULL_RATE = 0.05
"""Usual rate of full fine-tuning, in units of LoRA's."""

ENOUGH_RANK = 4
"""docs/studies.md: on 500 reviews, with right and with wrong labels, higher ranks have no higher accuracy."""

RARE, FEW_ROWS = 0.1, 10
"""A class with less than this part of an even share, or with fewer rows and not half a share, hardly moves accuracy."""

DUPLICATES = 0.01
"""Share of a set that is also trained on, beyond which its scores are partly memory. Of TREC's test set it is 2.2 %, of
CoLA's validation set 1.5 %, of those of SST-2, STS-B and QNLI less than 0.6 %."""

LOOKED_AT = 200_000
"""Training rows that are compared with the others, at most: about ten seconds."""

_CONTENT = ("text", "text_pair", "prompt", "completion", "messages", "chosen", "rejected", "choices")


@dataclass(frozen=True)
class Plan:
    """What is about to be trained, as far as experience speaks of it.

    Attributes:
        passes: Over the training rows.
    """

    recipe: Recipe
    splits: Splits
    passes: float


def warn_of(recipe: Recipe, args: TrainingArguments, splits: Splits, rows: Dataset) -> None:
    """Warn of what experience advises against in training on encoded `rows`."""
    for sentence in advice(Plan(recipe, splits, _passes_over(rows_of_epoch(rows), args, args.world_size))):
        warnings.warn(sentence, stacklevel=2)


def warn_of_runs(recipes: Iterable[Recipe]) -> None:
    """Warn of what experience advises against in any of `recipes`, once, before single processes train them.

    Nothing is encoded for that: each row of the data counts as one to train on.
    """
    loaded: dict[str, Splits] = {}
    found: dict[str, None] = {}
    for recipe in recipes:
        data = recipe.data.model_dump_json()
        splits = loaded[data] = loaded.get(data) or recipe.task.type.load(recipe.data)
        fields: Any = recipe.training
        untold = recipe.task.packing and fields.max_steps > 0  # how many rows a step takes
        passes = 0.0 if untold else _passes_over(len(splits.train), fields, 1)
        found |= dict.fromkeys(advice(Plan(recipe, splits, passes)))
    for sentence in found:
        warnings.warn(sentence, stacklevel=2)


def _passes_over(rows: int, args: Any, processes: int) -> float:
    rows_a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    return optimizer_steps(args, rows, processes) * rows_a_step / rows


def advice(plan: Plan) -> Iterator[str]:
    """One sentence for each thing that experience advises against."""
    for check in CHECKS:
        yield from check(plan)


def _passes(plan: Plan) -> Iterator[str]:
    recipe = plan.recipe
    adam = recipe.training_fields.get("optim", "adamw_torch").startswith("adamw")
    if recipe.keep == "best" or recipe.stop_loss or not adam or (recipe.optimizer and recipe.optimizer.kind == "ivon"):
        return  # the training ends in time, or its rates are not to be compared with Adam's
    rate = recipe.training_fields["learning_rate"]
    usual = USUAL_RATE if recipe.adapter else USUAL_RATE * FULL_RATE
    if plan.passes * min(rate / usual, 2.0) > MANY_PASSES:
        yield (
            f"{plan.passes:.3g} passes over {len(plan.splits.train):,} rows at learning rate {rate:g} are likely to "
            "over-fit; set keep: best with validate_every, or train for fewer epochs."
        )


def _rank(plan: Plan) -> Iterator[str]:
    rank, rows = (plan.recipe.adapter_fields or {}).get("r", 8), len(plan.splits.train)
    if plan.recipe.adapter and rank > rows:
        told = f"adapter.r is {rank}, more than the {rows} training rows"
        yield f"{told}; lower it: {ENOUGH_RANK} was enough for 500 reviews."


def _classes(plan: Plan) -> Iterator[str]:
    names, rows = plan.splits.labels or [], len(plan.splits.train)
    counts = Counter(numbers(plan.splits.train, "label").tolist() if names else ())
    even = rows / max(len(names), 1)
    enough = max(RARE * even, min(FEW_ROWS, even / 2))
    rare = [f"{name!r} ({counts[index]:,})" for index, name in enumerate(names) if counts[index] < enough]
    if rare:
        yield (
            f"Of {rows:,} training rows few are of class {', '.join(rare[:5])}{', ...' * (len(rare) > 5)}, which "
            "accuracy hardly shows; judge by f1 (keep_metric: f1, compare --metric f1), and add such rows if you can."
        )


def _duplicates(plan: Plan) -> Iterator[str]:
    splits = plan.splits
    sets = {"validation": splits.validation, "test": splits.test, **splits.out_of_domain}
    contents = {name: [one for batch in _contents(rows) for one in batch] for name, rows in sets.items()}
    wanted = {one for of in contents.values() for one in of}
    looked_at = splits.train.select(range(min(len(splits.train), LOOKED_AT)))
    least = "At least " if len(looked_at) < len(splits.train) else ""
    seen = {one for batch in _contents(looked_at) for one in batch if one in wanted}
    for name, of in contents.items():
        shared = sum(one in seen for one in of)
        if shared > DUPLICATES * len(of):
            yield (
                f"{least}{shared:,} of the {len(of):,} rows of the {name} set are training rows too, so its scores are "
                "partly memory; take them out of one of the two."
            )


def _contents(rows: Dataset) -> Iterator[list[int]]:
    """A number for what each row says, in batches; spaces and capitals make no difference."""
    names = [name for name in _CONTENT if name in rows.column_names]
    for batch in rows.select_columns(names).iter(1000):
        whole = (" ".join(map(str, row)) for row in zip(*(batch[name] for name in names), strict=True))
        yield [hash(" ".join(text.casefold().split())) for text in whole]


CHECKS: tuple[Callable[[Plan], Iterator[str]], ...] = (_passes, _rank, _classes, _duplicates)
