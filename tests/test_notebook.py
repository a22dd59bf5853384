"""The notebook runs as it stands, with fewer steps, seeds, rows and tokens, and holds what a whole run of it showed."""

import base64
import json
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "ggpo_in_five_minutes.ipynb"


SHORTER = {"STEPS = 36": "STEPS = 2", "SEEDS = [0, 1]": "SEEDS = [0]", "=120": "=48", "range(64)": "range(24)"}
SHORTER |= {"max_length=32": "max_length=12", "batch_size=8": "batch_size=4"}


def shortened(notebook):
    """`notebook` with fewer steps, seeds, rows and tokens."""
    for long, short in SHORTER.items():
        (cell,) = [cell for cell in notebook.cells if cell.cell_type == "code" and long in cell.source]
        cell.source = cell.source.replace(long, short)
    return notebook


def test_the_notebook_runs(tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = shortened(nbformat.read(NOTEBOOK, as_version=4))
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert "The noise reaches all 37 adapted layers." in text
    assert "the same logits: True" in text
    assert re.search(r"wrong label, accuracy +0\.\d{3} +0\.\d{3}\n", text)
    assert not any("GGPO" in output.text for output in outputs if output.get("name") == "stderr")  # it warns of nothing
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(tmp_path.iterdir())


def test_what_is_stored_is_what_a_whole_run_showed():
    cells = [cell for cell in json.loads(NOTEBOOK.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data"}
    text = "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")
    assert "each of seeds [0, 1]" in text
    assert not re.search(r"/home|/root|/tmp|/Users|/work", text)
    (image,) = [output["data"]["image/png"] for output in outputs if "data" in output]
    assert 1_000 < len(base64.b64decode("".join(image))) < 60_000
