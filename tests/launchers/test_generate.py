"""magnetar generate."""

import io
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from magnetar.data.errors import UserError
from magnetar.data.text.tokenizer import SentencePieceTokenizer
from magnetar.launchers.generate import main, prompts_of
from tests.launchers.conftest import refusal
from tests.ranks import ROOT

PROMPT = "the senate guards"


def generated(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_another_seed_gives_another_text_unless_the_temperature_is_0(
    temperature: float, trained, capsys: pytest.CaptureFixture[str]
) -> None:
    given = (trained.folder, "--prompt", PROMPT, "--tokens", 20, "--temperature", temperature)
    first, again, other = (generated(capsys, *given, "--seed", seed) for seed in (1, 1, 2))
    assert first == again
    assert (first == other) == (temperature == 0)


@pytest.mark.slow
def test_each_sample_begins_with_the_prompt(trained, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--prompt", PROMPT, "--tokens", 8, "--num-samples", 3)
    assert generated(capsys, trained.folder, *options).count(PROMPT) >= 3


@pytest.mark.slow
def test_each_line_of_the_input_is_a_prompt(
    trained, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("a citizen wants\n\nour nation\n"))
    out = generated(capsys, trained.folder, "--tokens", 4)
    assert out.startswith("a citizen wants")
    assert "\n\nour nation" in out


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_line_that_is_not_utf8_is_named(errors: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = io.BytesIO("café\n\n".encode() + "café\n".encode("latin-1"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(content, encoding="utf-8", errors=errors))
    prompts = prompts_of(None)
    assert next(prompts) == ("line 1 of standard input", "café")
    rule = r"line 3 of standard input is not UTF-8 at character 4: save the prompts as UTF-8"
    with pytest.raises(UserError, match=rule):
        next(prompts)


@pytest.mark.slow
def test_a_prompt_that_the_vocabulary_drops_is_named(
    trained, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As SentencePiece's rules nmt_nfkc do; a vocabulary of our own drops nothing.
    encode = SentencePieceTokenizer.encode
    monkeypatch.setattr(
        SentencePieceTokenizer, "encode", lambda self, text: encode(self, text.strip("\u200b"))
    )
    message = refusal(capsys, main, trained.folder, "--tokens", 1, "--prompt", "\u200b\u200b")
    assert "error: --prompt has no token in this vocabulary" in message
    monkeypatch.setattr("sys.stdin", io.StringIO("the\n\u200b\nour\n"))
    with pytest.raises(SystemExit) as ended:
        main([str(trained.folder), "--tokens", "1"])
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out.startswith("the")
    assert "error: line 2 of standard input has no token in this vocabulary" in printed.err


def test_a_byte_order_mark_is_no_part_of_a_prompt(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = io.BytesIO(b"\xef\xbb\xbfthe\r\n\xef\xbb\xbf\nour\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(content, encoding="latin-1"))
    assert next(prompt for _, prompt in prompts_of(None)) == "the"
    assert "--prompt is empty" in refusal(capsys, main, "runs/none", "--prompt", "\ufeff")


@pytest.mark.slow
def test_no_prompt_at_all_is_refused(
    trained, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert 'give --prompt "TEXT"' in refusal(capsys, main, trained.folder)


@pytest.mark.slow
def test_a_missing_tokenizer_is_named(
    trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = tmp_path / "prepared"
    shutil.copytree(trained.corpus, copied)
    (copied / "tokenizer.model").unlink()
    message = refusal(capsys, main, trained.folder, "--prompt", PROMPT, "--data", copied)
    assert f"tokenizer folder {copied} holds none of tokenizer.model" in message


@pytest.mark.slow
def test_piped_output_is_the_text_and_nothing_else(trained) -> None:
    command = [sys.executable, "-m", "magnetar.launchers.generate", str(trained.folder)]
    command += ["--tokens", "5", "--prompt", PROMPT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(PROMPT)
    assert "\x1b" not in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "--prompt is empty"),
        (["--prompt", "  "], "--prompt is empty"),
        (["--prompt", "caf\udce9"], "--prompt is not UTF-8 at character 4: give it in UTF-8"),
        (["--tokens", "0"], "--tokens 0 must be at least 1"),
        (["--num-samples", "0"], "--num-samples 0 must be at least 1"),
        (["--temperature", "-0.5"], "--temperature -0.5 must be finite and 0 or more"),
        (["--temperature", "nan"], "--temperature nan must be finite and 0 or more"),
        (["--top-p", "0"], "--top-p 0 must be more than 0 and at most 1"),
        (["--top-p", "1.5"], "--top-p 1.5 must be more than 0 and at most 1"),
        (["--seed", "-1"], "--seed -1 must be 0 or more"),
        (["--num-samples", "1" + "0" * 20], "must be at least 1 and less than 2^31"),
        ([], "run folder runs/none does not exist"),
    ],
)
def test_impossible_arguments_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(capsys, main, "runs/none", *arguments)
