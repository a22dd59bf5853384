"""A run that was killed at any moment goes on as if it had not been, and one that runs is left alone."""

import json

import pytest

from lora_ggpo.workspace.folder import lock
from tests.processes import Process
from tests.training.kills import PHASES, kill_runs
from tests.training.runs import assert_same, invoke, refused, trained


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(tiny_llama, tmp_path, pytestconfig):
    """SIGKILL at any time, and in each phase of writing; further times the kernel's end of a write in its middle."""
    kills = 50 if pytestconfig.getoption("thorough") else 8
    process = Process(kill_runs, tmp_path, tiny_llama, kills, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    assert process.wait(timeout=600) == 0, process.stderr
    found = json.loads(process.stdout)
    assert found["different"] == []
    assert set(found["kills"]) == {"delay", "torn write", *PHASES}
    assert sum(found["kills"].values()) - found["kills"]["torn write"] == kills


def test_a_run_that_somebody_else_is_at_is_refused(whole, unfinished):
    """That `lock` keeps other processes out is tested in test_files.py."""
    with lock(unfinished):
        before = (unfinished / "log.jsonl").read_bytes()
        refused(invoke("train", whole[0], f"output={unfinished.parent}"), "is in use by another process; wait for it")
        assert (unfinished / "log.jsonl").read_bytes() == before
    assert_same(trained(whole[0], f"output={unfinished.parent}"), whole[1])


@pytest.mark.parametrize(
    "settings",
    [
        ["adapter.init_lora_weights=pissa"],  # saved with factors of twice the rank
        ["adapter.type=adalora", "ggpo=null", "training.logging_steps=3"],
    ],
)
def test_a_run_killed_in_scoring_ends_with_the_same_metrics_and_a_log_to_the_last_step(whole, settings, tmp_path):
    run = trained(whole[0], f"output={tmp_path}", *settings)
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["training"]["steps"] == 4
    (run / "metrics.json").unlink()
    trained(whole[0], f"output={tmp_path}", *settings)
    again = json.loads((run / "metrics.json").read_text())
    assert again["training"] == metrics["training"]
