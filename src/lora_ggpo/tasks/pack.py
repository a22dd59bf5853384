"""Several training examples in one row, none of which sees another."""

from __future__ import annotations

from bisect import bisect_left, insort
from itertools import chain
from typing import Any

import torch
from datasets import Dataset

from lora_ggpo.errors import UserError
from lora_ggpo.tasks.base import NO_LOSS, packed_dataset
from lora_ggpo.tasks.forward import evaluating


def pack(rows: Dataset, max_length: int) -> Dataset:
    """Put encoded "sft" rows behind one another, the longest first, each where the least room is left over.

    Args:
        rows: As the task encodes them, none longer than `max_length`.
        max_length: Tokens of a packed row, at most.

    Returns:
        Rows with input_ids, labels, position_ids (from 0 in each example), attention_mask and length.
    """
    lengths = list(rows["length"])
    packs = _best_fit(lengths, max_length)
    ids, labels = rows["input_ids"][:], rows["labels"][:]
    return packed_dataset(
        {
            "input_ids": [list(chain.from_iterable(ids[row] for row in pack)) for pack in packs],
            # Nothing in its own example predicts an example's first token.
            "labels": [list(chain.from_iterable([NO_LOSS, *labels[row][1:]] for row in pack)) for pack in packs],
            "position_ids": [list(chain.from_iterable(range(lengths[row]) for row in pack)) for pack in packs],
            "attention_mask": [[1] * sum(lengths[row] for row in pack) for pack in packs],
            "length": [sum(lengths[row] for row in pack) for pack in packs],
        }
    )


def check_packing(model: torch.nn.Module) -> None:
    """Refuse a model in which what stands before an example in a packed row changes something in it."""
    config: Any = model.config
    device = next(model.parameters()).device
    ids = torch.arange(8, device=device).repeat(2, 1) % config.get_text_config().vocab_size
    ids[1, :4] += 8
    positions = torch.arange(4, device=device).repeat(2, 2)
    try:
        with evaluating(model):
            logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 4:].float()
    except TypeError as error:
        raise UserError(f"{_REFUSED} takes no position_ids; set task.packing: false.") from error
    if float((logits[0] - logits[1]).abs().max()) > 1e-5 * float(logits.abs().max()):
        raise UserError(f"{_REFUSED} lets packed examples see one another; set task.packing: false.")


_REFUSED = "task.packing: this kind of model"


def _best_fit(lengths: list[int], size: int) -> list[list[int]]:
    """Rows of each pack: best-fit decreasing, which wastes little and is the same at every call."""
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, pack), sorted
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        place = bisect_left(room, (lengths[row], -1))
        left, pack = room.pop(place) if place < len(room) else (size, len(packs))
        if pack == len(packs):
            packs.append([])
        packs[pack].append(row)
        if left > lengths[row]:
            insort(room, (left - lengths[row], pack))
    return packs
