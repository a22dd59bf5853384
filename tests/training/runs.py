"""What the tests of runs and of their folders share."""

import json
import shutil

from typer.testing import CliRunner

from lora_ggpo.cli import app
from lora_ggpo.recipe.recipe import parse_recipe
from lora_ggpo.training.run import train
from lora_ggpo.workspace.progress import Reporter

FEW = ("--rows", 2, "--draws", 2, "--eigenvalues", 0, "--sigma", 0.1, "--rho", 0.001, "--space", "adapter")
USES = {
    "eval": lambda run, out: ["eval", run],
    "merge": lambda run, out: ["merge", run, out],
    "chat": lambda run, out: ["chat", run, "--max-new-tokens", 2],
    "sharpness": lambda run, out: ["sharpness", run, *FEW, "--output", out],
}
"""Commands that load the weights of a run, which may write to a folder `out`."""


def trained(recipe_file, *overrides):
    """The folder of a run of that recipe."""
    return train(parse_recipe(recipe_file.read_text(), "r.yaml", overrides), Reporter(quiet=True))[0].folder


def invoke(*arguments):
    """`lora-ggpo` with these arguments, in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input="hello\n")


def works(result):
    assert result.exit_code == 0, result.output
    return result


def refused(result, message):
    """It ends with one sentence and code 2."""
    assert result.exit_code == 2, result.output
    assert message in result.stderr, result.stderr
    assert "Traceback" not in result.stderr
    *others, _ = result.stderr.splitlines()
    assert not [line for line in others if line.startswith("error: ")]


def unfinish(run):
    """Make of `run` what is left of it if it is killed behind its last checkpoint."""
    (run / "metrics.json").unlink()
    shutil.rmtree(run / "adapter")


def assert_same(run, other):
    """Both folders hold the same log, but for its times, and the same weights."""

    def log(folder):
        rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        return [
            {key: value for key, value in row.items() if key not in ("seconds", "peak_memory_bytes")} for row in rows
        ]

    def weights(folder):
        return (folder / "adapter" / "adapter_model.safetensors").read_bytes()

    assert log(run) == log(other)
    assert weights(run) == weights(other)


def flip(file):
    """Change one bit in the middle of `file`: its length stays."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file):
    """Take the second half of `file` away."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
