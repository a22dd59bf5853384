"""Progress: what a pipe and a terminal show, against a clock of the test's own."""

import io

import pytest
from rich.console import Console

from lora_ggpo.workspace import progress
from lora_ggpo.workspace.progress import Reporter


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


def said(act):
    text = io.StringIO()
    with Reporter(Console(file=text, width=200)).task("work") as task:
        act(task)
    return text.getvalue().splitlines()


def test_what_is_left_is_told_at_the_speed_so_far(clock):
    def act(task):
        clock(60)
        task.update(3, 10, "loss 0.5")  # 20 s a step

    assert said(act) == ["work: 3/10, loss 0.5, 2:20 left"]


def test_what_was_done_before_does_not_count_as_speed(clock):
    def act(task):
        clock(30)  # loading
        task.begin(2)
        clock(20)
        task.update(4, 10)  # 10 s a step
        task.skip(2)  # two more turn out to be done
        clock(20)
        task.update(8, 10)  # 10 s a step still
        clock(20)
        task.update(8, 10, part=1.0)  # 60 s for five

    assert said(act) == ["work: 4/10, 1:00 left", "work: 8/10, 0:20 left", "work: 8/10, 0:12 left"]


def test_a_line_is_not_said_twice(clock):
    def act(task):
        for _ in range(5):
            clock(60)
            task.update(1, 10, "loss 0.5")
        clock(60)
        task.update(1, 10, "loss 0.4")

    assert said(act) == ["work: 1/10, loss 0.5, 9:00 left", "work: 1/10, loss 0.4, 54:00 left"]


def test_the_last_line_is_said_whenever_it_comes(clock):
    def act(task):
        task.update(9, 10)
        task.update(10, 10, "loss 0.5")

    assert said(act) == ["work: 10/10, loss 0.5"]


def test_a_terminal_shows_the_same_time_left(clock):
    text = io.StringIO()
    reporter = Reporter(Console(file=text, width=100, force_terminal=True, color_system=None))
    with reporter.task("work") as task:
        task.begin(2)
        clock(200)  # longer than rich remembers
        task.update(4, 10, "loss 0.5")
    assert "loss 0.5 10:00 left" in text.getvalue()
