"""Run a comparison or a study: what is missing of it, and nothing twice."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from lora_ggpo.comparison.axes import Values
from lora_ggpo.comparison.plan import Job, Plan
from lora_ggpo.comparison.pool import Pool
from lora_ggpo.comparison.worker import FAILURE, carry_out
from lora_ggpo.errors import UserError
from lora_ggpo.recipe.recipe import check_recipe
from lora_ggpo.report.analysis import METRICS
from lora_ggpo.workspace.files import disk_errors, read_json, read_json_lines, write_json, write_json_lines
from lora_ggpo.workspace.folder import lock
from lora_ggpo.workspace.interrupt import Interrupted
from lora_ggpo.workspace.libraries import device_name, versions
from lora_ggpo.workspace.progress import Reporter, Task


def run_comparison(plan: Plan, make_pool: Callable[[], Pool], command: str, reporter: Reporter) -> None:
    """Carry out what is missing of `plan` and write its results to ``plan.output``.

    ``tuning.jsonl``, ``runs.jsonl``, ``curves.jsonl`` and ``facts.json`` are functions of the run folders alone: they
    come out the same however often the comparison was stopped on the way.

    Raises:
        UserError: bad input, a full disk, or a folder that holds another comparison or is in use.
        KeyboardInterrupt: Ctrl-C; running runs have saved a checkpoint.
    """
    with disk_errors(plan.output):
        plan.output.mkdir(parents=True, exist_ok=True)
        with lock(plan.output):
            _claim(plan, command)
            tuning = plan.tuning()
            final = len(plan.seeds) * len(plan.settings) * len(plan.methods)
            with reporter.task("study" if plan.study else "compare") as shown:
                progress = _Progress(shown, len(tuning) + final, lambda: _note_environment(plan))
                progress.carry_out(tuning, make_pool)
                chosen = choose(plan, tuning)
                runs = plan.final(chosen)
                progress.carry_out(runs, make_pool)
            write_json_lines(plan.output / "tuning.jsonl", [_trial(job, plan.metric) for job in _sorted(plan, tuning)])
            write_json_lines(plan.output / "runs.jsonl", [_run(job) for job in _sorted(plan, runs)])
            write_json_lines(plan.output / "curves.jsonl", [_curve(job) for job in _sorted(plan, runs)])


def choose(plan: Plan, tuning: Sequence[Job]) -> dict[tuple[str, str], Values]:
    """The values of each setting and method that score best on the validation set; the usual ones without tuning.

    Raises:
        UserError: no trial of a method has a score.
    """
    chosen: dict[tuple[str, str], Values] = {}
    for setting in plan.settings:
        for method in plan.methods:
            if not tuning:
                chosen[setting, method.name] = plan.candidates(method)[0]
                continue
            jobs = [job for job in tuning if (job.setting, job.method.name) == (setting, method.name)]
            scores = [(_order(score(job, plan.metric), plan.metric), -(job.trial or 0), job.values) for job in jobs]
            best = max(scores, key=lambda entry: entry[:2])
            if best[0] == -math.inf:
                raise UserError(
                    f"{method.title}: the loss of every tuning trial stopped being finite; lower the rates."
                )
            chosen[setting, method.name] = best[2]
    return chosen


def score(job: Job, metric: str) -> float | None:
    """The validation metric of a finished run; None if it failed."""
    if (job.run_folder / FAILURE).is_file():
        return None
    value = read_json(job.run_folder / "metrics.json")["evaluation"]["validation"][metric]["value"]
    return None if value is None else float(value)


def _order(value: float | None, metric: str) -> float:
    if value is None:
        return -math.inf
    return value if METRICS[metric].higher_is_better else -value


class _Progress:
    def __init__(self, task: Task, total: int, begin: Callable[[], None]) -> None:
        self._task, self._total, self._begin, self._done = task, total, begin, 0

    def carry_out(self, jobs: Sequence[Job], make_pool: Callable[[], Pool]) -> None:
        """Run those of `jobs` that are neither finished nor failed."""
        missing = [job for job in jobs if not _is_finished(job)]
        self._done += len(jobs) - len(missing)
        self._task.begin(self._done)
        self._task.update(self._done, self._total)
        if missing:
            self._begin()
            pool = make_pool()
            try:
                self._carry_out(missing, pool)
            finally:
                _close(pool)

    def _carry_out(self, jobs: Sequence[Job], pool: Pool) -> None:
        waiting = iter(jobs)
        running = {_submitted(job, pool): job for job in itertools.islice(waiting, pool.width)}
        try:
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(future)
                    future.result()
                    self._done += 1
                    self._task.update(self._done, self._total, _name(job))
                    running |= {_submitted(job, pool): job for job in itertools.islice(waiting, 1)}
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


def _close(pool: Pool) -> None:
    try:
        pool.close()
    except KeyboardInterrupt:  # a second Ctrl-C
        pool.stop()
        pool.close()
        raise


def _submitted(job: Job, pool: Pool) -> Future[Any]:
    return pool.submit(carry_out, "the recipe", job.recipe.resolved(job.seed), job.run_folder.absolute())


def _is_finished(job: Job) -> bool:
    return any((job.run_folder / name).is_file() for name in ("metrics.json", FAILURE))


def _name(job: Job) -> str:
    what = f"trial {job.trial}" if job.trial is not None else f"seed {job.seed}"
    return f"{job.method.name} {what}{f' ({job.setting})' if job.setting else ''}"


def _claim(plan: Plan, command: str) -> None:
    """Write down what is compared, or check that it is what the folder holds.

    Raises:
        UserError: the folder holds a comparison of another recipe or with other choices.
    """
    fixed = {
        "recipe": _plain(plan.source.values),
        "trials": plan.trials,
        "metric": plan.metric,
        "baseline": plan.methods[0].name,
    }
    # Methods and seeds may be added to what is there, and settings to a study.
    grown = {"methods": [method.name for method in plan.methods], "seeds": list(plan.seeds), "command": command}
    (grown if plan.study else fixed)["settings"] = _plain(plan.settings)
    recipe = check_recipe(plan.source)
    # From the root: paths as the recipe writes them lead elsewhere from another folder.
    places = {"place of its files": [recipe.model, recipe.data.source, *recipe.data.out_of_domain]}
    fixed |= places
    file = plan.output / "facts.json"
    facts: dict[str, Any] = {}
    if file.is_file():
        facts = places | read_json(file)  # an earlier release did not write them down
        changed = [name for name, value in fixed.items() if facts.get(name) != value]
        if changed:
            held = "study" if plan.study else "comparison"
            raise UserError(f"{plan.output} holds a {held} with another {changed[0]}; choose another --output.")
    write_json(file, {"environments": facts.get("environments", []), **fixed, **grown})


def _note_environment(plan: Plan) -> None:
    """Add to facts.json what runs are made with from now on, if none was before."""
    here = {"versions": versions(), "device": device_name(), "cpus": os.cpu_count()}
    facts = read_json(plan.output / "facts.json")
    if here not in facts["environments"]:
        write_json(plan.output / "facts.json", {**facts, "environments": [*facts["environments"], here]})


def _plain(value: Any) -> Any:
    """`value` of a recipe in types that JSON gives back as they were; the others (dates, infinity) as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(part) for part in value]
    known = value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))
    return value if known else str(value)


