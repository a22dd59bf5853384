"""Several training examples in one row, none of which sees another: without padding, or in rows of a given length."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lora_ggpo.data.spool import numbers, spooled
from lora_ggpo.errors import UserError
from lora_ggpo.tasks.base import CHUNK, NO_LOSS, Batch, Row, arrow, encoded_row
from lora_ggpo.tasks.forward import evaluating


def pack(rows: Dataset, max_length: int) -> Dataset:
    """Put encoded "sft" rows behind one another, the longest first, each where the least room is left over.

    Args:
        rows: As the task encodes them, none longer than `max_length`.
        max_length: Tokens of a packed row, at most.

    Returns:
        Rows with input_ids, labels, position_ids (from 0 in each example), attention_mask and length.
    """
    packs = _best_fit(numbers(rows, "length").tolist(), max_length)
    return spooled(
        arrow([_packed(rows[pack]) for pack in packs[begin : begin + CHUNK]]) for begin in range(0, len(packs), CHUNK)
    )


def _packed(rows: dict[str, list[list[int]]]) -> Row:
    ids = list(chain.from_iterable(rows["input_ids"]))
    # Nothing in its own example predicts an example's first token.
    labels = list(chain.from_iterable([NO_LOSS, *labels[1:]] for labels in rows["labels"]))
    positions = list(chain.from_iterable(range(len(ids)) for ids in rows["input_ids"]))
    return encoded_row(ids, labels, position_ids=positions)


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


# --- without padding ------------------------------------------------------------------------------------------------


def flatten(rows: Sequence[Row]) -> Batch:
    """Put all examples of encoded rows, packed or not, behind one another in a single row.

    Only a model that `attend_apart` has prepared keeps them apart: the mask alone would let each see those before it.
    """
    positions = [*chain.from_iterable(row.get("position_ids") or range(len(row["input_ids"])) for row in rows)]
    starts = [place for place, position in enumerate(positions) if position == 0]
    labels = torch.tensor([[*chain.from_iterable(row["labels"] for row in rows)]])
    labels[0, starts] = NO_LOSS  # nothing in its own example predicts an example's first token
    ids = torch.tensor([[*chain.from_iterable(row["input_ids"] for row in rows)]])
    borders = torch.tensor([*starts, len(positions)], dtype=torch.int32)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.tensor([positions]),
        "labels": labels,
        "cu_seq_lens_q": borders,
    }


def attend_apart(model: Any) -> bool:
    """Have a model in float32 attend within the examples of a row alone where `flatten` made it; elsewhere as before.

    Returns:
        Whether it can. Otherwise it is left as it was.
    """
    config = model.config.get_text_config()
    in_chunks = getattr(config, "attention_chunk_size", None)  # of the row, which would cut examples
    if config._attn_implementation != "sdpa" or model.dtype != torch.float32 or in_chunks:
        return bool(config._attn_implementation == _APART)
    if not model._can_set_attn_implementation():
        return False
    model.set_attn_implementation(_APART)
    if _is_apart(model):
        return True
    model.set_attn_implementation("sdpa")
    return False


def _is_apart(model: nn.Module) -> bool:
    examples = torch.arange(1, 13).view(3, 4)  # of one length, so that they are a batch without padding
    flat = flatten([{"input_ids": ids, "labels": ids} for ids in examples.tolist()])
    inputs = ({name: of for name, of in flat.items() if name != "labels"}, {"input_ids": examples})
    device = next(model.parameters()).device
    try:
        with evaluating(model):
            together, alone = (
                model(**{name: of.to(device) for name, of in one.items()}, use_cache=False).logits for one in inputs
            )
    except TypeError:  # it does not take the arguments
        return False
    return float((together - alone.view_as(together)).abs().max()) <= 1e-4 * float(together.abs().max())


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' attention by torch, for each example that `flatten` put into a row on its own."""
    borders = options.pop("cu_seq_lens_q", None)
    if borders is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    lengths = borders.diff().tolist()
    parts, begin = [], 0
    for q, k, v in zip(*(of.split(lengths, dim=2) for of in (query, key, value)), strict=True):
        end = begin + q.shape[2]
        # There is one where a layer has a window, which is the same one in each example.
        mask = None if attention_mask is None else attention_mask[..., begin:end, begin:end]
        parts.append(sdpa_attention_forward(module, q, k, v, mask, **options)[0])
        begin = end
    return torch.cat(parts, dim=1), None


_APART = "sdpa_apart"
AttentionInterface.register(_APART, _attention)
AttentionMaskInterface.register(_APART, sdpa_mask)


# --- rows of a given length -------------------------------------------------------------------------------------------


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
