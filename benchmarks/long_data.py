"""Memory and time of a fine-tuning run over files of JSON lines of growing length: the peak does not grow with them.

    python benchmarks/long_data.py --rows 100000 1000000 10000000 --output docs/results/long_data.json

Each length is one `lora-ggpo train`: ten steps of task sft on SmolLM2-135M, four rows a step, with 1,000 rows to
validate and 1,000 to test on, 16 of which are scored. The rows are the bundled film reviews over and over, each with a
number, so that no two are the same. Anonymous memory is what no file stands behind (RssAnon of Linux): what is mapped
from files the system can drop at any time. Both are peaks over samples, in bytes, until the first step is done and of
the whole run. With other work on the machine, processor seconds say more than those of the clock.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from lora_ggpo.data import DataConfig, LabelReader

HELD_OUT = 1000


def write_rows(path: Path, rows: int) -> None:
    """Prompts with a number, and completions that are film reviews."""
    reviews = LabelReader.load(DataConfig(source="movie-reviews")).train["text"][:]
    with path.open("w", encoding="utf-8") as file:
        for row, review in zip(range(rows), itertools.cycle(reviews), strict=False):
            file.write(json.dumps({"prompt": f"Write review {row} of a film.\n", "completion": review}) + "\n")


def write_recipe(path: Path, data: Path, rows: int) -> None:
    """Ten steps on `data`; what it writes goes beside it."""
    recipe = {
        "model": "smollm2",
        "task": {"kind": "sft", "max_length": 256},
        "data": {"source": str(data), "validation_fraction": HELD_OUT / rows, "test_fraction": HELD_OUT / rows},
        "adapter": {"r": 16, "target_modules": "all-linear"},
        "ggpo": {"rule": "relative", "beta": 0.5},
        "training": {"max_steps": 10, "per_device_train_batch_size": 4, "logging_steps": 1, "use_cpu": True},
        "score_rows": 16,
        "precision": "fp32",
        "output": str(path.parent / "runs"),
    }
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")


def memory(process: int) -> dict[str, int]:
    """Bytes that a process has, and those of them that no file stands behind; nothing once it has ended."""
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
        return {name: 1024 * int(status[key].split()[0]) for name, key in (("anonymous", "RssAnon"), ("all", "VmRSS"))}
    except (OSError, KeyError):
        return {}


def processor_seconds(process: int) -> float:
    """What a process has taken so far, in all its threads."""
    user, system = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def watch(process: subprocess.Popen[bytes], log: Path) -> dict[str, float]:
    """Peaks of memory, and seconds until the first step is in the `log`."""
    begun, found, until_step = time.perf_counter(), dict.fromkeys(("anonymous", "all"), 0), dict[str, float]()
    while process.poll() is None:
        for name, size in memory(process.pid).items():
            found[name] = max(found[name], size)
        if not until_step and log.is_file() and log.stat().st_size:
            until_step = {
                "processor_seconds_to_step_1": processor_seconds(process.pid),
                "seconds_to_step_1": round(time.perf_counter() - begun, 1),
                **{f"peak_{name}_to_step_1": size for name, size in found.items()},
            }
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(process.returncode)
    return {**until_step, **{f"peak_{name}": size for name, size in found.items()}}


def measure(rows: int, cache: str) -> dict[str, float]:
    """One run over a file of so many rows, which has its folder for temporary files for itself."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        data, recipe = folder / "rows.jsonl", folder / "recipe.yaml"
        write_rows(data, rows)
        write_recipe(recipe, data, rows)
        command = [sys.executable, "-m", "lora_ggpo.cli", "train", str(recipe)]
        process = subprocess.Popen(command, env={**os.environ, "XDG_CACHE_HOME": cache, "TMPDIR": name})
        return {"rows": rows, "file_bytes": data.stat().st_size, **watch(process, folder / "runs/seed-0/log.jsonl")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    found = []
    with TemporaryDirectory() as cache:
        unpack = "from lora_ggpo.models.load import load_model; load_model('smollm2')"
        subprocess.run([sys.executable, "-c", unpack], env={**os.environ, "XDG_CACHE_HOME": cache}, check=True)
        for rows in args.rows:
            found.append(measure(rows, cache))
            print(json.dumps(found[-1]), flush=True)
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
