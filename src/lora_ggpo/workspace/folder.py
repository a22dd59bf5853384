"""Before work begins in a folder it is made, locked, and compared with what it already holds.

A run, a comparison, a set of measurements and an evaluation each write down in their folder what decides their
results. A second command finds the same there and goes on, or is told which settings differ.
"""

from __future__ import annotations

import errno
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from lora_ggpo.errors import UserError
from lora_ggpo.workspace.files import disk_errors, new_file_mode, read_json, write_json

_SHOWN = 5
# What flock says on file systems without it: NFS without its lock service, some that are served by programs.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EIO, errno.EBADF, errno.EINVAL)


@contextmanager
def claim(
    folder: Path,
    settings: Mapping[str, Any],
    other: str,
    *,
    file: str = "settings.json",
    begun: str | None = None,
    new: Collection[str] = (),
    further: Mapping[str, Any] | None = None,
) -> Iterator[None]:
    """Work in `folder`, which is to hold results of `settings` alone; they are written to `file`.

    Args:
        settings: What decides the results, as JSON holds it.
        other: What the folder holds if they differ, such as "an evaluation with other settings".
        begun: Pattern of the files whose results would be spoilt by other settings; None: `file` itself is enough.
        new: Settings that an earlier release did not write down. Any other that is missing counts as None.
        further: What is written beside the settings, whatever stood there. All else in `file` is kept.

    Raises:
        UserError: the folder holds something else, or results without `file`; it is in use, or cannot be written.
    """
    with work_in(folder):
        place = folder / file
        held = place.is_file() if begun is None else any(path != place for path in folder.glob(begun))
        there = read_json(place) if held else {}
        if not isinstance(there, dict):
            raise UserError(f"{place} is damaged: it holds no settings; choose another --output.")
        known = {name: there.get(name) for name in settings if held and (name in there or name not in new)}
        refuse_changes(f"{folder} holds {other}", known, {name: settings[name] for name in known}, "--output")
        write_json(place, {**there, **settings, **(further or {})})
        yield


@contextmanager
def work_in(folder: Path, *, alone: bool = True) -> Iterator[None]:
    """Make `folder` and keep other processes out; what the disk refuses becomes one sentence.

    Args:
        alone: False lets this process in beside the one that holds the folder.

    Raises:
        UserError: another process works there, or the folder cannot be written.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder) if alone else nullcontext():
            yield


def refuse_changes(
    found: str,
    there: Mapping[str, Any],
    here: Mapping[str, Any],
    option: str,
    *,
    free: Collection[tuple[str, ...]] = (),
) -> None:
    """Compare the settings that a folder holds with those of this command.

    Args:
        found: The beginning of the sentence: what holds other settings.
        option: What names the folder.
        free: Settings that may differ.

    Raises:
        UserError: some differ; the first few are named.
    """
    changed = list(differences(there, here, free))
    if changed:
        shown = "; ".join(f"{name} is {one} there and {another} here" for name, one, another in changed[:_SHOWN])
        more = f"; and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
        raise UserError(f"{found}: {shown}{more}; choose another {option}.")


def differences(
    one: Mapping[str, Any], other: Mapping[str, Any], apart_from: Collection[tuple[str, ...]] = ()
) -> Iterator[tuple[str, Any, Any]]:
    """The settings that two nested mappings do not share: dotted name, value in the one, value in the other."""
    left, right = leaves(one), leaves(other)
    for path in {**left, **right}:
        pair = left.get(path, "not set"), right.get(path, "not set")
        if path not in apart_from and repr(pair[0]) != repr(pair[1]):
            yield ".".join(map(str, path)), *pair


def leaves(values: Any, path: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], Any]:
    """The settings inside `values`, which is one itself or nested mappings of them, by path from `path` on."""
    if isinstance(values, Mapping) and values:
        return {key: leaf for name, value in values.items() for key, leaf in leaves(value, (*path, name)).items()}
    return {path: list(values) if isinstance(values, tuple) else values}  # JSON knows lists alone


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keep other processes out of `folder`, which must exist.

    Where the file system has no locks, a file takes their place. One left by a process that has ended on this machine
    is ignored.

    Raises:
        UserError: another process holds it.
    """
    taken = _lock_or_file(folder)
    try:
        yield
    finally:
        with suppress(OSError):  # the system releases it when the process ends
            taken.release()


def _lock_or_file(folder: Path) -> BaseFileLock:
    in_use = f"{folder} is in use by another process; wait for it, or choose another output"
    mode = new_file_mode(folder)
    try:
        return _take(FileLock(folder / ".lock", mode=mode), f"{in_use}.")
    except NotImplementedError:
        pass
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    file = folder / ".lock.held"
    return _take(SoftFileLock(file, mode=mode), f"{in_use} (if there is none, on any machine, delete {file}).")


def _take(lock: BaseFileLock, in_use: str) -> BaseFileLock:
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(in_use) from error
    return lock
