import os
import signal

import pytest

from lora_ggpo.training.interrupt import two_stage_interrupt


def test_the_first_asks_and_the_second_stops():
    before = signal.getsignal(signal.SIGINT)
    said = []
    with two_stage_interrupt(lambda: said.append("stopping")) as request:
        assert not request.made
        os.kill(os.getpid(), signal.SIGINT)
        assert request.made
        assert said == ["stopping"]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
