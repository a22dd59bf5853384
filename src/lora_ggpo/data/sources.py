"""From the name of a source to its tables."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from lora_ggpo.data.bundled import BUNDLED, read_bundled
from lora_ggpo.data.files import has_known_suffix, read_file, read_folder
from lora_ggpo.data.hub import read_hub
from lora_ggpo.data.table import Table
from lora_ggpo.errors import UserError

ALL = "all"  # the one table of a source that has no splits
FURTHER_TESTS = ("validation_mismatched",)  # splits that are test sets beside "test"


def read_source(source: str, subset: str | None = None, columns: Sequence[str] | None = None) -> dict[str, Table]:
    """Return the tables of a bundled set, file, folder or hub dataset by split, or the one table as "all".

    The splits are "train", "validation", "test" and those of `FURTHER_TESTS`.

    A bundled name comes first, then a local path, then the hub. `columns` are as `read_file` takes them.

    Raises:
        UserError: there is no such source, or it cannot be read.
    """
    if source in BUNDLED and columns is None:
        return read_bundled(source)
    path = Path(os.path.expanduser(source))
    if os.path.isdir(path):
        return read_folder(path, columns)
    if os.path.isfile(path) or has_known_suffix(source) or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source):
        return {ALL: read_file(path, columns)}
    if columns is not None:
        raise UserError(f"data.columns is for CSV and TSV files without a header, but {source} is none; drop it.")
    near = difflib.get_close_matches(source, BUNDLED, n=1, cutoff=0.85)
    if near:
        raise UserError(f"There is no bundled data {source!r}; did you mean {near[0]!r}?")
    return read_hub(source, subset)
