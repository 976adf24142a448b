import subprocess
import sys
import time

import pytest

from magnetar.engine.cluster.start_times import StartTimes, parsed_times
from tests.ranks import ROOT


def test_the_parts_add_up_to_the_time_since_the_process_began() -> None:
    program = (
        "import time; begun = time.monotonic(); time.sleep(0.3)\n"
        "from magnetar.engine.cluster.start_times import StartTimes\n"
        "times = StartTimes(); times.end('imports'); time.sleep(0.2); times.end('join')\n"
        "print(times, time.monotonic() - begun, sep='|')"
    )
    before = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    most = time.monotonic() - before + 0.05
    text, _, least = done.stdout.partition("|")
    found = parsed_times(text)
    assert list(found) == ["imports", "join"]  # pytest is no launcher
    assert found["join"] == pytest.approx(0.2, abs=0.15)
    total = float(text.split()[0])
    assert float(least) - 0.1 <= total <= most
    assert sum(found.values()) == pytest.approx(total, abs=0.11)


def test_the_launcher_counts_from_its_own_start() -> None:
    inner = (
        "from magnetar.engine.cluster.start_times import StartTimes\n"
        "times = StartTimes(); times.end('imports'); print(times)"
    )
    program = (
        "import subprocess, sys, time; time.sleep(0.3)\n"
        f"subprocess.run([sys.executable, '-c', {inner!r}], check=True)"
    )
    command = [sys.executable, "-c", program, "deepspeed.launcher.launch"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = parsed_times(done.stdout)
    assert list(found) == ["launcher", "imports"]
    assert found["launcher"] >= 0.3


def test_a_part_that_comes_again_is_added() -> None:
    times = StartTimes()
    times.end("load")
    times.end("load")
    assert list(times.seconds) == ["load"]
