"""The command `magnetar`, what it starts, and the commands' former names."""

import argparse
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from magnetar import __version__
from magnetar.data.errors import UserError
from magnetar.launchers import command_of, launch
from magnetar.launchers.main import COMMANDS, main
from magnetar.launchers.terminal.command_line import CONFIGS, find_config, shipped_configs
from magnetar.launchers.train import parse_arguments
from tests.ranks import ROOT

QUICK = str(CONFIGS / "quickstart.json")


def run(*words: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    """A Python of the tests' environment with some arguments, outside any launcher."""
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def ends(arguments: list[str], call: Callable = main) -> object:
    with pytest.raises(SystemExit) as ended:
        call(arguments)
    return ended.value.code


def test_the_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert ends([]) == ends(["--help"]) == 0
    printed = capsys.readouterr().out
    for name in COMMANDS:
        assert printed.count(f"\n  {name} ") == 2


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert ends(["--version"]) == 0
    assert capsys.readouterr().out == f"magnetar {__version__}\n"


def test_a_misspelt_command_is_refused_with_the_nearest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ends(["trian"]) == 2
    printed = capsys.readouterr().err
    assert printed == "error: magnetar has no command 'trian': did you mean `train`?\n"
    assert ends(["xyzzy"]) == 2
    assert "use one of prepare, prepare-pairs, train" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ends([name, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: magnetar {name} ")


@pytest.mark.parametrize("name", sorted({entry[0].split(":")[0] for entry in COMMANDS.values()}))
def test_every_module_of_a_command_runs_as_a_program(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = f"magnetar.launchers.{'train' if name == 'launch' else name}"
    monkeypatch.setattr("sys.argv", [name, "--help"])
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module(module, run_name="__main__")
    assert capsys.readouterr().out.startswith("usage: ")


def test_a_shipped_config_is_found_by_its_name_and_a_file_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert {"quickstart", "lm_xmoe"} <= set(shipped_configs())
    assert "schema" not in shipped_configs()
    assert find_config("lm_xmoe") == find_config("lm_xmoe.json") == CONFIGS / "lm_xmoe.json"
    assert find_config("runs/x.json") == Path("runs/x.json")
    assert find_config("x.json") == Path("x.json")
    (tmp_path / "quickstart.json").write_text("{}")
    assert find_config("quickstart.json") == Path("quickstart.json")  # a file comes first
    with pytest.raises(UserError, match=r"quikstart is neither a file nor .*did you mean quicks"):
        find_config("quikstart")
    with pytest.raises(UserError, match=r"zzz is neither .*use a path, or one of deepnorm_1000"):
        find_config("zzz")


class Started(Exception):
    """Raised in place of becoming the launcher."""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[str], dict[str, str]]]:
    """What `magnetar train` would become: the words after the module's name, and variables."""
    for name in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    # A hostfile's machines are looked for, and the folder is handed to their shells.
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(launch, "_num_gpus", lambda: 0)
    monkeypatch.setattr(launch, "free_port", lambda: 1234)
    monkeypatch.setattr("shutil.which", lambda name: None if name == "sinfo" else name)

    def call(*arguments: str, command: str = "train") -> tuple[list[str], dict[str, str]]:
        words, variables = launch.launcher_command(
            launch.parse_arguments(arguments, command), command
        )
        assert words[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
        return words[3:], variables

    return call


def test_train_starts_as_many_processes_as_the_model_is_spread_over(started: Callable) -> None:
    words, variables = started("quickstart")
    assert words == [
        *("--num_gpus", "2", "--master_port", "1234", "--log_level=error"),
        *("--module", "magnetar.launchers.train", "--deepspeed_config", QUICK),
    ]
    assert variables == {"DS_ACCELERATOR": "cpu"}
    dense = str(CONFIGS / "lm_dense.json")
    assert started(dense)[0][:2] == ["--num_gpus", "1"]


def test_train_hands_on_what_is_the_launchers_own(started: Callable) -> None:
    words, _ = started(
        *("quickstart", "--num-gpus=4", "--master-port", "99", "--save_pid", "--log_level", "info"),
        *("--launcher-args=-v", "--set", "magnetar.training.num_steps=500"),
    )
    assert words == [
        *("--num_gpus", "4", "--master_port", "99", "--save_pid"),
        *("--launcher_args=-v", "--log_level=info"),
        *("--module", "magnetar.launchers.train", "--deepspeed_config", QUICK),
        *("--set", "magnetar.training.num_steps=500"),
    ]


def test_what_a_shell_would_change_reaches_the_ranks_as_it_was_given(started: Callable) -> None:
    settings = ["magnetar.training.run_dir=runs/cost$3 (a)", 'optimizer.params={"lr":1e-3}']
    words, _ = started("quickstart", *(word for text in settings for word in ("--set", text)))
    own = words[words.index("magnetar.launchers.train") + 1 :]
    assert not set("".join(own)) & set('${}() %"')
    options = parse_arguments(["--local_rank=0", *own], "train", "")
    assert (options.config, options.set) == (Path(QUICK), settings)


def test_with_a_hostfile_the_hosts_and_the_launcher_decide(
    started: Callable, tmp_path: Path
) -> None:
    (tmp_path / "hosts").write_text("a slots=1\nb slots=1\nc slots=1\n")
    hosts = str(tmp_path / "hosts")
    words, variables = started("--deepspeed_config", QUICK, "-H", hosts, "--include", "a@b")
    assert words[:4] == ["--hostfile", hosts, "--include", "a@b"]
    assert "--num_gpus" not in words
    assert "--master_port" not in words
    assert variables == {}


def test_with_gpus_the_launcher_takes_all_of_them(
    started: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_num_gpus", lambda: 8)
    words, variables = started("quickstart")
    assert "--num_gpus" not in words
    assert variables == {}
    monkeypatch.setattr(launch, "_num_gpus", lambda: 1)
    with pytest.raises(UserError, match=r"ep_size=2 must divide the 1 ranks"):
        started("quickstart")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--include a:0-1", "--include 'a:0-1': 'a:0-1' is not HOST or HOST:SLOT,SLOT"),
        ("--include a:0.1", "'a:0.1' is not HOST"),
        ("--include a:0,", "'a:0,' is not HOST"),
        ("--include a:", "'a:' is not HOST"),
        ("--include a@", "'' is not HOST"),
        ("--include :0", "':0' is not HOST"),
        ("--include a:x", "'a:x' is not HOST"),
        ("--exclude a:-1", "--exclude 'a:-1': 'a:-1' is not HOST"),
        ("--include a:2", "--include a:2: a has slots=2, numbered from 0: name one below that"),
        ("--include a:99999999999999999999", "is not HOST or HOST:SLOT,SLOT"),
        ("--include node-9", "--include: no host 'node-9' is there: name some of a, b"),
        ("--exclude a@c", "--exclude: no host 'c' is there: name some of a, b"),
        ("--include a@a:1", "names 'a' twice, once for all of its slots: name it once"),
        ("--exclude a@b", "leave no slot of"),
        (
            "--no_ssh --node_rank 2",
            "--no_ssh needs --node_rank, the place of this machine from",
        ),
        ("--no_ssh", "from 0 to 1: give one in place of None"),
        ("--launcher ssh", "--launcher ssh is unknown: use pdsh, openmpi, mpich"),
        ("--launcher slurm", "--launcher slurm needs sinfo in PATH: install it, or use another"),
        ("--launcher openmpi --include a", "--include does not go with --launcher openmpi"),
        ("--launcher_args 'x", "--launcher_args='x: No closing quotation"),
        ("--num_nodes 3", "--num_nodes 3: HOSTS names 2: add lines to it, or ask for no more"),
    ],
)
def test_words_that_choose_ranks_are_checked_before_anything_starts(
    arguments: str, words: str, started: Callable, tmp_path: Path
) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=2\nb slots=2\n")
    with pytest.raises(UserError) as raised:
        started("quickstart", "--hostfile", str(hosts), *arguments.split())
    assert words.replace("HOSTS", str(hosts)) in str(raised.value)
    started("quickstart", "--hostfile", str(hosts), "--include", "a:0@a:1", "--force_multi")


def test_gpus_of_this_machine_are_checked_too(
    started: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="choose GPUs, and this machine has none: use --num_gpus"):
        started("quickstart", "--include", "localhost:0")
    with pytest.raises(UserError, match="--num_nodes 2 needs --hostfile"):
        started("quickstart", "--num_nodes", "2")
    monkeypatch.setattr(launch, "_num_gpus", lambda: 4)
    started("quickstart", "--include", "localhost:0,3")
    with pytest.raises(UserError, match=r"--include localhost:4: localhost has slots=4"):
        started("quickstart", "--include", "localhost:4")
    for devices in ("GPU-8932f937", "0,,1", "0,"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
        with pytest.raises(UserError, match=f"CUDA_VISIBLE_DEVICES={devices}: .* numbers alone"):
            started("quickstart")
    started("quickstart", "--num_gpus", "2")


def test_profile_admin_starts_its_own_module(started: Callable) -> None:
    words, _ = started("quickstart", command="profile-admin")
    assert words[words.index("--module") + 1] == "magnetar.launchers.profile_admin"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", "the run's JSON is missing"),
        ("a.json b.json", "unrecognized arguments: b.json"),
        ("quickstart --deepspeed_config b.json", "two JSONs, quickstart and b.json: give one"),
        ("quickstart --num-gpu 2", "--num-gpu 2: did you mean --num_gpus?"),
        ("quickstart --hostfil h", "did you mean --hostfile?"),
        ("quickstart --num_gpus 0", "0 is no whole number from 1 to 9999"),
        ("quickstart --module tests", "invalid choice: 'tests'"),
        ("quickstart -i a -e b", "contradict each other"),
        ("quickstart -i a --num_nodes 2", "do not go with --num_nodes and --num_gpus"),
    ],
)
def test_train_refuses_what_is_nobodys(
    arguments: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ends(arguments.split(), launch.train) == 2
    assert words in capsys.readouterr().err


def test_every_option_of_the_launcher_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside DeepSpeed's own parser: a new release may bring options."""
    from deepspeed.launcher import runner

    parsers: list[argparse.ArgumentParser] = []

    def keep(parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        parsers.append(parser)
        raise Started

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", keep)
    with pytest.raises(Started):
        runner.parse_args([])
    theirs = {word for word in parsers[0]._option_string_actions if word.startswith("--")}
    ours = {*launch._SPELT, *launch.FLAGS, *launch.VALUES, "--quiet", "--module", "--help"}
    # Of no use to us: a program without Python, and a tuner that starts the script many times.
    assert theirs - ours == {"--no_python", "--autotuning"}
    assert ours <= theirs


def test_former_names_say_what_replaces_them_once() -> None:
    for module, new in (
        ("launchers.prepare_data", "magnetar prepare"),
        ("launchers.prepare_pairs", "magnetar prepare-pairs"),
        ("launchers.plot", "magnetar plot"),
    ):
        done = run("-m", module, "--help")
        assert done.returncode == 0
        told = f"{module} will go in the next release: use `{new}`\n"
        assert done.stderr == told
        assert run("-m", module, "--help", RANK="1").stderr == ""
    assert run("-m", "magnetar.launchers.plot", "--help").stderr == ""
    assert run("-c", "import launchers.plot").stderr == ""


def test_a_local_rank_left_in_a_shell_silences_no_command() -> None:
    done = run("-m", "magnetar", "train", "none.json", LOCAL_RANK="1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: none.json does not exist")


def test_a_command_is_named_after_its_module() -> None:
    assert command_of("prepare_data") == "magnetar prepare"
    for function, _ in COMMANDS.values():
        module, _, name = function.partition(":")
        named = command_of(module if name == "main" else name)
        assert named.removeprefix("magnetar ") in COMMANDS


@pytest.mark.parametrize("script", ["launchers/train.py", "magnetar/launchers/train.py"])
def test_the_ranks_program_is_a_script_too(script: str, tmp_path: Path) -> None:
    done = run(str(ROOT / script), "--deepspeed_config", "none.json", cwd=tmp_path, PYTHONPATH="")
    assert done.returncode == 2
    assert done.stderr.startswith("error: none.json does not exist")
