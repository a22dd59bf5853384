"""Run a comparison or a study: what is missing of it, and nothing twice."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, closing
from typing import Any

from lora_ggpo.comparison.axes import Values
from lora_ggpo.comparison.grid import Grid, PlannedRun
from lora_ggpo.comparison.pool import FAILURE, Pool, carry_out
from lora_ggpo.comparison.results import validation_score, write_results
from lora_ggpo.errors import UserError
from lora_ggpo.recipe.recipe import check_recipe
from lora_ggpo.statistics.metrics import METRICS
from lora_ggpo.training.advice import warn_of_runs
from lora_ggpo.workspace.files import read_json, read_json_lines, write_json
from lora_ggpo.workspace.folder import claim
from lora_ggpo.workspace.interrupt import Interrupted
from lora_ggpo.workspace.libraries import device_name, versions
from lora_ggpo.workspace.progress import Reporter, Task

LOOK_SECONDS = 1.0
"""Between two looks at the logs of runs that are under way."""

SHOWN_RUNS = 2
"""Runs under way whose step and loss are shown, at most."""


def run_comparison(grid: Grid, make_pool: Callable[[], Pool], command: str, reporter: Reporter) -> None:
    """Carry out what is missing of `grid` and write its results to ``grid.output``.

    ``tuning.jsonl``, ``runs.jsonl``, ``curves.jsonl`` and ``facts.json`` are functions of the run folders alone: they
    come out the same however often the comparison was stopped on the way.

    Raises:
        UserError: bad input, a full disk, or a folder that holds another comparison or is in use.
        KeyboardInterrupt: Ctrl-C; running runs have saved a checkpoint.
    """
    with _claim(grid, command):
        tuning = grid.tuning()
        with (
            reporter.task("study" if grid.study else "compare") as shown,
            closing(_Progress(grid, shown, make_pool)) as progress,
        ):
            progress.carry_out(tuning)
            runs = grid.final(choose(grid, tuning))
            progress.carry_out(runs)
        write_results(grid, tuning, runs)


def advise(grid: Grid) -> None:
    """Warn once of what experience says of the baseline in each setting, if nothing is run yet: workers are silent."""
    final = grid.final()
    if not any(run.folder.exists() for run in (*grid.tuning(), *final)):
        first = (grid.methods[0], grid.seeds[0])
        warn_of_runs([run.recipe for run in final if (run.method, run.seed) == first])


def choose(grid: Grid, tuning: Sequence[PlannedRun]) -> dict[tuple[str, str], Values] | None:
    """The values of each setting and method that score best on the validation set; None without tuning.

    Raises:
        UserError: no trial of a method has a score.
    """
    sign = 1 if METRICS[grid.metric].higher_is_better else -1
    best: dict[tuple[str, str], tuple[float, Values]] = {}
    for run in tuning:  # trial by trial, so that the first of equals is kept
        score = validation_score(run, grid.metric)
        key, order = (run.setting, run.method.name), -math.inf if score is None else sign * score
        if key not in best or order > best[key][0]:
            best[key] = order, run.values
        if run.trial == grid.trials - 1 and best[key][0] == -math.inf:
            title = run.method.title
            raise UserError(f"{title}: the loss of every tuning trial stopped being finite; lower the rates.")
    return {key: values for key, (_, values) in best.items()} or None


class _Progress:
    def __init__(self, grid: Grid, task: Task, make_pool: Callable[[], Pool]) -> None:
        final = len(grid.seeds) * len(grid.settings) * len(grid.methods)
        self._grid, self._task, self._make_pool = grid, task, make_pool
        self._done, self._total = 0, len(grid.tuning()) + final
        self._pool: Pool | None = None

    def carry_out(self, runs: Sequence[PlannedRun]) -> None:
        """Carry out those of `runs` that are neither finished nor failed."""
        ends = ("metrics.json", FAILURE)
        missing = [run for run in runs if not any((run.folder / name).is_file() for name in ends)]
        self._done += len(runs) - len(missing)
        self._task.skip(len(runs) - len(missing))
        self._task.update(self._done, self._total)
        if not missing:
            return
        _note_environment(self._grid)
        self._pool = self._pool or self._make_pool()
        self._carry_out(missing, self._pool)

    def close(self) -> None:
        """Wait for the workers to end."""
        if self._pool is None:
            return
        try:
            self._pool.close()
        except KeyboardInterrupt:  # a second Ctrl-C
            self._pool.stop()
            self._pool.close()
            raise

    def _carry_out(self, runs: Sequence[PlannedRun], pool: Pool) -> None:
        waiting = iter(runs)
        running = {self._submit(run, pool): run for run in itertools.islice(waiting, pool.width)}
        try:
            while running:
                ended = wait(running, timeout=LOOK_SECONDS, return_when=FIRST_COMPLETED).done
                if not ended:
                    self._show(running.values())
                for future in ended:
                    run = running.pop(future)
                    future.result()
                    self._done += 1
                    self._task.update(self._done, self._total, _name(run))
                    running |= {self._submit(run, pool): run for run in itertools.islice(waiting, 1)}
        except BrokenProcessPool as error:
            raise UserError(
                "A worker process was killed, perhaps for want of memory; give the same command again, "
                "with fewer --jobs, to go on from there."
            ) from error
        except KeyboardInterrupt as error:
            pool.stop()
            raise Interrupted(
                f"Stopped after {self._done} of {self._total} runs; give the same command again to go on from there."
            ) from error

    def _submit(self, run: PlannedRun, pool: Pool) -> Future[Any]:
        self._task.skip(_share(run, _last_row(run)))  # of an earlier session
        return pool.submit(carry_out, "the recipe", run.recipe.resolved(run.seed), run.folder.absolute())

    def _show(self, runs: Iterable[PlannedRun]) -> None:
        """Say how far `runs` are, from their logs."""
        last = [(run, row) for run in runs if (row := _last_row(run))]
        notes = [f"{_name(run)} step {row['step']}, loss {row['loss']:.3f}" for run, row in last[:SHOWN_RUNS]]
        part = sum(_share(run, row) for run, row in last)
        self._task.update(self._done, self._total, "; ".join(notes), part)


def _last_row(run: PlannedRun) -> dict[str, Any]:
    """What the log of a run says last of its loss; nothing before the first step."""
    return next((row for row in reversed(read_json_lines(run.folder / "log.jsonl")) if "loss" in row), {})


def _share(run: PlannedRun, row: Mapping[str, Any]) -> float:
    """Which share of its steps a run has done whose last logged row is `row`."""
    if not row:
        return 0.0
    training = run.recipe.training
    steps, epochs = training.max_steps, training.num_train_epochs  # type: ignore[attr-defined]
    return min(1.0, float(row["step"] / steps if steps > 0 else row["epoch"] / epochs))


def _name(run: PlannedRun) -> str:
    what = f"trial {run.trial}" if run.trial is not None else f"seed {run.seed}"
    return f"{run.method.name} {what}{f' ({run.setting})' if run.setting else ''}"


def _claim(grid: Grid, command: str) -> AbstractContextManager[None]:
    """Hold the folder; methods and seeds may be added to what is there, and to a study settings and a first method."""
    recipe = check_recipe(grid.source)
    general = [recipe.forgetting.source] if recipe.forgetting else []
    fixed = {
        "recipe": _as_json(grid.source.values),
        "trials": grid.trials,
        "metric": grid.metric,
        # From the root: paths as the recipe writes them lead elsewhere from another folder.
        "place of its files": [recipe.model, recipe.data.source, *recipe.data.out_of_domain, *general],
    }
    free = {"methods": [method.name for method in grid.methods], "seeds": list(grid.seeds), "command": command}
    (free if grid.study else fixed).update(settings=_as_json(grid.settings), baseline=grid.methods[0].name)
    held = f"a {'study' if grid.study else 'comparison'} with other settings"
    return claim(grid.output, fixed, held, file="facts.json", new=("place of its files",), further=free)


def _note_environment(grid: Grid) -> None:
    """Add to facts.json what runs are made with from now on, if none was before."""
    here = {"versions": versions(), "device": device_name(), "cpus": os.cpu_count()}
    facts = read_json(grid.output / "facts.json")
    known = facts.get("environments", [])
    if here not in known:
        write_json(grid.output / "facts.json", {**facts, "environments": [*known, here]})


def _as_json(values: Any) -> Any:
    """`values` of a recipe in types that JSON gives back as they were; the others (dates, infinity) as text."""
    return json.loads(json.dumps(values, default=str), parse_constant=lambda name: str(float(name)))
