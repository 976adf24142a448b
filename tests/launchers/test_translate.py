"""magnetar translate."""

import errno
import io
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from magnetar.data.errors import UserError
from magnetar.data.text.lines import lines_of, windows_of_input
from magnetar.data.text.tokenizer import train_sentencepiece
from magnetar.engine.checkpoint.open_run import open_run
from magnetar.engine.translation.translator import Translator
from magnetar.launchers import translate
from magnetar.launchers.translate import main, warn_of_untrained
from magnetar.models.transformer import empty_model
from magnetar.models.weights.load_save import save_weights
from tests.engine.translations import MAX_LEN, make_folder, model_config
from tests.launchers.conftest import refusal
from tests.ranks import ROOT

TO_ENGLISH = ("--from", "de", "--to", "en")
SENTENCES = ["Das Meer ist ruhig.", "", "Zwei Schiffe", "   ", "Meer"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("weights") / "model")


def translated(capfdbinary: pytest.CaptureFixture[bytes], *arguments: object) -> list[str]:
    main([str(argument) for argument in arguments])
    return capfdbinary.readouterr().out.decode().splitlines()


def stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


@pytest.mark.parametrize("more", [("--beam", 1), ("--beam", 3), ("--sample", "--seed", 4)])
def test_files_standard_input_and_one_sentence_give_the_same(
    more: tuple,
    folder: Path,
    tmp_path: Path,
    capfdbinary: pytest.CaptureFixture[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, out = tmp_path / "text.txt", tmp_path / "text.en"
    content = "\n".join(SENTENCES).encode()
    file.write_bytes(content)
    from_file = translated(capfdbinary, folder, file, *TO_ENGLISH, *more)
    assert len(from_file) == len(SENTENCES)
    assert [bool(line) for line in from_file] == [True, False, True, False, True]
    stdin(monkeypatch, content + b"\n")
    assert translated(capfdbinary, folder, *TO_ENGLISH, *more) == from_file
    small = ("--batch-size", 1, "--out", out)
    # Other batches round otherwise, by 1e-6 of a score: only a tie could change a word.
    assert translated(capfdbinary, folder, file, *TO_ENGLISH, *more, *small) == []
    assert out.read_bytes().decode().splitlines() == from_file
    out.unlink()
    main([str(part) for part in (folder, *TO_ENGLISH, *more, "--out", out, file)])
    assert out.read_bytes().decode().splitlines() == from_file, "files may follow options"
    alone = translated(capfdbinary, folder, *TO_ENGLISH, *more, "--text", SENTENCES[0])
    assert alone == from_file[:1]


def test_several_files_are_one_input(
    folder: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    files[0].write_text("Meer\nZwei Schiffe\n")
    files[1].write_text("\ufeffMeer\r\n")
    lines = translated(capfdbinary, folder, *files, *TO_ENGLISH)
    assert len(lines) == 3
    assert lines[0] == lines[2]


def test_max_len_the_length_penalty_and_the_target_matter(
    folder: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    def text(*more: object, target: str = "en") -> str:
        options = ("--from", "de", "--to", target, "--text", SENTENCES[0])
        return "".join(translated(capfdbinary, folder, *options, *more))

    assert len(text("--max-len", 2).encode()) < len(text("--max-len", 20).encode())
    assert text() != text(target="zh")
    assert text("--sample", "--seed", 1) != text("--sample", "--seed", 2)
    assert text("--sample", "--top-p", 0.001, "--length-penalty", 0) == text("--beam", 1)


def test_an_empty_input_is_an_empty_output(
    folder: Path, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    stdin(monkeypatch, b"")
    assert translated(capfdbinary, folder, *TO_ENGLISH) == []


def test_long_sentences_are_split_truncated_or_refused_and_counted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "text.txt"
    file.write_text("Meer\n" + "Das Meer ist ruhig. " * 5 + "\n")
    lengths = {}
    for what, done in (("split", "split"), ("truncate", "truncated")):
        out = tmp_path / what
        options = ("--too-long", what, "--out", out, "--max-len", 4)
        main([str(part) for part in (folder, file, *TO_ENGLISH, *options)])
        assert (
            f"1 of 2 sentences were longer than the model's {MAX_LEN} positions and have been "
            f"{done}: number 2" in capsys.readouterr().err
        )
        lengths[what] = len(out.read_bytes().splitlines()[1])
    assert lengths["split"] > lengths["truncate"] > 0
    message = refusal(capsys, main, folder, file, *TO_ENGLISH, "--too-long", "refuse")
    assert "error: sentence 2 has " in message
    assert f"the model reads at most max_seq_len={MAX_LEN}" in message


def test_a_line_that_is_not_utf8_is_named() -> None:
    lines = lines_of("speech.txt", io.BytesIO(b"Meer\n" + "ä\n".encode("latin-1")))
    assert next(lines) == "Meer"
    rule = r"speech.txt, line 2, is not UTF-8 at byte 1: save it as UTF-8"
    with pytest.raises(UserError, match=rule):
        next(lines)


@pytest.mark.slow
def test_the_command_prints_translations_alone_and_ends_without_a_traceback(folder: Path) -> None:
    command = [sys.executable, "-m", "magnetar.launchers.translate", str(folder), *TO_ENGLISH]

    def run(content: bytes) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(command, cwd=ROOT, input=content, capture_output=True, check=False)

    good, bad = run(b"Meer\n\n"), run(b"Meer\n\xe4\n")
    assert (good.returncode, good.stderr) == (0, b"")
    assert good.stdout.count(b"\n") == 2
    assert bad.returncode == 2
    assert bad.stderr == (
        b"error: standard input, line 2, is not UTF-8 at byte 1: save it as UTF-8\n"
    )
    assert bad.stdout == b""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--beam", "0"], "--beam 0 must be at least 1"),
        (["--batch-size", "0"], "--batch-size 0 must be at least 1"),
        (["--max-len", "0"], "--max-len 0 must be at least 1"),
        (["--length-penalty", "-1"], "--length-penalty -1 must be 0 to 10"),
        (["--length-penalty", "inf"], "--length-penalty inf must be 0 to 10"),
        (["--length-penalty", "10.5"], "--length-penalty 10.5 must be 0 to 10"),
        (["--temperature", "1"], "--temperature 1 belongs to --sample"),
        (["--top-p", "0.5"], "--top-p 0.5 belongs to --sample"),
        (["--seed", "3"], "--seed 3 belongs to --sample"),
        (["--sample", "--temperature", "0"], "--temperature 0 must be more than 0"),
        (["--sample", "--top-p", "0"], "--top-p 0 must be more than 0 and at most 1"),
        (["--sample", "--seed", "-1"], "--seed -1 must be 0 or more"),
        (["--to", "de"], "--from and --to are both de: name two languages"),
        (["--text", "caf\udce9"], "--text is not UTF-8 at character 4"),
        (["--from", "fr"], "language 'fr' is unknown here: use one of de, en, zh"),
        (["--to", "fr"], "language 'fr' is unknown here: use one of de, en, zh"),
        (["--out", "nowhere/text"], "--out nowhere/text: nowhere is no folder: make it first"),
        (["--out", "tests"], "--out tests is a folder: name a file"),
        (["--data", "nowhere"], "is not there (nowhere): name the prepared folder"),
    ],
)
def test_impossible_arguments_are_refused(
    arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*TO_ENGLISH, "--text", "Meer", *arguments]
    assert message in refusal(capsys, main, folder, *given)


def test_files_that_are_not_there_and_two_inputs_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "nowhere.txt is not a file" in refusal(capsys, main, folder, "nowhere.txt", *TO_ENGLISH)
    message = refusal(capsys, main, folder, "README.md", *TO_ENGLISH, "--text", "Meer")
    assert "--text and README.md: give one of the two" in message


def test_a_run_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, main, tmp_path / "none", *TO_ENGLISH, "--text", "Meer")
    assert f"run folder {tmp_path / 'none'} does not exist" in message


def test_a_model_of_another_architecture_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decoder = empty_model(model_config(architecture="decoder"))
    save_weights(tmp_path / "model", decoder.config, decoder.state_dict())
    message = refusal(capsys, main, tmp_path / "model", *TO_ENGLISH, "--text", "Meer")
    assert "is no translation run: a model that translates has learnt sentence pairs" in message
    assert f"use `magnetar generate {tmp_path / 'model'}`" in message


@pytest.mark.slow
def test_a_run_that_has_learnt_text_is_refused(trained, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, main, trained.folder, *TO_ENGLISH, "--text", "Meer")
    assert f"{trained.folder} is no translation run" in message


def test_a_vocabulary_without_tags_or_that_is_too_large_or_missing_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder(tmp_path / "model")
    vocabulary, text = folder / "tokenizer.model", ("--text", "Meer")
    train_sentencepiece(["The sea is calm, and two ships are here."], 280, vocabulary)
    message = refusal(capsys, main, folder, *TO_ENGLISH, *text)
    assert "has no language tags such as <2de>: prepare pairs" in message
    words = " ".join(f"word{number} and {7 * number}" for number in range(2000))
    train_sentencepiece([words], 310, vocabulary)
    message = refusal(capsys, main, folder, *TO_ENGLISH, *text)
    assert f"the vocabulary of {vocabulary} has 310 entries, and the model of" in message
    vocabulary.unlink()
    message = refusal(capsys, main, folder, *TO_ENGLISH, *text)
    assert (
        f"is not there ({vocabulary} and {folder / 'tokenizer.json'}): name the prepared" in message
    )


def test_the_vocabulary_of_another_run_is_refused(
    folder: Path,
) -> None:
    config = {"magnetar": {"data": {"path": "gone"}}}
    about = {"tokenizer_fingerprint": "0" * 64, "config": config}
    with pytest.raises(UserError, match="is another vocabulary") as raised:
        _ = replace(open_run(folder), about=about).tokenizer
    assert "was trained with (000000000000): give the one that it was trained with" in str(
        raised.value
    )


def test_an_output_that_exists_an_option_s_language_and_a_beam_of_draws_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "text.txt"
    file.write_text("Meer\n")
    message = refusal(capsys, main, folder, file, *TO_ENGLISH, "--out", file)
    assert f"--out {file} exists: name a file that does not, or remove it" in message
    assert file.read_text() == "Meer\n"
    one = ("--text", "Meer")
    message = refusal(capsys, main, folder, "--from", "de", "--to", "xx", *one)
    assert "error: --to: " in message
    message = refusal(capsys, main, folder, *TO_ENGLISH, *one, "--sample", "--beam", 4)
    assert "--sample and --beam 4 exclude each other" in message


@pytest.mark.needs("/dev/full")
def test_an_output_that_cannot_be_written_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(capsys, main, folder, *TO_ENGLISH, "--text", "Meer", "--out", "/dev/full")
    assert "/dev/full: No space left on device" in message


@pytest.mark.parametrize("num_before", [0, 8])
def test_a_full_disk_leaves_what_is_whole_and_nothing_that_blocks_the_next_start(
    num_before: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    if num_before:
        translate._write(["whole"] * num_before, out, 0)

    class Full(io.BytesIO):
        def write(self, content: bytes) -> int:  # type: ignore[override]
            with open(out, "ab") as file:
                file.write(content[:3])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", lambda *_: Full())
    with pytest.raises((OSError, UserError), match="No space left on device"):
        translate._write(["more"], out, num_before)
    monkeypatch.undo()
    assert out.exists() == (num_before > 0)
    assert not num_before or out.read_bytes() == b"whole\n" * num_before


@pytest.mark.parametrize("more", [("--beam", 1), ("--sample", "--seed", 4)])
def test_windows_change_nothing(
    more: tuple,
    folder: Path,
    tmp_path: Path,
    capfdbinary: pytest.CaptureFixture[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, given = tmp_path / "text.txt", (folder, *TO_ENGLISH, *more, "--batch-size", 1)
    file.write_text("".join(f"{line}\n" for line in [*SENTENCES, "Das Meer ist ruhig. " * 5] * 2))
    whole = translated(capfdbinary, *given, file)
    assert len(whole) == 12
    assert (whole[0] == whole[6]) == ("--beam" in more), "a draw is of its line in all the input"
    # A window of eight lines, each in its own batch.
    monkeypatch.setattr("magnetar.launchers.translate.WINDOW", 1)
    assert translated(capfdbinary, *given, file) == whole
    stdin(monkeypatch, file.read_bytes())
    assert translated(capfdbinary, *given, "--out", tmp_path / "out") == []
    assert (tmp_path / "out").read_bytes().decode().splitlines() == whole


def test_a_stop_keeps_the_windows_that_are_written_and_says_how_many_lines(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, out = tmp_path / "text.txt", tmp_path / "out"
    file.write_text("Meer\n" * 10)
    lines = Translator.lines

    def stopped(self: Translator, *arguments: object) -> list[str]:
        if self.num_done:
            raise KeyboardInterrupt
        return lines(self, *arguments)

    monkeypatch.setattr(Translator, "lines", stopped)
    monkeypatch.setattr("magnetar.launchers.translate.WINDOW", 1)
    options = ("--beam", 1, "--batch-size", 1, "--out", out)
    with pytest.raises(SystemExit) as ended:
        main([str(part) for part in (folder, file, *TO_ENGLISH, *options)])
    assert ended.value.code == 130
    assert f"stopped: 8 lines are translated and written into {out}" in capsys.readouterr().err
    assert out.read_bytes().count(b"\n") == 8


def test_a_refused_sentence_behind_others_says_how_many_lines_are_written(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, out = tmp_path / "text.txt", tmp_path / "out"
    file.write_text("Meer\n" * 8 + "Das Meer ist ruhig. " * 5 + "\n")
    monkeypatch.setattr("magnetar.launchers.translate.WINDOW", 1)
    options = ("--too-long", "refuse", "--batch-size", 1, "--out", out)
    message = refusal(capsys, main, folder, file, *TO_ENGLISH, *options)
    assert "error: sentence 9 has " in message
    assert message.endswith(f"; 8 lines are translated and written into {out}\n")
    assert out.read_bytes().count(b"\n") == 8


def test_a_reader_that_has_seen_enough_ends_the_command_quietly(folder: Path) -> None:
    program = [sys.executable, "-m", "magnetar.launchers.translate"]
    command = [*program, folder, *TO_ENGLISH, "--beam", "1"]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stdin.write(b"Meer\n")
        process.stdin.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE


def test_more_tokens_than_the_model_has_positions_are_as_many_as_it_has(
    capfdbinary: pytest.CaptureFixture[bytes], folder: Path
) -> None:
    given = (capfdbinary, folder, *TO_ENGLISH, "--text", "Meer", "--max-len")
    assert translated(*given, 10**20) == translated(*given, 10**6)


def test_a_pipe_gives_a_window_when_it_is_full_pauses_or_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("magnetar.data.text.lines.PAUSE", 0.05)
    read, write = os.pipe()
    with os.fdopen(read, "rb") as stream:
        windows = windows_of_input(stream, 3)
        os.write(write, "a\nb\nc\nd\nä".encode()[:-1])  # half a character waits for the rest
        assert next(windows) == ["a", "b", "c"]
        assert next(windows) == ["d"]
        os.write(write, "ä".encode()[-1:])
        time.sleep(0.1)
        os.close(write)
        assert list(windows) == [["ä"]]


class Learnt(NamedTuple):
    """A config of a run."""

    directions: list[str] | None
    too_long_inference: str = "split"

    @property
    def run_config(self) -> object:
        return SimpleNamespace(data=SimpleNamespace(pairs=self))


def test_a_direction_that_was_not_learnt_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    options = translate.parse_arguments(["runs/any", *TO_ENGLISH])
    warn_of_untrained(Learnt(["de-en"]), options)
    assert capsys.readouterr().err == ""
    warn_of_untrained(Learnt(["en-de", "en-zh"]), options)
    assert capsys.readouterr().err == (
        "warning: runs/any has not learnt de-en, and may write anything: it has learnt en-de, "
        "en-zh\n"
    )


def test_the_run_says_what_becomes_of_long_sentences_unless_the_option_does() -> None:
    def how(*more: str) -> str:
        options = translate.parse_arguments(["runs/any", *TO_ENGLISH, *more])
        run = Learnt(None, "truncate")
        return Translator(run, None, options.target, options.too_long).how

    assert how() == "truncate"
    assert how("--too-long", "refuse") == "refuse"
