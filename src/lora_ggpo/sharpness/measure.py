"""Measure finished runs: one file of results a run, kept, so that nothing is measured twice."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np

from lora_ggpo.data.sources import set_names
from lora_ggpo.errors import UserError
from lora_ggpo.sharpness.landscape import between, filter_direction, line, plane
from lora_ggpo.sharpness.point import GRADIENT, LOSS, PRODUCT, Point, Space, check_space, load_point
from lora_ggpo.sharpness.sharpness import (
    NoiseLaw,
    expected_sharpness,
    flat,
    noise_sizes,
    spectral_density,
    top_eigenvalues,
    trace,
    worst_sharpness,
)
from lora_ggpo.tasks import Measured
from lora_ggpo.training.folder import Run, find_runs, finished_metrics
from lora_ggpo.training.identity import same_model
from lora_ggpo.workspace.files import json_digest, read_json, write_json
from lora_ggpo.workspace.folder import claim
from lora_ggpo.workspace.libraries import quiet_libraries, versions
from lora_ggpo.workspace.progress import Reporter, Task

STARTS = 3
"""Random starts of the spectral density."""

Row = tuple[str, str | None, float | None, Measured]
"""What is measured, the law of its noise, its size or number, and the value."""


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        split: Set of the run that the loss is measured on.
        rows: Rows of it, at most.
        spaces: Parameter spaces.
        sigmas: Sizes of the noise of expected sharpness, relative to the weights.
        draws: Pairs of opposite draws of that noise, and draws of the trace.
        rhos: Radii of worst-case sharpness: root mean square of the relative change.
        eigenvalues: Number of top eigenvalues; 0 leaves out all that needs the Hessian.
        products: Hessian-vector products for the eigenvalues, about, and as many for the spectral density.
        points: Of a slice of the loss, from -1 to 1 (a change of every row by its own length).
        plane: Points a side of a two-dimensional slice; 0 draws none.
    """

    split: str = "train"
    rows: int = 64
    spaces: tuple[Space, ...] = get_args(Space)
    sigmas: tuple[float, ...] = (0.03, 0.1, 0.2)
    draws: int = 10
    rhos: tuple[float, ...] = (0.0003, 0.001)
    eigenvalues: int = 3
    products: int = 45
    points: int = 21
    plane: int = 0


def measure_runs(
    paths: Sequence[Path], settings: Settings, output: Path, reporter: Reporter, base: str | None = None
) -> None:
    """Measure the runs at `paths` (each one run, or a folder of seeds) into ``output/points/*.json``.

    What is there of the same run, as it is now, is not measured again. ``output/measured.json`` then lists the runs of
    this call in its order, which a report is of. A run without an adapter is measured in the space of the weights.

    Args:
        base: Where the runs' base model lies now, if it has moved.

    Raises:
        UserError: a run cannot be measured, or not beside the others, or the folder holds other settings.
    """
    quiet_libraries()
    asked = dataclasses.asdict(settings)
    made = {"versions": versions()}
    with claim(output, {"settings": asked}, "measurements with other settings", further=made):
        (output / "points").mkdir(exist_ok=True)
        runs = label_runs(paths)
        folders = [run.folder for seeds in runs.values() for run in seeds.values()]
        for folder in folders:
            if not same_model(folder, folders[0]):
                raise UserError(f"{folders[0]} and {folder} train different models; give runs of one.")
        own = {run.folder: _settings_of(run, settings, reporter) for seeds in runs.values() for run in seeds.values()}
        measured = [
            {"label": label, "seed": seed, "file": _measure_once(run, name, own[run.folder], output, reporter, base)}
            for label, seeds in runs.items()
            for seed, run in seeds.items()
            for name in [f"{label}/seed-{seed}"]
        ]
        lines = list(_join(runs, settings, output, reporter, base))
        write_json(output / "measured.json", {"runs": measured, "lines": lines})


