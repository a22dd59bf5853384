"""What the results of a comparison keep of a run."""

from types import SimpleNamespace

from lora_ggpo.comparison.results import _curve_row
from lora_ggpo.workspace.files import write_json_lines


def test_curves_say_which_validation_was_the_best(tmp_path):
    log = [
        {"step": 1, "loss": 0.7, "grad_norm": 1.0, "ggpo/tau": 0.1, "seconds": 0.5},
        {"step": 2, "epoch": 0.5, "validation/log_loss": 0.6, "best": True, "seconds": 0.9},
        {"step": 4, "epoch": 1.0, "validation/log_loss": 0.8, "seconds": 1.7},
    ]
    write_json_lines(tmp_path / "log.jsonl", log)
    run = SimpleNamespace(folder=tmp_path, setting="", method=SimpleNamespace(name="lora", title="LoRA"), seed=3)
    first = {"step": 1, "loss": 0.7, "seconds": 0.5}
    wanted = {"setting": "", "method": "lora", "title": "LoRA", "seed": 3, "rows": [first, *log[1:]]}
    assert _curve_row(run) == wanted