def _sorted(plan: Plan, jobs: Iterable[Job]) -> list[Job]:
    settings, methods = list(plan.settings), [method.name for method in plan.methods]
    return sorted(
        jobs, key=lambda job: (settings.index(job.setting), methods.index(job.method.name), job.seed, job.trial or 0)
    )


def _identity(job: Job) -> dict[str, Any]:
    return {"setting": job.setting, "method": job.method.name, "title": job.method.title}


def _failure(job: Job) -> str | None:
    file = job.run_folder / FAILURE
    return read_json(file)["message"] if file.is_file() else None


def _trial(job: Job, metric: str) -> dict[str, Any]:
    found = {"values": dict(job.values), "score": score(job, metric), "metric": metric, "failed": _failure(job)}
    return {**_identity(job), "trial": job.trial, "seed": job.seed, **found}


def _run(job: Job) -> dict[str, Any]:
    failed = _failure(job)
    metrics: Mapping[str, Any] = {} if failed else read_json(job.run_folder / "metrics.json")
    return {
        **_identity(job),
        "seed": job.seed,
        "chosen": dict(job.values),
        "evaluation": metrics.get("evaluation", {}),
        "training": metrics.get("training", {}),
        "failed": failed,
    }


def _curve(job: Job) -> dict[str, Any]:
    keys = ("step", "epoch", "loss", "seconds")
    rows = [
        {key: value for key, value in row.items() if key in keys or key.startswith("validation/")}
        for row in read_json_lines(job.run_folder / "log.jsonl")
    ]
    return {**_identity(job), "seed": job.seed, "rows": rows}
