"""The command line of magnetar supervise, which starts nothing but the training."""

from pathlib import Path

import pytest

from magnetar.engine.supervise.supervisor import Options, Place, Supervisor
from magnetar.launchers.supervise import main, parse_arguments
from magnetar.launchers.terminal.command_line import CONFIGS
from tests.runs import write_config


def test_what_one_typed_before_is_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("hosts").write_text("a slots=2\nb slots=2\n")
    module = "--module magnetar.launchers.train"
    before = f"--hostfile hosts --include a:0@b {module} --deepspeed_config x.json"
    found = parse_arguments([*before.split(), "--set", "a=1", "-q", "--set", "b=2"])
    assert found == Options(
        config=Path("x.json"),
        settings=("a=1", "b=2"),
        hostfile=Path("hosts"),
        include="a:0@b",
        passed=("--quiet",),
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--module magnetar.launchers.plot", "invalid choice: 'magnetar.launchers.plot'"),
        ("rm", "two JSONs, rm and x.json: give one of them"),
        ("rm -r", "unrecognized arguments: -r"),
        ("--num_gpu 2", "unrecognized arguments: --num_gpu: did you mean --num_gpus?"),
        ("--no_python", "unrecognized arguments: --no_python"),
        ("--include a --exclude b --hostfile h", "contradict each other"),
        ("--include a --num_gpus 2 --hostfile h", "do not go with --num_nodes and --num_gpus"),
        ("--include a", "need --hostfile"),
        ("--num_gpus 0", "0 is no whole number from 1 to 9999"),
        ("--max-restarts x", "x is no whole number from 0 on"),
        ("--backoff soon", "soon is no number of seconds"),
        ("--backoff nan", "nan is no number of seconds"),
    ],
)
def test_anything_else_is_refused(
    arguments: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        parse_arguments([*arguments.split(), "--deepspeed_config", "x.json"])
    assert raised.value.code == 2
    assert words in capsys.readouterr().err


def test_hyphens_and_a_shipped_configs_name_will_do() -> None:
    found = parse_arguments(["quickstart", "--num-gpus", "2", "--launcher-args=--a-b"])
    assert found.num_gpus == 2
    assert found.config == CONFIGS / "quickstart.json"
    assert found.passed == ("--launcher_args=--a-b",)


def test_a_json_that_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["--deepspeed_config", "none.json"])
    assert raised.value.code == 2
    assert capsys.readouterr().err.startswith("error: none.json does not exist")


def test_the_launcher_gets_the_hosts_that_are_left(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("10.0.0.1 slots=2\n10.0.0.2 slots=2\n")
    config = write_config(tmp_path, tmp_path)
    arguments = ["--hostfile", str(hosts), "--deepspeed_config", str(config)]
    supervisor = Supervisor(parse_arguments([*arguments, "--master_addr", "m"]))
    place = Place({"10.0.0.1": [0, 1], "10.0.0.2": [0]}, (), True, "10.0.0.1")
    command = " ".join(supervisor._command(place, ["a=1"]))
    assert "--include 10.0.0.1:0,1@10.0.0.2:0 --no_ssh_check --master_addr m" in command
    assert command.endswith(
        f"--force_multi --module magnetar.launchers.train --deepspeed_config {config} --set a=1"
    )
    left = place._replace(slots={"10.0.0.2": [0]})
    assert "--master_addr 10.0.0.2 --force_multi" in " ".join(supervisor._command(left, []))


def test_the_first_slots_are_taken_where_not_all_fit() -> None:
    place = Place({"a": [0, 1], "b": [0, 2], "c": [5]})
    assert place.of_first_ranks(3).slots == {"a": [0, 1], "b": [0]}
    assert place.of_first_ranks(2).slots == {"a": [0, 1]}
