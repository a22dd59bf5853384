"""Where runs are carried out, and how: processes of this machine, or a Ray cluster.

Nothing heavy is imported here: a worker must set its number of threads before torch is.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import signal
import socket
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

from lora_ggpo.errors import DivergedError, UserError, first_line
from lora_ggpo.workspace.interrupt import exit_code, raise_terminated
from lora_ggpo.workspace.libraries import importing, quiet_bitsandbytes

FAILURE = "failed.json"
TERMINATED = 128 + signal.SIGTERM


class LocalPool:
    """`jobs` fresh processes that share the cores of this machine, or the threads that OMP_NUM_THREADS allows.

    Attributes:
        width: Number of calls to have under way; None hands all over at once.
    """

    def __init__(self, jobs: int) -> None:
        self.width: int | None = jobs  # a call that waits in the executor's queue could not be withdrawn
        allowed = os.environ.get("OMP_NUM_THREADS", "")
        threads = max(1, (int(allowed) if allowed.isdecimal() else os.cpu_count() or 1) // jobs)
        context = multiprocessing.get_context("spawn")  # a forked torch may hang in its thread pools
        self._executor = ProcessPoolExecutor(jobs, context, initializer=_begin, initargs=(threads,))

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Call `function` in a worker."""
        return self._executor.submit(_run_interruptibly, function, *arguments)

    def stop(self) -> None:
        """Ask for a clean stop of what is under way, as Ctrl-C would; a second time, to stop at once."""
        for process in multiprocessing.active_children():
            if process.pid:
                os.kill(process.pid, signal.SIGINT)

    def close(self) -> None:
        """Wait for the workers to end."""
        self._executor.shutdown()

    def abandon(self) -> None:
        """End the workers at once; after `close` there are none."""
        for process in multiprocessing.active_children():
            process.kill()


def _begin(threads: int) -> None:
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.setpgrp()  # Ctrl-C reaches the parent alone, which passes it on
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker that outlived its parent would hold the lock of a run, and refuse it to who starts again at once."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run_interruptibly(function: Callable[..., Any], *arguments: Any) -> Any:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, raise_terminated)
    try:
        return function(*arguments)
    except KeyboardInterrupt as error:
        if exit_code(error) == TERMINATED:
            os._exit(TERMINATED)  # the executor would wait for its next call
        raise
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class RayPool:
    """Tasks of a Ray cluster, one a run, on a file system that all nodes share.

    Args:
        address: Of the cluster, as ``ray.init`` takes it (``auto``, ``host:port``, ``ray://host:port``).
        cpus: Cores that a run takes.
        gpus: GPUs that a run takes.

    Raises:
        UserError: Ray is not installed, or the cluster does not answer.
    """

    width: int | None = None

    def __init__(self, address: str, cpus: int, gpus: float) -> None:
        try:
            ray: Any = importlib.import_module("ray")
        except ImportError as error:
            raise UserError("--ray needs Ray; install it with: pip install 'lora-ggpo[ray]'") from error
        try:
            _knock(address)
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(f"--ray {address}: the cluster does not answer: {first_line(error)}") from error
        self._ray, self._options = ray, {"num_cpus": cpus, "num_gpus": gpus, "max_retries": 0}

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """As `LocalPool`."""
        task: Future[Any] = self._ray.remote(**self._options)(function).remote(*arguments).future()
        return task

    def stop(self) -> None:
        """Do nothing: closing ends the tasks, and runs resume from their checkpoints."""

    def close(self) -> None:
        """Leave the cluster, which ends the tasks that are left."""
        self._ray.shutdown()


def _knock(address: str) -> None:
    """Fail at once where nothing listens: Ray would go on trying for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon:
        socket.create_connection((host, int(port)), timeout=10).close()


Pool = LocalPool | RayPool
"""Where calls are carried out."""


def load_libraries() -> None:
    """Import what a run takes: in a worker, while the recipe is still being checked."""
    quiet_bitsandbytes()
    warnings.simplefilter("ignore")  # every worker would give them again
    with importing():
        importlib.import_module("lora_ggpo.training.run")


def carry_out(name: str, values: dict[str, Any], folder: Path) -> None:
    """Train and score the recipe `values`, of which `name` is the file, in its `folder`.

    A run that fails by itself, such as by a loss that is not finite, leaves `FAILURE` there: it is a result too.

    Raises:
        UserError: what would stop the other runs as well.
        Interrupted: Ctrl-C; a checkpoint has been saved.
    """
    load_libraries()
    import torch

    from lora_ggpo.recipe.recipe import check_recipe
    from lora_ggpo.recipe.source import Source
    from lora_ggpo.training.run import train
    from lora_ggpo.workspace.files import write_json
    from lora_ggpo.workspace.progress import Reporter

    try:
        train(check_recipe(Source(name, values, {}, {})), Reporter(quiet=True))
    except DivergedError as error:
        write_json(folder / FAILURE, {"message": str(error)})
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
