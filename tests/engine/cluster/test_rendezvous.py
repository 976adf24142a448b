"""Where ranks meet: at MASTER_ADDR and nowhere else, with a message where they cannot."""

import gc
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import psutil
import pytest

from magnetar.data.errors import MachineError, UserError
from magnetar.engine.cluster import rendezvous
from tests.ranks import ROOT, free_port, run_on_ranks
from tests.runs import environment, make_corpus, records, write_config

Place = Callable[..., None]


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Place:
    """Sets what a launcher leaves in the environment; no other test sees it."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "none")  # so that what is set is unset afterwards
        monkeypatch.delenv(name)
    for name in ("_SECONDS_FOR_THE_PORT", "_TIME_TO_MEET"):
        monkeypatch.setattr(rendezvous, name, 0.3 if "PORT" in name else timedelta(seconds=1))

    def set_variables(host: str, port: int, rank: int = 0, size: int = 1, local: int = 1) -> None:
        for name, value in {
            "MASTER_ADDR": host,
            "MASTER_PORT": port,
            "RANK": rank,
            "WORLD_SIZE": size,
            "LOCAL_SIZE": local,
        }.items():
            monkeypatch.setenv(name, str(value))

    return set_variables


def meet() -> None:
    next(rendezvous._meet("magnetar://", timeout=timedelta(seconds=5)))


def listening_ports() -> set[int]:
    connections = psutil.Process().net_connections("tcp")
    return {found.laddr.port for found in connections if found.status == "LISTEN"}


def test_a_training_listens_at_the_address_of_its_ranks_alone() -> None:
    for places in run_on_ranks("tests.engine.programs:listening_places", 2):
        assert len(places) >= 2  # gloo's, on every rank
        assert {host for host, _ in places} == {"127.0.0.1"}


def test_a_thread_has_a_connection_of_its_own_and_the_port_closes(place: Place) -> None:
    place("127.0.0.1", 0)
    before = listening_ports()
    meet()
    assert len(listening_ports() - before) == 1
    own = rendezvous.another_connection(timedelta(seconds=5))
    own.set("key", "value")
    assert rendezvous.another_connection(timedelta(seconds=5)).get("key") == b"value"
    assert os.environ["GLOO_SOCKET_IFNAME"] == os.environ["NCCL_SOCKET_IFNAME"] == "lo"
    rendezvous.leave_rendezvous()
    del own
    gc.collect()
    assert listening_ports() == before


def test_networks_that_a_user_chose_stay(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place("127.0.0.1", 0)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    meet()
    rendezvous.leave_rendezvous()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"


def test_a_port_in_use_is_named(place: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        place("127.0.0.1", port)
        with pytest.raises(UserError, match=f"MASTER_PORT={port} is in use at 127.0.0.1, by"):
            meet()


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("203.0.113.7", r"MASTER_ADDR=203.0.113.7 is not an address of .*: use one of .*127.0.0.1"),
        ("no-such-host.invalid", "MASTER_ADDR=no-such-host.invalid is not known here"),
        ("127.0.0.1", "MASTER_ADDR=127.0.0.1 is a loopback address"),
    ],
)
def test_an_address_where_rank_0_cannot_serve_is_refused(
    place: Place, host: str, message: str
) -> None:
    place(host, 29400, size=4, local=2)
    with pytest.raises(UserError, match=message):
        meet()


def test_a_forbidden_port_is_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    place("127.0.0.1", 80)
    monkeypatch.setattr(socket.socket, "bind", refuse)
    with pytest.raises(UserError, match=r"MASTER_PORT=80 \(Permission denied\): use others"):
        meet()


def test_ranks_that_do_not_meet_say_where(place: Place) -> None:
    port = free_port()
    place("127.0.0.1", port, rank=1, size=2, local=2)
    with pytest.raises(MachineError, match=f"rank 1 on .* did not meet rank 0 at 127.0.0.1:{port}"):
        meet()
    place("127.0.0.1", port, rank=0, size=2, local=2)
    with pytest.raises(MachineError, match=f"not all 2 ranks reached 127.0.0.1:{port} within"):
        meet()
    assert port not in listening_ports()


def test_a_rank_waits_for_a_port_that_its_predecessor_still_has(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = socket.create_server(("127.0.0.1", 0))
    place("127.0.0.1", other.getsockname()[1])
    monkeypatch.setattr(rendezvous.time, "sleep", lambda _: other.close())
    meet()
    rendezvous.leave_rendezvous()


@pytest.mark.slow
def test_bad_places_end_a_training_with_status_2(tmp_path: Path) -> None:
    config = write_config(tmp_path, make_corpus(tmp_path / "corpus"))
    variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "2"}
    variables |= {"MASTER_ADDR": "203.0.113.7", "MASTER_PORT": "29400"}
    done = subprocess.run(
        [sys.executable, "-m", "magnetar.launchers.train", "--deepspeed_config", str(config)],
        cwd=ROOT,
        env=environment() | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert re.fullmatch(r"error: MASTER_ADDR=203.0.113.7 is not .*\n", done.stderr)


@pytest.mark.slow
def test_torchrun_trains_through_its_agents_store(tmp_path: Path) -> None:
    changes = {"magnetar.training.num_steps": 2}
    config = write_config(tmp_path, make_corpus(tmp_path / "corpus"), changes=changes)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--master-port", str(free_port())),
        *("-m", "magnetar.launchers.train", "--deepspeed_config", str(config)),
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in records(tmp_path / "run") if "loss" in row] == [1, 2]
