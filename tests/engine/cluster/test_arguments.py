"""The ranks' command line through the shells of other machines."""

import os
import shutil
import string
import subprocess
import tempfile
from argparse import Namespace
from collections import defaultdict
from pathlib import Path

import pytest
from deepspeed.launcher.multinode_runner import PDSHRunner
from hypothesis import given
from hypothesis import strategies as st

from magnetar.data.errors import UserError
from magnetar.engine.cluster.arguments import (
    deepspeed_env,
    exported,
    opened,
    require_plain_surroundings,
    sealed,
)
from magnetar.engine.cluster.hosts import LaunchOptions

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


@given(st.lists(st.text() | st.just("--words"), max_size=4))
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
    with pytest.raises(UserError, match=r"--venv_script, 'my env/activate', goes to shells"):
        require_plain_surroundings({"--master_addr": None, "--venv_script": "my env/activate"})


@pytest.fixture
def env_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "env"
    monkeypatch.setenv("DS_ENV_FILE", str(file))
    return file


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("A=b", "b"),
        (" A = 4 ", "4"),
        ("A=", ""),
        ("A=b=c", "b=c"),
        ("A=a b;c&d (e) * ~ 'f' #g", "a b;c&d (e) * ~ 'f' #g"),
        ("A=$MAGNETAR_TEST/lib:${MAGNETAR_TEST}/bin", "/x/lib:/x/bin"),
        ("A=Grüße", "Grüße"),
    ],
)
def test_a_line_of_deepspeed_env_sets_what_the_launcher_sets(
    env_file: Path, line: str, value: str
) -> None:
    env_file.write_text(f"{line}\n", encoding="utf-8")
    require_plain_surroundings()
    variables, files = deepspeed_env()
    assert files == [env_file]
    launcher = PDSHRunner(Namespace(user_args=[], user_script=""), "")
    launcher.add_export(*line.split("=", maxsplit=1))
    assert exported(variables) == "".join(f"export {k}={v}; " for k, v in launcher.exports.items())
    program = f'{exported(variables)}printf %s "$A"'
    done = subprocess.run(
        ["sh", "-c", program], capture_output=True, env=os.environ | {"MAGNETAR_TEST": "/x"}
    )
    assert done.stdout.decode() == value


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        *((line, "is not NAME=value") for line in ("", "# c", "NAME", "=v", "export A=b", "A-B=c")),
        *((line, "sets ") for line in ("RANK=0", "MASTER_PORT = 1", "PYTHON_MAGNETAR_RUN=x")),
        *((line, "has a value that") for line in ('A="b c"', "A=`id`", "A=a\\b", "A=$(id)")),
        *((line, "has a value that") for line in ("A=$3", "A=b$", "A=50%n", "A=${B:-c}", "A=\x01")),
        ("A=\udce9", "not a text"),
    ],
)
def test_a_line_that_would_not_arrive_is_refused_before_anything_starts(
    env_file: Path, line: str, problem: str, tmp_path: Path
) -> None:
    env_file.write_bytes(f"A=b\n{line}\nC=d\n".encode(errors="surrogateescape"))
    hostfile = tmp_path / "hosts"
    hostfile.write_text("a slots=1\nb slots=1\n")
    options = LaunchOptions(hostfile=hostfile)
    with pytest.raises(UserError, match=problem) as raised:
        options.slots()
    assert str(raised.value).startswith(f"{env_file}")
    if "not a text" not in problem:
        assert f"{env_file}, line 2: " in str(raised.value)
    env_file.write_text("A=b\nC=d\n")  # the way out
    assert options.slots() == {"a": [0], "b": [0]}


VALUES = [
    "$HOME",
    "${HOME}",
    "$",
    "{",
    "}",
    "(",
    ")",
    "`",
    "'",
    '"',
    "\\",
    "!",
    "%",
    "%n",
    "%h",
    "~",
]
VALUES += [
    "*",
    "?",
    "[a]",
    ";",
    "&",
    "|",
    "<",
    "#",
    "=",
    ",",
    " ",
    "  ",
    "b",
    "1",
    "$1",
    "$$",
    "ü",
    "\t",
]


@given(st.lists(st.sampled_from(VALUES), max_size=5).map("".join))
def test_any_value_of_deepspeed_env_is_refused_or_arrives(value: str) -> None:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "env")
        patch.setenv("DS_ENV_FILE", str(file))
        file.write_text(f"A={value}\n", encoding="utf-8")
        try:
            variables, _ = deepspeed_env()
        except UserError:
            return
        launcher = PDSHRunner(Namespace(user_args=[], user_script=""), "")
        launcher.add_export("A", value.strip())
        program = "".join(f"export {k}={v}; " for k, v in launcher.exports.items())
        assert program == exported(variables)
        done = subprocess.run(
            ["sh", "-c", f'{program}printf %s "$A"'],
            capture_output=True,
            text=True,
            env=os.environ | {"HOME": "/x"},
        )
        wanted = string.Template(value.strip()).substitute(defaultdict(str, HOME="/x"))
        assert (done.stdout, done.stderr) == (wanted, "")
