"""PEFT's result files are read, and ours are written in their form."""

import json

import pytest

from lora_ggpo.comparison.results import read_results
from lora_ggpo.errors import UserError
from lora_ggpo.report.analysis import analyse
from lora_ggpo.report.comparison import write_report
from lora_ggpo.report.method_comparison import peft_tables, read_peft_results, write_peft_results
from lora_ggpo.workspace.files import write_json_lines
from tests.report.grids import run, write_results
from tests.report.pages import leave_out_pictures
from tests.training.runs import invoke, works

NUMBERS = {  # what PEFT's processing.py makes of each field of a table
    "accelerator_memory_reserved_avg": int,
    "accelerator_memory_max": int,
    "accelerator_memory_reserved_99th": int,
    "train_time": float,
    "file_size": int,
    "num_trainable_params": int,
}


def theirs(experiment, accuracy, forgetting, status="success"):
    """A result as PEFT's run.py writes it, with the fields that its tables are made of."""
    first = {"step": 250, "valid accuracy": 0.3, "train loss": 0.9, "train samples": 1000, "train time": 29.0}
    last = {"step": 5000, "test accuracy": accuracy, "train loss": 0.6, "train samples": 20000}
    last |= {} if forgetting is None else {"forgetting": forgetting}
    return {
        "run_info": {
            "created_at": "2026-07-15T05:41:18+00:00",
            "total_time": 1150.5,
            "experiment_name": experiment,
            "peft_branch": "main",
            "train_config": {"model_id": "meta-llama/Llama-3.2-3B", "dtype": "bfloat16", "batch_size": 4, "seed": 0},
            "peft_config": {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 32, "lora_alpha": 64},
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": 14397338969,
            "accelerator_memory_max": 22292725760,
            "accelerator_memory_reserved_99th": 20120076288,
            "train_time": 941.9,
            "file_size": 36715216,
            "num_trainable_params": 9175040,
            "num_total_params": 3221924864,
            "status": status,
            "metrics": [first, {**last, "train total tokens": 4198051}],
        },
        "meta_info": {"package_info": {"peft-version": "0.19.2.dev0"}, "system_info": {}, "pytorch_info": ""},
    }


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    for one in (
        theirs("lora/rank32", 0.482, 0.13),
        theirs("oft/old", 0.4, None),
        theirs("ia3/off", 0.1, 0.0, "canceled"),
    ):
        name = one["run_info"]["experiment_name"].replace("/", "--")
        (folder / f"{name}.json").write_text(json.dumps(one, indent=2))
    return folder


def test_results_that_ended_well_are_read(results):
    first, second = read_peft_results(results)
    assert first == {
        "experiment": "lora/rank32",
        "model": "meta-llama/Llama-3.2-3B",
        "seed": 0,
        "trainable_parameters": 9175040,
        "accuracy": 0.482,
        "forgetting": 0.13,
    }
    assert (second["experiment"], second["forgetting"]) == ("oft/old", None)


def test_what_is_no_result_is_named(results, tmp_path):
    (results / "notes.json").write_text('{"run_info": {}}')
    with pytest.raises(
        UserError, match=r"notes\.json is no result of PEFT's method_comparison \(KeyError\('train_info'\)\)"
    ):
        read_peft_results(results)
    with pytest.raises(UserError, match="holds no result of PEFT's method_comparison; give its folder"):
        read_peft_results(tmp_path)


def test_they_stand_beside_ours_with_one_seed_and_no_interval(results, tmp_path, monkeypatch):
    leave_out_pictures(monkeypatch)
    runs = [run("lora", seed, {"accuracy": 0.5 + seed / 10}) for seed in range(2)]
    folder = write_results(tmp_path / "out", runs)
    write_json_lines(folder / "peft.jsonl", read_peft_results(results))
    found = read_results(folder)
    (table,) = peft_tables(analyse(found), found)
    assert table.rows == (
        ("LoRA", "2", "–", "55.00 ± 63.53", "–", "1,000"),
        ("PEFT: lora/rank32", "1", "meta-llama/Llama-3.2-3B", "48.20", "0.1300", "9,175,040"),
        ("PEFT: oft/old", "1", "meta-llama/Llama-3.2-3B", "40.00", "–", "9,175,040"),
    )
    write_report(folder)
    assert "Beside PEFT's method\\_comparison, whose results are of one seed each" in (folder / "table.md").read_text()


def test_a_run_in_their_form_has_what_their_tables_need(finished, tmp_path):
    _, ours = finished
    printed = works(invoke("show", ours.folder, "--peft-json", tmp_path / "peft")).output
    (file,) = (tmp_path / "peft").iterdir()
    assert file.name == f"lora-ggpo--{ours.folder.parent.name}-seed-0.json"
    assert file.name in printed.replace("\n", "")
    result = json.loads(file.read_text())
    train, last = result["train_info"], result["train_info"]["metrics"][-1]
    assert {name: type(train[name]) for name in NUMBERS} == NUMBERS
    assert train["accelerator_memory_max"] == -1  # which a run does not measure
    assert train["file_size"] == (ours.folder / "adapter" / "adapter_model.safetensors").stat().st_size
    assert train["num_trainable_params"] == ours.metrics["training"]["trainable_parameters"]
    assert last["step"] == 12
    assert last["train samples"] == 12 * 8
    assert last["test accuracy"] == ours.metrics["evaluation"]["test"]["accuracy"]["value"]
    assert last["forgetting"] is None
    assert result["run_info"]["peft_config"]["peft_type"] == "LORA"
    config = result["run_info"]["train_config"]
    assert (config["seed"], config["max_seq_length"], config["lr_scheduler"]) == (0, 24, "linear")
    assert config["optimizer_kwargs"] == {"lr": 5e-3, "weight_decay": 0.0}
    assert str(ours.folder.parent.parent) not in file.read_text()  # it tells nothing of the machine
    (again,) = read_peft_results(tmp_path / "peft")
    assert again["accuracy"] == last["test accuracy"]


def test_every_library_they_name_has_its_version(finished, tmp_path):
    (file,) = write_peft_results([finished[1]], tmp_path)
    packages = json.loads(file.read_text())["meta_info"]["package_info"]
    assert {name for name, version in packages.items() if version} >= {"peft-version", "torch-version"}
