"""From the name of a source to its tables."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path

import datasets

from lora_ggpo.data.bundled import BUNDLED, GENERAL_TEXT, read_bundled
from lora_ggpo.data.files import SPLIT_NAMES, has_known_suffix, read_file, read_folder
from lora_ggpo.data.table import Table
from lora_ggpo.errors import UserError, first_line
from lora_ggpo.workspace.libraries import quiet_loading
from lora_ggpo.workspace.paths import expand_home

ALL = "all"  # the one table of a source that has no splits
FURTHER_TESTS = ("validation_mismatched",)  # splits that are test sets beside "test"
OWN_SETS = frozenset({"train", "train-clean", "train-noisy", "validation", "test", GENERAL_TEXT, *FURTHER_TESTS})
"""Names of a run's own sets."""


def settle(source: str) -> str:
    """`source` as it means the same in any working directory: a local file or folder by its absolute path.

    Raises:
        ValueError: it is no path that can be.
    """
    path = expand_home(source)
    local = os.path.exists(path) or has_known_suffix(path) or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", path)
    return os.path.abspath(path) if local and source not in BUNDLED else source


def set_names(sources: Sequence[str], taken: Collection[str]) -> dict[str, str]:
    """What sets of rows from `sources` are called: a path by its shortest end that tells it from all others.

    Args:
        taken: Names of other sets.
    """
    paths = {source: Path(source).parts for source in sources if os.path.isabs(source)}
    for depth in range(1, 1 + max(map(len, paths.values()), default=0)):
        names = {source: "/".join(parts[-depth:]) for source, parts in paths.items()}
        others = {*taken, *(source for source in sources if source not in paths)}
        if len(set(names.values())) == len(names) and not others & set(names.values()):
            return {source: names.get(source, source) for source in sources}
    return {source: source for source in sources}


def read_tables(source: str, subset: str | None = None, columns: Sequence[str] | None = None) -> dict[str, Table]:
    """Return the tables of a bundled set, file, folder or hub dataset by split, or the one table as "all".

    The splits are "train", "validation", "test" and those of `FURTHER_TESTS`.

    A bundled name comes first, then a local path, then the hub. `columns` are as `read_file` takes them.
    """
    if source in BUNDLED and columns is None:
        return read_bundled(source)
    try:
        path = Path(settle(source))
    except ValueError as error:
        raise UserError(f"The data {source!r} {error}.") from error
    if os.path.isdir(path):
        return read_folder(path, columns)
    if path.is_absolute():
        return {ALL: read_file(path, columns)}
    if columns is not None:
        raise UserError(f"data.columns is for CSV and TSV files without a header, but {source} is none; drop it.")
    near = difflib.get_close_matches(source, BUNDLED, n=1, cutoff=0.85)
    if near:
        raise UserError(f"There is no bundled data {source!r}; did you mean {near[0]!r}?")
    return read_hub(source, subset)


def read_hub(name: str, subset: str | None) -> dict[str, Table]:
    """Return a hub dataset's tables by split, as `read_folder` does for files; no code of the dataset is run."""
    shown = f"{name} ({subset})" if subset else name
    try:
        with quiet_loading():
            loaded = datasets.load_dataset(name, subset)
    except Exception as error:  # what the hub client and the file readers behind it raise is open-ended
        reason = first_line(error).rstrip(".")
        raise UserError(
            f"The data {shown} is no local file and could not be loaded from the hub ({reason}); "
            f"{_nearest(name)}check the name and data.subset, or give a local file or folder as data.source."
        ) from error
    found = {SPLIT_NAMES[str(split)]: (split, data) for split, data in loaded.items() if str(split) in SPLIT_NAMES}
    if not found:
        raise UserError(f"The hub data {shown} has no train, validation or test split, only {', '.join(loaded)}.")
    return {name: Table.of_arrow(data.data.table, f"{shown} {split}") for name, (split, data) in found.items()}


def _nearest(name: str) -> str:
    """A question after the file or folder beside `name` whose name is nearest; nothing if none is near."""
    parent, last = os.path.split(name)
    try:
        near = difflib.get_close_matches(last, os.listdir(parent or "."), n=1)
    except OSError:
        return ""
    return f"did you mean {os.path.join(parent, near[0])!r}? Otherwise " if near else ""
