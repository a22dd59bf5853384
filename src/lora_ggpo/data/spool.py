"""Rows that are made piece by piece: in memory while they are few, else in files that are mapped into it.

What is mapped takes no memory of its own: the system reads from the file what is looked at, and drops it at will. The
files have no name as soon as they are written, so that they go with the process, whatever ends it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from itertools import chain, groupby
from typing import IO, Any

import numpy as np
import pyarrow
from datasets import Dataset
from datasets.fingerprint import generate_random_fingerprint
from numpy.typing import NDArray

HELD = 2**27
"""Bytes that are held in memory; more go to files, in the folder for temporary ones (TMPDIR)."""

PIECE = 10_000
"""Rows that are copied at a time."""


def spooled(pieces: Iterable[pyarrow.Table]) -> Dataset:
    """The rows of all `pieces`, at least one. A column that some lack is null there, as is a field of a struct."""
    return as_dataset(spooled_table(pieces))


def spooled_table(pieces: Iterable[pyarrow.Table]) -> pyarrow.Table:
    """As `spooled`, in whatever types."""
    pieces = (piece.replace_schema_metadata(None) for piece in pieces)
    held, size = [], 0
    for piece in pieces:
        held.append(piece)
        size += piece.nbytes
        if size > HELD:
            every = chain(_given_up(held), pieces)
            parts = [_mapped(like) for _, like in groupby(every, lambda one: one.schema)]
            return pyarrow.concat_tables(parts, promote_options="permissive")
    return pyarrow.concat_tables(held, promote_options="permissive").combine_chunks()


def as_dataset(table: pyarrow.Table) -> Dataset:
    """A table as datasets has it."""
    return Dataset(table, fingerprint=generate_random_fingerprint())  # without one it takes a digest of all rows


def taken(rows: Dataset, chosen: NDArray[np.int64]) -> Dataset:
    """The `chosen` ones of rows that `spooled` made, in ascending order."""
    table = rows.data.table

    def pieces() -> Iterator[pyarrow.Table]:
        for begin in range(0, max(len(rows), 1), PIECE):
            low, high = np.searchsorted(chosen, (begin, begin + PIECE))
            yield table.slice(begin, PIECE).take(pyarrow.array(chosen[low:high] - begin))

    return spooled(pieces())


def write_pieces(file: IO[bytes], pieces: Iterable[pyarrow.Table]) -> None:
    """Write tables of one schema behind one another, at least one."""
    writer = None
    for piece in pieces:
        writer = writer or pyarrow.ipc.new_stream(file, piece.schema)
        writer.write_table(piece, max_chunksize=PIECE)
    if writer:
        writer.close()
    file.flush()


def read_mapped(path: str | os.PathLike[str]) -> pyarrow.Table:
    """What `write_pieces` wrote, mapped into memory."""
    return pyarrow.ipc.open_stream(pyarrow.memory_map(os.fspath(path))).read_all()


def numbers(rows: Dataset, name: str) -> NDArray[Any]:
    """A column of numbers, which datasets gives row by row."""
    found: NDArray[Any] = rows.select_columns(name).with_format("arrow")[:].column(0).to_numpy()
    return found


def _given_up(held: list[pyarrow.Table]) -> Iterator[pyarrow.Table]:
    while held:
        yield held.pop(0)


def _mapped(pieces: Iterable[pyarrow.Table]) -> pyarrow.Table:
    with tempfile.NamedTemporaryFile(prefix="lora-ggpo-", suffix=".arrow") as file:
        write_pieces(file, pieces)
        return read_mapped(file.name)
