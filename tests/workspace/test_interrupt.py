import os
import signal

import pytest

from lora_ggpo.workspace import interrupt
from lora_ggpo.workspace.interrupt import Interrupted, Terminated, exit_code, raise_terminated, two_stage_interrupt

KINDS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}


@pytest.fixture(autouse=True)
def _as_in_the_command_line():
    before = signal.signal(signal.SIGTERM, raise_terminated)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("number", KINDS)
def test_the_first_asks_and_the_second_stops(number, monkeypatch):
    monkeypatch.setattr(interrupt, "TOGETHER", 0)
    before = [signal.getsignal(one) for one in KINDS]
    said = []
    with two_stage_interrupt(lambda: said.append("stopping")) as request:
        assert not request.made
        os.kill(os.getpid(), number)
        assert request.made
        assert isinstance(request.reason, KINDS[number])
        assert said == ["stopping"]
        with pytest.raises(KINDS[number]):
            os.kill(os.getpid(), number)
    assert [signal.getsignal(one) for one in KINDS] == before


def test_sigterm_of_a_scheduler_and_of_the_launcher_that_passes_it_on_is_one():
    with two_stage_interrupt(lambda: None) as request:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert request.made


@pytest.mark.parametrize(("reason", "code"), [(Terminated(), 143), (KeyboardInterrupt(), 130), (None, 130)])
def test_the_exit_code_tells_the_signal(reason, code):
    with pytest.raises(Interrupted) as raised:
        raise Interrupted("Stopped.") from reason
    assert exit_code(raised.value) == code
