"""The ranks' command line through the shells of other machines."""

import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magnetar.data.errors import UserError
from magnetar.engine.cluster.arguments import opened, require_plain_surroundings, sealed

HARMFUL = ['{"a":[1,2]}', "cost$3_a", "a b", "", "a;b", "x(y)&*?", "~/x", "50%n", "'", '"', "=ls"]
HARMFUL += ["`id`", "a\\b", "ä", "caf\udce9", "a\nb", "!x", "#x", "<x>", "a|b", "[a]"]


@pytest.mark.parametrize("text", HARMFUL)
@pytest.mark.parametrize("shell", ["sh", "bash", "dash"])
def test_what_a_shell_would_change_comes_out_of_it_as_it_went_in(text: str, shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}")
    words = ["--deepspeed_config", "runs/my.json", "--set", text]
    joined = " ".join(["printf", r"'%s\n'", "--local_rank=0", *sealed(words)])  # as pdsh's does
    done = subprocess.run([shell, "-c", joined], capture_output=True, text=True, check=True)
    assert opened(done.stdout.splitlines()) == ["--local_rank=0", *words]
    assert "%" not in "".join(sealed(words))


@given(st.lists(st.text(), max_size=4))
def test_any_words_survive_and_plain_ones_stay_readable(words: list[str]) -> None:
    assert opened(sealed(words)) == words
    assert sealed(["--set", "magnetar.training.num_steps=5"])[1].endswith("num_steps=5")


@pytest.mark.parametrize("code", ["", "x", "e30", "WzFd", "/w", "runs/my.json"])
def test_what_was_not_sealed_is_refused(code: str) -> None:
    with pytest.raises(UserError, match=r"written by magnetar train alone: give JSON and --set"):
        opened(["--words", code])


def test_folders_and_variables_that_a_shell_would_change_are_refused(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("my runs", "cost$3", "a;b"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        with pytest.raises(UserError, match=r"the current folder, '.*use one of letters, digits"):
            require_plain_surroundings()
    (tmp_path / "my_runs").mkdir()
    monkeypatch.chdir(tmp_path / "my_runs")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth$0")
    with pytest.raises(UserError, match=r"NCCL_SOCKET_IFNAME='eth\$0' goes to shells"):
        require_plain_surroundings()
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth0,eth 1")
    require_plain_surroundings()
