import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from deepspeed.launcher import runner
from hypothesis import given
from hypothesis import strategies as st

from magnetar.data.errors import UserError
from magnetar.engine.cluster.hosts import (
    chosen_slots,
    on_hosts,
    read_hostfile,
    require_known,
    ssh_command,
)

PIECES = ["a", "b-1", "me@c", "slots=", "slots", "=", "2", "0", "007", "-1", "9999", "10000", "٣"]
PIECES += [" ", "  ", "\t", "\n", "\n\n", "\r\n", "#", ":", ",", "@", "\x0b", "\x85", "\ufeff", "ü"]
SOUND = ["a slots=2\n", "b-1 slots=4 # big\n", "  me@c\tslots=007\n", "# none\n", "\n"]
HOSTFILES = st.lists(st.sampled_from(SOUND * 3 + PIECES), max_size=8).map("".join)
NODES = ["a", "b-1", "a:0", "b-1:1,3", "b-1:3,1", "c", "a:9", "a:", "a:x", ":", "", "a:0,0", "a:-0"]


def outcome(function: Callable[..., Any], *given: Any) -> Any:
    """What a function returns; None if it refuses."""
    with suppress(ValueError, UserError):
        return function(*given)
    return None


def test_a_hostfile_is_read_as_deepspeed_reads_it(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("# two\n\nnode-2 slots=4\nme@10.0.0.1   slots=2 # the small one\n")
    assert list(read_hostfile(file).items()) == [("node-2", 4), ("me@10.0.0.1", 2)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("node-1 slots=2\nnode-1 slots=2\n", "line 2: 'node-1 slots=2' is named twice"),
        ("node-1\n", "line 1: 'node-1' is not `host slots=N`: mend the line"),
        *(
            (
                f"a slots={text}\n",
                "is not `host slots=N`: mend the line; N is a whole number up to 9999",
            )
            for text in ("9" * 20, "9" * 5000, "2x", "1.5", "-1", "٣")
        ),
        ("-oProxyCommand=reboot slots=2\n", "'-oProxyCommand=reboot' is not the name of one host"),
        ("a slots=1\nexec:b slots=2\n", "line 2: 'exec:b' is not the name of one host: use"),
        ("node[1-4] slots=2\n", "'node[1-4]' is not the name of one host"),
        ("a;reboot slots=2\n", "'a;reboot' is not the name of one host"),
        ("# nothing\n", "names no host: add lines such as `node-1 slots=8`"),
    ],
)
def test_a_wrong_line_is_named(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text(text)
    with pytest.raises(UserError) as raised:
        read_hostfile(file)
    assert words in str(raised.value)


def test_a_missing_hostfile_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--hostfile .*none cannot be read \(No such file"):
        read_hostfile(tmp_path / "none")


@given(HOSTFILES)
def test_any_hostfile_is_refused_or_read_as_deepspeed_reads_it(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "hosts")
        file.write_bytes(text.encode())
        found = outcome(read_hostfile, file)
        if found is not None:
            assert list(found.items()) == list(runner.fetch_hostfile(str(file)).items())


@given(st.lists(st.sampled_from(NODES), min_size=1, max_size=3).map("@".join), st.booleans())
def test_any_choice_is_refused_or_made_as_deepspeed_makes_it(text: str, includes: bool) -> None:
    hosts = {"a": 2, "b-1": 4}
    texts = (text, "") if includes else ("", text)

    def ours() -> Mapping[str, list[int]]:
        require_known(hosts, *texts)
        return chosen_slots(hosts, *texts)

    pool = {host: list(range(count)) for host, count in hosts.items()}
    if text and (found := outcome(ours)) is not None:
        theirs = runner.parse_resource_filter(pool, *texts)
        assert found == {host: sorted(slots) for host, slots in theirs.items()}


def test_slots_are_included_and_excluded_as_deepspeed_does() -> None:
    hosts = {"a": 2, "b": 4}
    assert chosen_slots(hosts) == {"a": [0, 1], "b": [0, 1, 2, 3]}
    assert chosen_slots(hosts, include="b:0,2@a") == {"a": [0, 1], "b": [0, 2]}
    assert chosen_slots(hosts, exclude="a@b:1") == {"b": [0, 2, 3]}
    assert chosen_slots({"a": 2}, include="b:0,2@a:1") == {"a": [1]}  # b was taken out since
    assert chosen_slots({"a": 2}, exclude="a") == {}


def test_ssh_gets_what_pdsh_gets_and_never_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-i 'a key'")
    command = ssh_command("node-1", ["echo", "two words"], port=2222)
    assert command[:3] == ["ssh", "-i", "a key"]
    assert "BatchMode=yes" in command
    assert command[-4:] == ["-p", "2222", "node-1", "echo 'two words'"]


def test_a_quote_that_does_not_end_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-i 'a key")
    with pytest.raises(UserError, match=r"PDSH_SSH_ARGS_APPEND=-i 'a key: No closing quotation: e"):
        ssh_command("node-1", ["true"])


def test_a_host_that_cannot_be_reached_prints_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ssh = tmp_path / "ssh"
    ssh.write_text(
        '#!/bin/sh\ncase "$*" in *good*) echo here;; *slow*) sleep 9;; *) exit 255; esac'
    )
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = on_hosts(["good", "bad", "slow"], ["true"], seconds=0.5)
    assert found == {"good": "here\n", "bad": None, "slow": None}
