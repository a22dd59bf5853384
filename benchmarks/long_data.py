"""Memory and time of a fine-tuning run over files of JSON lines of growing length: the peak does not grow with them.

    python benchmarks/long_data.py --rows 50000 200000 1000000 --output docs/results/long_data.json

Each length is a process of its own that loads the file, splits it, encodes it, and takes a few steps of task sft on a
small random model, with 1,000 rows to validate and to test on. Memory is that of the process which no file stands
behind (RssAnon of Linux, its peak over samples): what is mapped from files the system can drop at any time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING
from unittest import mock

from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

if TYPE_CHECKING:
    from lora_ggpo.data import DataConfig, Splits

WORDS = [f"{start}{end}" for start in ("film", "plot", "cast", "song", "walk") for end in ("", "s", "ed", "ing", "er")]


def write_rows(path: Path, rows: int) -> None:
    """Prompts of 5 to 15 words and completions of 10 to 60."""
    chance = random.Random(0)
    with path.open("w") as file:
        for row in range(rows):
            prompt, completion = (" ".join(chance.choices(WORDS, k=chance.randint(*k))) for k in ((5, 15), (10, 60)))
            file.write(json.dumps({"prompt": f"{row}: {prompt}", "completion": completion}) + "\n")


def save_model(folder: Path) -> None:
    """A Llama of 2 layers with a tokenizer of its own."""
    tokenizer = Tokenizer(BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([" ".join(WORDS), "0123456789:"] * 9, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=tokenizer.get_vocab_size(), **sizes)).save_pretrained(folder)


class Watch(threading.Thread):
    """Keeps the peak of the memory that no file stands behind, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0

    def run(self) -> None:
        while True:
            self.look()
            time.sleep(0.02)

    def look(self) -> int:
        status = Path("/proc/self/status").read_text()
        self.peak = max(self.peak, 1024 * int(status.partition("RssAnon:")[2].split()[0]))
        return self.peak


def measure(model: Path, data: Path, folder: Path) -> dict[str, float]:
    """Peaks and seconds of loading the data and of the whole run."""
    from lora_ggpo.recipe.recipe import parse_recipe
    from lora_ggpo.training.run import train
    from lora_ggpo.workspace.progress import Reporter

    rows = sum(1 for _ in data.open("rb"))
    share = {"validation_fraction": 1000 / rows, "test_fraction": 1000 / rows}
    recipe = parse_recipe(
        json.dumps(
            {
                "model": str(model),
                "task": {"kind": "sft", "max_length": 512},
                "data": {"source": str(data), **share},
                "adapter": {"r": 4, "target_modules": "all-linear"},
                "ggpo": {"rule": "relative", "beta": 0.5},
                "training": {"max_steps": 5, "per_device_train_batch_size": 8, "use_cpu": True},
                "output": str(folder),
            }
        ),
        "recipe",
    )
    watch = Watch()
    watch.start()
    start, before = time.perf_counter(), watch.look()
    load, loaded = recipe.task.type.load, []

    def watched(config: DataConfig) -> Splits:
        splits = load(config)
        loaded.append((watch.look(), round(time.perf_counter() - start, 1)))
        print("peak in bytes and seconds of loading:", *loaded[0], file=sys.stderr)
        return splits

    with mock.patch.object(recipe.task.type, "load", watched):
        train(recipe, Reporter(quiet=True))
    peak_loading, loading = loaded[0]
    return {
        "rows": rows,
        "file_bytes": data.stat().st_size,
        "before": before,
        "peak_loading": peak_loading,
        "peak": watch.peak,
        "loading_seconds": loading,
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[50_000, 200_000, 1_000_000])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--measure", type=Path, nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(*args.measure)))
        return
    found = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder / "model")
        for rows in args.rows:
            write_rows(folder / "rows.jsonl", rows)
            places = [str(folder / part) for part in ("model", "rows.jsonl", f"runs-{rows}")]
            command = [sys.executable, __file__, "--measure", *places]
            cache = {**os.environ, "XDG_CACHE_HOME": name}  # nothing is encoded yet
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=cache)
            found.append(json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(found[-1]), flush=True)
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
