"""Rows that take long to make, kept in files of the user's cache folder by all that they are made from."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path

import pyarrow
from datasets import Dataset

from lora_ggpo.data.spool import HELD, PIECE, as_dataset, read_mapped, spooled, write_pieces
from lora_ggpo.workspace.cache import cache_folder, make_room, new_file, package_state
from lora_ggpo.workspace.files import write_json

LIMIT = 10 * 2**30
"""Bytes that are kept; beyond them the files go that were used the longest ago."""


def kept(made_from: object, make: Callable[[], Iterator[pyarrow.Table]]) -> Dataset:
    """The rows of `make`, made once: they are read from a file from then on, and what it warned of is said again.

    A cache that cannot be read or written is passed over.

    Args:
        made_from: What decides them, this package and its libraries apart; a value of JSON.
        make: Gives them in pieces of one schema, at least one.
    """
    name = sha256(json.dumps([package_state(), made_from], sort_keys=True).encode()).hexdigest()
    file = cache_folder() / "encoded" / f"{name}.arrow"
    with suppress(OSError, ValueError, LookupError, TypeError):  # it is not there, or torn
        rows, told = _read(file)
        for text in told:
            warnings.warn(text, stacklevel=3)
        return rows
    try:
        with _recorded() as told, new_file(file) as opened:
            write_pieces(opened, (piece.replace_schema_metadata(None) for piece in make()))
            written = opened.tell()
        write_json(_seal(file), {"bytes": written, "warnings": told})
        make_room(file, LIMIT)
        return _read(file)[0]
    except OSError:  # a full disk, or a folder that cannot be written to
        return spooled(make())


def digest_of_rows(rows: Dataset) -> str:
    """A digest of the values and types of `rows`, from their form in memory: much faster than that of their JSON."""
    found, arrow = sha256(), rows.with_format("arrow")
    for begin in range(0, len(rows), PIECE):
        piece: pyarrow.Table = arrow[begin : begin + PIECE]
        found.update(str(piece.schema.remove_metadata()).encode())
        for batch in piece.combine_chunks().to_batches():
            found.update(batch.serialize())
    return found.hexdigest()


def _read(file: Path) -> tuple[Dataset, list[str]]:
    seal = json.loads(_seal(file).read_text(encoding="utf-8"))
    if file.stat().st_size != seal["bytes"]:
        raise ValueError(f"{file} is torn")
    table = read_mapped(file)
    for used in (file, _seal(file)):
        os.utime(used)
    return as_dataset(table if seal["bytes"] > HELD else table.combine_chunks()), [
        str(text) for text in seal["warnings"]
    ]


def _seal(file: Path) -> Path:
    """What says how long `file` is, and what was warned of as it was made; written after it."""
    return file.with_suffix(".json")


@contextmanager
def _recorded() -> Iterator[list[str]]:
    """Collect the texts of warnings that users are to read; all are given at the end."""
    texts: list[str] = []
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            yield texts
    finally:
        texts += [str(one.message) for one in told if one.category is UserWarning]
        for one in told:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
