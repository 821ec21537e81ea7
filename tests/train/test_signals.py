import os
import signal
import threading

import pytest

from lora_jax.train.signals import stop_requests


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_asks_and_second_acts(number, capsys):
    class Second(Exception):
        pass

    def raise_second(*_):
        raise Second

    before = signal.signal(number, raise_second)
    try:
        with stop_requests() as requested:
            assert requested() == ""
            os.kill(os.getpid(), number)
            assert requested() == signal.Signals(number).name
            with pytest.raises(Second):
                os.kill(os.getpid(), number)
        assert signal.getsignal(number) is raise_second
    finally:
        signal.signal(number, before)
    assert "saving the state first" in capsys.readouterr().err


def test_other_threads_run_without():
    seen = []

    def work():
        with stop_requests() as requested:
            seen.append(requested())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [""]
