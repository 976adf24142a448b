import os
import signal
import subprocess
import sys
import time

from magnetar.engine.cluster.signals import Requests
from tests.ranks import ROOT


def settled(condition: object) -> None:
    for _ in range(500):
        if condition():  # type: ignore[operator]
            return
        time.sleep(0.01)
    raise AssertionError("nothing has come of the signal")


def test_signals_are_taken_and_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Requests() as requests:
        os.kill(os.getpid(), signal.SIGUSR1)
        settled(lambda: requests.save)
        assert requests.stop == ""
        os.kill(os.getpid(), signal.SIGTERM)
        settled(lambda: requests.stop == "SIGTERM")
        os.kill(os.getpid(), signal.SIGTERM)  # as launchers repeat it
        time.sleep(0.05)
    assert signal.getsignal(signal.SIGTERM) is before


PROGRAM = """
import time
from magnetar.engine.cluster.signals import Requests
with Requests():
    print("ready", flush=True)
    while True:
        time.sleep(1)
"""


def test_ctrl_c_ends_a_program_at_the_second_time_and_not_at_the_first() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 130
    finally:
        process.kill()
