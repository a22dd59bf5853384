"""The frozen prefix of a model: what its lowest layers give for a row is computed once, kept, and trained upon.

Embeddings and layers of an encoder, or of a decoder under a classification head, give a row the same at every step if
nothing in them is trained, perturbed or dropped out. A row's outputs are computed among rows of its own length. From
those of a batch that pads it they differ by rounding, as those of any two such batches do.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, BinaryIO

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from lora_ggpo.data.spool import numbers
from lora_ggpo.models.load import dropout_rates
from lora_ggpo.recipe.recipe import Recipe
from lora_ggpo.tasks.base import CHUNK, Batch, Row
from lora_ggpo.tasks.forward import autocasting, evaluating
from lora_ggpo.training.precision import TYPES, precision_of
from lora_ggpo.workspace.cache import fits, kept_file
from lora_ggpo.workspace.libraries import device_name, versions
from lora_ggpo.workspace.progress import Reporter

Collate = Callable[[Sequence[Row]], Batch]

Batches = Callable[[Sequence[int]], Batch]
"""Makes a batch of rows by their numbers."""

STATES = "states"
"""In a batch, what comes out of the prefix, (rows, tokens, width), in place of what goes into it."""

_ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-9}
"""How far logits may be from those of the whole model, relative to the largest; 5e-2 in 16 bits."""

_OF_HEADS = ("classif", "summary")
"""In the names of rates of dropout above all layers."""

_EMBEDDINGS = ("embeddings", "embed_tokens")
"""What encoders and decoders call all that a token goes through below the layers."""

_INPUTS = ("input_ids", "token_type_ids")


class Places:
    """The numbers of rows, in place of the rows, for a collator that makes batches of numbers."""

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, row: int) -> int:
        return row


@dataclass(frozen=True)
class Cut:
    """Where a model is cut: its embeddings and the first `count` of its layers are below.

    Attributes:
        body, embeddings: The embeddings are this attribute of this module.
        parent, name: The list of layers is this attribute of this module.
    """

    body: Any
    embeddings: str
    parent: nn.Module
    name: str
    count: int

    @property
    def layers(self) -> nn.ModuleList:
        """All layers."""
        found: nn.ModuleList = getattr(self.parent, self.name)
        return found

    @property
    def whole(self) -> tuple[nn.Module, nn.ModuleList]:
        """The embeddings and all layers."""
        return getattr(self.body, self.embeddings), self.layers

    def below(self) -> list[nn.Module]:
        """What is below."""
        return [self.whole[0], *self.layers[: self.count]]

    def run(self, batch: Batch) -> Tensor:
        """What comes out of the prefix, (rows, tokens, width); what is above does not run."""

        def leave(_: nn.Module, __: Any, output: Any) -> None:
            raise _Left(output if isinstance(output, Tensor) else output[0])

        handle = self.layers[self.count - 1].register_forward_hook(leave)
        try:
            self.body(**batch)
        except _Left as left:
            return left.states
        finally:
            handle.remove()
        raise RuntimeError("the layers are not called")

    @contextmanager
    def replaced(self, embeddings: nn.Module, layers: nn.ModuleList) -> Iterator[None]:
        """In here the model has other `embeddings` and `layers`."""
        before = self.whole
        self._put(embeddings, layers)
        try:
            yield
        finally:
            self._put(*before)

    def _put(self, embeddings: nn.Module, layers: nn.ModuleList) -> None:
        setattr(self.body, self.embeddings, embeddings)
        setattr(self.parent, self.name, layers)


class _Left(Exception):  # noqa: N818  no error
    def __init__(self, states: Tensor) -> None:
        self.states = states


class _Given(nn.Module):
    """What stands for the prefix: it gives what it has been given."""

    states: Tensor | None = None

    def forward(self, *_: Any, **__: Any) -> Tensor | None:
        return self.states


def find_cut(model: PreTrainedModel | PeftModel) -> Cut | None:
    """The highest cut below which nothing of a model is trained or adapted, if there is one."""
    base = _headed(model)
    body, count = base.base_model, getattr(base.config, "num_hidden_layers", 0)
    embeddings = next((name for name in _EMBEDDINGS if isinstance(getattr(body, name, None), nn.Module)), "")
    if not embeddings or not _is_frozen(getattr(body, embeddings)) or _counts_layers(base, embeddings):
        return None
    for parent in body.modules():
        for name, layers in parent.named_children():
            if isinstance(layers, nn.ModuleList) and len(layers) == count:
                frozen = next((index for index, layer in enumerate(layers) if not _is_frozen(layer)), count)
                return Cut(body, embeddings, parent, name, frozen) if frozen else None
    return None


def _counts_layers(model: PreTrainedModel, embeddings: str) -> bool:
    """Whether a model tells the kinds of its layers by their numbers, as decoders with a sliding window do."""
    return embeddings == "embed_tokens" and len(set(getattr(model.config, "layer_types", None) or [])) > 1


def _headed(model: PreTrainedModel | PeftModel) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _is_frozen(module: nn.Module) -> bool:
    adapted = any(isinstance(part, BaseTunerLayer) for part in module.modules())
    return not adapted and not any(parameter.requires_grad for parameter in module.parameters())


def find_prefix(
    recipe: Recipe,
    args: TrainingArguments,
    model: PreTrainedModel | PeftModel,
    collate: Collate,
    rows: Dataset,
    reporter: Reporter,
) -> tuple[FrozenPrefix | None, str]:
    """The frozen prefix of `model`, which is ready to be trained or scored on encoded `rows`; None if there is none.

    Returns:
        It, and a sentence that says what it does, or how it could be had; else "".
    """
    cut = None if any(_hindrances(recipe, args)) else find_cut(model)
    if cut is None:
        return None, ""
    what = f"the embeddings and {cut.count} of {len(cut.layers)} layers are frozen"
    if _drops(cut):
        return None, f"{what}; without dropout (model_dropout: 0) their outputs would be computed once for each row."
    for first_token in (True, False) if cut.count == len(cut.layers) else (False,):
        prefix = FrozenPrefix(model, cut, collate, args, reporter, first_token=first_token)
        if prefix.agrees(rows) and prefix.batches(rows):
            return prefix, f"{what}, and their outputs are computed once for each row (frozen_prefix: false does not)."
        prefix.detach()
    return None, ""


def expected_prefix(recipe: Recipe, args: TrainingArguments, model: PreTrainedModel | PeftModel) -> str:
    """What steps that are taken without the frozen prefix leave out of account, as a sentence; "" is nothing."""
    cut = None if any(_hindrances(recipe, args)) else find_cut(model)
    if cut is None or _drops(cut):
        return ""
    frozen = f"the embeddings and {cut.count} of {len(cut.layers)} layers"
    return f"In training {frozen} are computed once for each row; the steps here compute them, and so take longer."


def _drops(cut: Cut) -> bool:
    """Whether there is dropout below."""
    rates = dropout_rates(cut.body.config).items()
    return any(rate for name, rate in rates if not any(part in name for part in _OF_HEADS))


def _hindrances(recipe: Recipe, args: TrainingArguments) -> Iterator[Any]:
    """What is true if the prefix is not to be cut off, or what comes out of it is not a function of the row alone."""
    training, adapter = recipe.training_fields, recipe.adapter_fields or {}
    yield not recipe.frozen_prefix
    yield not recipe.task.type.architecture.new_head
    yield args.world_size > 1 or args.gradient_checkpointing or args.torch_compile
    yield training.get("neftune_noise_alpha")
    yield training.get("include_num_input_tokens_seen", "no") not in ("no", False)
    yield adapter.get("alora_invocation_tokens")


class FrozenPrefix:
    """Computes what comes out of the prefix, keeps it, and has the model begin with it where a batch brings it.

    Args:
        model: What is trained or scored; from now on it takes `STATES` in place of what the prefix would give.
        collate: Makes a batch of encoded rows.
        first_token: Whether what is above looks at the first token alone, so that no other is kept.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        cut: Cut,
        collate: Collate,
        args: TrainingArguments,
        reporter: Reporter,
        *,
        first_token: bool,
    ) -> None:
        self._model, self._cut, self._collate, self._first = model, cut, collate, first_token
        self._reporter = reporter
        self._device, self._autocast = args.device, TYPES[precision_of(args)]
        self._size = args.per_device_train_batch_size
        self._type, self._width = torch.float32, 0  # of what comes out
        self._made: dict[str, Batches | None] = {}
        self._given = _Given()
        self._whole = cut.whole
        self._above = self._given, nn.ModuleList(cut.layers[cut.count :])
        self._headed = _headed(model)
        self._headed.forward = self._begin_above(self._headed.forward)

    def detach(self) -> None:
        """Leave the model as it was."""
        del self._headed.forward

    def cut_off(self) -> AbstractContextManager[None]:
        """In here a model with an adapter is without its prefix, so that no loop over its modules comes to that.

        A model without one is saved whole in checkpoints.
        """
        return self._cut.replaced(*self._above) if isinstance(self._model, PeftModel) else nullcontext()

    def agrees(self, rows: Dataset) -> bool:
        """Whether the model gives the same logits above the prefix as in one piece, on a few of encoded `rows`."""
        order = numbers(rows, "length").argsort(kind="stable").tolist()
        batch = self._inputs(rows, sorted({order[0], order[-1], 0, len(rows) - 1}))
        with self._scoring():
            whole = self._model(**batch).logits
            try:
                states = self._cut.run(batch)
                self._type, self._width = states.dtype, states.shape[-1]
                if self._first:
                    batch, states = {name: tensor[:, :1] for name, tensor in batch.items()}, states[:, :1]
                above = self._model(**batch, **{STATES: states}).logits
            except (RuntimeError, AttributeError, TypeError, ValueError):  # a model of another build
                return False
        return bool((above - whole).abs().max() <= _ROUNDING.get(whole.dtype, 5e-2) * whole.abs().max())

    def batches(self, rows: Dataset) -> Batches | None:
        """What makes batches of encoded `rows` of their numbers, all computed by then; None if they cannot be kept."""
        key = rows._fingerprint
        if key not in self._made:
            self._made[key] = None
            with suppress(OSError):  # no room, or no folder to write to
                self._made[key] = self._make(rows)
        return self._made[key]

    def _make(self, rows: Dataset) -> Batches | None:
        order, tokens = numbers(rows, "length").argsort(kind="stable"), self._tokens(rows)
        if not fits(int(tokens.sum()) * self._width * self._type.itemsize):
            return None
        begins = np.empty_like(tokens)
        begins[order] = tokens[order].cumsum() - tokens[order]
        file = kept_file(self._name(rows), functools.partial(self._write, rows, order))
        states = torch.from_file(str(file), size=int(tokens.sum()) * self._width, dtype=self._type)
        labels = torch.from_numpy(numbers(rows, "labels").copy())
        ids, pad = self._ids(rows.select(order)), self._headed.config.get_text_config().pad_token_id
        return functools.partial(_batch, states.view(-1, self._width), ids, pad, begins, tokens, labels)

    def _write(self, rows: Dataset, order: NDArray[np.int64], file: BinaryIO) -> None:
        pieces = _of_one_length(numbers(rows, "length")[order], self._size)
        with self._cut.replaced(*self._whole), self._scoring(), self._reporter.task("frozen layers") as shown:
            for begin, end in pieces:
                states = self._cut.run(self._inputs(rows, order[begin:end].tolist()))
                file.write(_bytes(states[:, :1] if self._first else states))
                shown.update(end, len(order))

    def _tokens(self, rows: Dataset) -> NDArray[np.int64]:
        """Of each row, how many tokens are kept."""
        return np.ones(len(rows), np.int64) if self._first else numbers(rows, "length").astype(np.int64)

    def _ids(self, rows: Dataset) -> NDArray[np.int64]:
        """Of each token that is kept, row after row: a decoder's head looks for the last that is no padding."""
        of_rows = [[0] * len(rows)] if self._first else numbers(rows, "input_ids")
        return np.concatenate(of_rows, dtype=np.int64)

    def _inputs(self, rows: Dataset, chosen: list[int]) -> Batch:
        batch = self._collate(rows.select(chosen).to_list())
        return {name: tensor.to(self._device) for name, tensor in batch.items() if name != "labels"}

    @contextmanager
    def _scoring(self) -> Iterator[None]:
        with evaluating(self._model), autocasting(self._device, self._autocast):
            yield

    def _begin_above(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(plain)
        def forward(*arguments: Any, states: Tensor | None = None, **options: Any) -> Any:
            self._given.states = states
            with self._cut.replaced(*(self._whole if states is None else self._above)):
                return plain(*arguments, **options)

        return forward

    def _name(self, rows: Dataset) -> str:
        """A digest of all that decides what comes out of `rows`."""
        found = self._digest.copy()
        names = [name for name in _INPUTS if name in rows.column_names]
        for piece in rows.select_columns(names).with_format("arrow").iter(CHUNK):
            for name in names:
                column = piece.column(name).combine_chunks()
                for part in (column.value_lengths(), column.flatten()):
                    found.update(np.ascontiguousarray(part.to_numpy()))
        return f"{found.hexdigest()}.states"

    @functools.cached_property
    def _digest(self) -> Any:
        """Of all that decides it but the rows: with these weights, in these versions, on this device."""
        cpu = torch.backends.cpu.get_cpu_capability()
        facts = [versions(), device_name(), cpu, self._autocast, self._size, self._first, self._cut.count]
        found = hashlib.sha256(repr([*facts, self._cut.body.config.to_json_string()]).encode())
        for part in self._cut.below():
            for name, tensor in part.state_dict().items():
                found.update(name.encode())
                found.update(_bytes(tensor))
        return found


def _of_one_length(lengths: NDArray[Any], size: int) -> Iterator[tuple[int, int]]:
    """Where pieces begin and end of sorted `lengths`, each of one length and no longer than `size`."""
    changes = np.flatnonzero(np.diff(lengths)) + 1
    for begin, end in pairwise([0, *changes.tolist(), len(lengths)]):
        yield from ((at, min(at + size, end)) for at in range(begin, end, size))


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _batch(
    states: Tensor,
    ids: NDArray[np.int64],
    pad: int,
    begins: NDArray[np.int64],
    tokens: NDArray[np.int64],
    labels: Tensor,
    chosen: Sequence[int],
) -> Batch:
    """A batch of the `chosen` rows, as a collator pads them; the states of padding are those of the last token.

    Args:
        states, ids: (tokens of all rows, width) and (tokens of all rows,).
        pad: The id of padding.
        begins, tokens: Of each row, where its tokens begin and how many it has.
    """
    rows = np.asarray(chosen)
    ends = tokens[rows][:, None] - 1
    places = np.arange(ends.max() + 1)
    inside, within = places <= ends, begins[rows][:, None] + np.minimum(places, ends)
    return {
        "input_ids": torch.from_numpy(np.where(inside, ids[within], pad)),
        "attention_mask": torch.from_numpy(inside.astype(np.int64)),
        "labels": labels[torch.from_numpy(rows)],
        STATES: states[torch.from_numpy(within)],
    }
