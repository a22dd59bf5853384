"""Kill training runs at random moments, resume them, and compare them with one that was left alone.

`kill_runs` needs a process of its own: it does the run that is left alone, and then forks a child for each life of a
run. It prints what became of them as one line of JSON.

The process has to begin with OMP_NUM_THREADS=1: a child of one whose OpenMP has begun threads may wait for ever.
"""

import gc
import json
import os
import random
import re
import resource
import signal
import sys
import threading
import time
import traceback
from collections import Counter

import torch

from lora_ggpo.recipe.recipe import parse_recipe
from lora_ggpo.training.run import train
from lora_ggpo.training.validation import kept_step
from lora_ggpo.workspace.progress import Reporter
from tests.recipes import GUIDED, recipe_text, write_rows

SEED, STEPS = 20260611, 6
PHASES = {  # what is being written, by its path in the run folder
    "seal": r"checkpoints/.*sealed\.json",
    "checkpoint": r"checkpoints/",
    "log": r"\.?log\.jsonl",
    "weights": r"\.adapter\.partial",
    "scores": r"predictions|\.metrics|training\.png",
}


def kill_runs(folder, model, wanted):
    """Kill runs of a `model` in `folder` as many times as are `wanted`, torn writes not counted."""
    rows = [{"text": f"the {'film ' * (n % 5)}{n}", "label": ["bad", "good"][n % 2]} for n in range(24)]
    data = write_rows(folder / "data.jsonl", rows)

    def run(name):
        text = recipe_text(
            model,
            data,
            folder / name,
            task={"kind": "causal-classification", "template": "{text} ="},
            data={"label_noise": 0.25},
            adapter={"lora_dropout": 0.1},
            ggpo=GUIDED,
            training={"max_steps": STEPS, "save_steps": 1},
            validate_every=2,
            keep="best",
        )
        train(parse_recipe(text, "r"), Reporter(quiet=True))

    began = time.monotonic()
    run("whole")
    expected, seconds = _result(folder / "whole" / "seed-0"), time.monotonic() - began
    assert kept_step(expected[0]) in (2, 4), "the weights that are kept must not be the last ones"
    assert threading.active_count() == torch.get_num_threads() == 1, "a fork would lose the other threads"
    gc.collect()
    gc.freeze()
    chance = random.Random(SEED)
    kills, lives, different = Counter(), Counter(), []
    while kills.total() - kills["torn write"] < wanted:
        name = f"run-{lives['finished']}"
        way = ["delay", "torn write", *PHASES][lives["begun"] % (2 + len(PHASES))]
        lives["begun"] += 1
        killed = _live(lambda name=name: run(name), folder / name / "seed-0", way, seconds, chance)
        if killed:
            kills[way] += 1
        else:
            lives["finished"] += 1
            if _result(folder / name / "seed-0") != expected:
                different.append(name)
    run(name)
    if _result(folder / name / "seed-0") != expected:
        different.append(name)
    print(json.dumps({"kills": kills, "lives": lives, "different": different}))


def _live(work, folder, way, seconds, chance):
    """Do `work` in a child until it is killed in the given `way`; return whether it was, or finished before that."""
    delay, nth, size = chance.uniform(0, seconds / 3), chance.randint(1, 8), chance.randint(0, 200)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if way == "torn write":
                _tear(folder, 5 * nth, size)
            elif way != "delay":
                _kill_at(folder, way, nth)
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if way == "delay":
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    deaths = {-signal.SIGXFSZ} if way == "torn write" else {-signal.SIGKILL}
    assert status in {0, *deaths}, f"a life that was to end by {way} ended with {status}"
    return status != 0


def _kill_at(folder, phase, nth):
    """Kill this process as it is about to make the nth change to the run folder in `phase`."""
    seen = 0

    def watch(event, arguments):
        nonlocal seen
        path = _changed(event, arguments, folder)
        if path is not None and _phase(path) == phase:
            seen += 1
            if seen == nth:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def _tear(folder, nth, size):
    """Let the kernel kill this process in the middle of a write: to the nth file that it opens for writing."""
    seen = 0

    def watch(event, arguments):
        nonlocal seen
        path = _changed(event, arguments, folder) if event == "open" else None
        if path is not None:
            seen += 1
            if seen == nth:
                there = (folder / path).stat().st_size if str(arguments[1]).startswith("a") else 0
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                resource.setrlimit(resource.RLIMIT_FSIZE, (there + size, resource.RLIM_INFINITY))

    sys.addaudithook(watch)


def _changed(event, arguments, folder):
    """The path in `folder` that an audit event is about to change, or None."""
    if event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
        return None
    path = str(arguments[0])
    if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
        return None
    return path.removeprefix(f"{folder}/") if path.startswith(f"{folder}/") else None


def _phase(path):
    return next((phase for phase, pattern in PHASES.items() if re.match(pattern, path)), None)


def _result(folder):
    """All that a run computed."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    log = [{key: value for key, value in row.items() if key not in ("seconds", "peak_memory_bytes")} for row in rows]
    files = [folder / "adapter" / "adapter_model.safetensors", *sorted((folder / "predictions").iterdir())]
    evaluation = json.loads((folder / "metrics.json").read_text())["evaluation"]
    return log, {file.name: file.read_bytes() for file in files}, evaluation