def label_runs(paths: Sequence[Path]) -> dict[str, dict[int, Run]]:
    """The runs by label and seed; labels are the shortest ends of the paths that tell them apart.

    A folder ``seed-N`` goes by the name of the folder that it is in, any other run by its own.

    Raises:
        UserError: a path is given twice, or is no run.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError("A run is given twice; name each once.")
    found = [(_label_folder(run.folder), run) for path in paths for run in find_runs(path)]
    labels = set_names([folder for folder, _ in found], ())
    runs: dict[str, dict[int, Run]] = {}
    for folder, run in found:
        (seed,) = run.recipe["seeds"]
        runs.setdefault(labels[folder], {})[seed] = run
    return runs


def _settings_of(run: Run, settings: Settings, reporter: Reporter) -> Settings:
    """What of `settings` can be measured of `run`."""
    finished_metrics(run)
    adapter = run.recipe["adapter"] is not None
    if not adapter and settings.spaces == get_args(Space):
        reporter.say(f"{run.folder} has no adapter: it is measured in the space of its weights alone.")
        settings = dataclasses.replace(settings, spaces=("weights",))
    for space in settings.spaces:
        check_space(run.folder, space, adapter=adapter, quantise=run.recipe["quantise"])
    return settings


def _label_folder(run: Path) -> str:
    run = Path(os.path.abspath(run))  # not resolved: a link's name is the user's
    return str(run.parent if run.name.startswith("seed-") else run)


def _measure_once(run: Run, name: str, settings: Settings, output: Path, reporter: Reporter, base: str | None) -> str:
    """The name in ``output/points`` of what is measured of `run`."""
    file = output / "points" / f"{identity(run)}.json"
    if file.is_file():
        reporter.say(f"{name} is measured already.")
        return file.name
    with reporter.task(f"measure {name}") as task:
        began = time.monotonic()
        found = measure(run.folder, settings, task, base)
        facts = {"folder": run.folder.as_posix(), "seconds": round(time.monotonic() - began, 1)}
        write_json(file, {**facts, **found})
    return file.name


def identity(run: Run) -> str:
    """A digest that no other run has, nor the same one trained again: of its results, its data and its weights."""
    return json_digest([finished_metrics(run), read_json(run.folder / "data.json")])


def measure(folder: Path, settings: Settings, task: Task, base: str | None = None) -> dict[str, Any]:
    """Everything of `settings` about the run in `folder`, as JSON holds it."""
    progress = _Progress(task, settings)
    found: dict[str, Any] = {"measures": [], "spectra": {}, "slices": {}, "planes": {}}
    for space in settings.spaces:
        point = load_point(folder, space, settings.split, settings.rows, base=base)
        point = dataclasses.replace(point, computed=progress.add)
        rows = list(_rises(point, space, settings))
        if settings.eigenvalues:
            rows += _curvature(point, settings)
            grid, density, se = spectral_density(point, settings.products // STARTS, STARTS)
            spectrum = {"eigenvalue": grid.tolist(), "density": density.tolist(), "se": se.tolist()}
            found["spectra"][space] = spectrum
        found["measures"] += [
            {"space": space, "measure": measure, "noise": noise, "size": size, **estimate.to_dict()}
            for measure, noise, size, estimate in rows
        ]
        found["slices"][space], found["planes"][space] = _slices(point, settings)
    return found


class _Progress:
    """Counts passes over the sample, of which the total is known about."""

    def __init__(self, task: Task, settings: Settings) -> None:
        noises = sum(len(_laws(space)) for space in settings.spaces) * len(settings.sigmas) * settings.draws * 2 * LOSS
        ascents = len(settings.rhos) * 20 * (LOSS + GRADIENT)
        products = 2 * (settings.products + settings.draws) * PRODUCT if settings.eigenvalues else 0
        slices = (settings.points + settings.plane**2) * LOSS
        self._task, self._done = task, 0
        self._total = noises + len(settings.spaces) * (ascents + products + slices)

    def add(self, passes: int) -> None:
        self._done = min(self._done + passes, self._total)
        self._task.update(self._done, self._total)


def _laws(space: Space) -> tuple[NoiseLaw, ...]:
    laws: tuple[NoiseLaw, ...] = get_args(NoiseLaw)
    return laws if space == "weights" else tuple(law for law in laws if law != "guided")


def _rises(point: Point, space: Space, settings: Settings) -> Iterator[Row]:
    yield "loss", None, None, Measured(point.loss(point.parameters), 0.0, 1)
    for law in _laws(space):
        sizes = noise_sizes(point, law)
        for sigma in settings.sigmas:
            found = expected_sharpness(point, sizes, sigma, settings.draws)
            yield "expected", law, sigma, _check_finite(found, f"under noise of sigma {sigma:g}", "--sigma")
    for rho in settings.rhos:
        yield "worst", None, rho, _check_finite(worst_sharpness(point, rho), f"at rho {rho:g}", "--rho")


def _check_finite(found: Measured, where: str, option: str) -> Measured:
    if not math.isfinite(found.value):
        raise UserError(f"The loss {where} is not finite; give smaller sizes with {option}.")
    return found


def _curvature(point: Point, settings: Settings) -> Iterator[Row]:
    for index, found in enumerate(top_eigenvalues(point, settings.eigenvalues, products=settings.products), 1):
        yield "eigenvalue", None, float(index), found
    yield "trace", None, None, trace(point, settings.draws)
    sizes = flat(noise_sizes(point, "rows"), point.parameters)
    yield "trace", "rows", None, trace(point, settings.draws, sizes=sizes)


def _slices(point: Point, settings: Settings) -> tuple[dict[str, Any], dict[str, Any]]:
    at, sides = (np.linspace(-1, 1, count).tolist() for count in (settings.points, settings.plane))
    first = filter_direction(point, seed=0)
    slice_ = {"at": at, "loss": line(point, first, at).tolist()}
    if not settings.plane:
        return slice_, {}
    values = plane(point, first, filter_direction(point, seed=1), sides, sides)
    return slice_, {"at": sides, "loss": values.tolist()}


def _join(
    runs: Mapping[str, Mapping[int, Run]], settings: Settings, output: Path, reporter: Reporter, base: str | None
) -> Iterator[dict[str, Any]]:
    """Loss on the line from the first label's model of a seed to every other label's model of the same seed."""
    first, *others = runs
    at = np.linspace(0, 1, 11).tolist()
    for other in others:
        for seed in sorted(set(runs[first]) & set(runs[other])):
            ends = runs[first][seed], runs[other][seed]
            file = output / "points" / f"line-{'-'.join(map(identity, ends))}.json"
            if not file.is_file():
                load = partial(load_point, space="weights", split=settings.split, rows=settings.rows, base=base)
                start, end = (load(run.folder) for run in ends)
                with reporter.task(f"line {first} to {other}, seed-{seed}"):
                    values = between(start, end, at)
                write_json(file, {"at": at, "loss": values.tolist()})
            yield {"from": first, "to": other, "seed": seed, "file": file.name}
