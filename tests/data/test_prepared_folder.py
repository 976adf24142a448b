"""What text and pairs have in common: interrupted, repeated and refused preparations."""

import errno
import fcntl
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import pytest

import magnetar.data.pairs.prepare
import magnetar.data.prepared_folder
import magnetar.data.text.prepare
import magnetar.data.text.shards
from magnetar.data.errors import UserError
from magnetar.data.pairs.folder import open_pairs
from magnetar.data.pairs.prepare import PreparePairsConfig, TableConfig, prepare_pairs
from magnetar.data.text.prepare import PrepareConfig, prepare
from magnetar.data.text.token_files import open_prepared
from tests.data.parallel import verses, write_tsv

MODULES = {prepare: magnetar.data.text.prepare, prepare_pairs: magnetar.data.pairs.prepare}


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(magnetar.data.text.shards, "SHARD_CHARS", 1500)  # about a dozen shards


@pytest.fixture(params=["text", "pairs"])
def made(request, tmp_path, text_file):
    """A preparation, and what it is asked for."""
    out = tmp_path / "out"
    if request.param == "text":
        own = {"train": (str(text_file),), "valid_fraction": 0.1, "documents": "blank-line"}
        return prepare, PrepareConfig(out, vocab_size=300, **own)
    files = [
        str(write_tsv(tmp_path / f"{split}.tsv", verses(size, seed)))
        for seed, (split, size) in enumerate((("train", 120), ("valid", 10)))
    ]
    return prepare_pairs, PreparePairsConfig(out, (TableConfig("v", *files),), vocab_size=320)


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def require_same_as_whole(make, config):
    """A preparation that nothing has stopped gives the same bytes."""
    whole = replace(config, out=config.out.with_name("whole"))
    make(whole)
    assert content(config.out) == content(whole.out)


def opened(make, folder):
    return open_prepared(folder) if make is prepare else open_pairs(folder)


def stop_after(make, config, num_finished):
    """Prepare, and be killed in the middle of a shard."""
    tokenise_shard = magnetar.data.text.shards.tokenise_shard
    calls = []

    def stopping(*arguments):
        if len(calls) == num_finished:
            arguments[1].with_suffix(".bin").write_bytes(b"half")
            raise Killed
        calls.append(arguments)
        tokenise_shard(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(magnetar.data.text.shards, "tokenise_shard", stopping)
        with pytest.raises(Killed):
            make(config)


def killed_in(make, config, module, name, at=""):
    """Prepare, and be killed when a function is called, perhaps only with a file of some name."""
    original = getattr(module, name)

    def function(*arguments):
        if not at or arguments[0].name == at:
            raise Killed
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, function)
        with pytest.raises(Killed):
            make(config)


def count_calls(patch):
    tokenise_shard, stems = magnetar.data.text.shards.tokenise_shard, []

    def counting(vocabulary, stem, pieces):
        stems.append(stem.name)
        tokenise_shard(vocabulary, stem, pieces)

    patch.setattr(magnetar.data.text.shards, "tokenise_shard", counting)
    return stems


def test_the_number_of_workers_does_not_change_a_byte(made):
    make, config = made
    make(replace(config, workers=2))
    require_same_as_whole(make, config)


@pytest.mark.parametrize("num_finished", [0, 1, 5])
def test_a_killed_run_resumes_and_gives_the_same_bytes(
    made, monkeypatch, reporter, messages, num_finished
):
    make, config = made
    stop_after(make, config, num_finished)
    assert not config.out.exists()
    shards = count_calls(monkeypatch)
    make(config, reporter)
    assert not any("training a vocabulary" in message for message in messages)
    assert (f"kept {num_finished} finished shards" in messages) == bool(num_finished)
    assert len(shards) > 5
    assert len(set(shards)) == len(shards)
    require_same_as_whole(make, config)


def test_a_run_killed_while_joining_or_tidying_up_resumes(made, monkeypatch):
    make, config = made
    folder = magnetar.data.prepared_folder
    killed_in(make, config, folder, "write_atomically", "manifest.json")
    assert not config.out.exists()
    shards = count_calls(monkeypatch)
    killed_in(make, config, folder, "remove_scaffolding")
    assert shards == []
    opened(make, config.out)
    make(config)
    require_same_as_whole(make, config)


def test_a_run_killed_before_its_first_shard_resumes(made):
    make, config = made
    killed_in(make, config, magnetar.data.prepared_folder, "write_atomically", "settings.json")
    killed_in(make, config, MODULES[make], "_vocabulary")
    (config.out.with_name("out.partial") / "shards").rmdir()
    make(config)
    opened(make, config.out)


NO_RECORDS = [
    b"[1]",
    b"null",
    b"\xff\xfe{",
    b"[" * 100_000,
    b'{"num_tokens": ' + b"7" * 5000 + b"}",
    b'{"num_tokens": "3"}',
]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *(("*-000000.json", damage) for damage in (b"", b"\0", *NO_RECORDS)),
        *(("settings.json", damage) for damage in (b"", *NO_RECORDS[2:5])),
        *(
            (name, damage)
            for name in ("tokenizer.model", "*-000000.bin")
            for damage in (b"", b"\0")
        ),
    ],
    ids=lambda value: repr(value[:9]),
)
def test_a_file_that_a_power_loss_has_damaged_is_made_again(made, name, damage):
    make, config = made
    stop_after(make, config, 1)
    file, *_ = sorted(config.out.with_name("out.partial").rglob(name))
    # One NUL stands for a block of them in place of the content.
    file.write_bytes(damage * file.stat().st_size if damage == b"\0" else damage)
    make(config)
    require_same_as_whole(make, config)


def test_other_settings_start_the_partial_folder_over(made, reporter, messages):
    make, config = made
    stop_after(make, config, 2)
    make(replace(config, vocab_size=(config.vocab_size or 0) + 1), reporter)
    assert opened(make, config.out).manifest.vocab_size in (301, 321)
    assert any("begun with other settings: starting over" in message for message in messages)


def test_a_second_run_does_nothing(made, text_file, reporter, messages, monkeypatch):
    make, config = made
    manifest = make(config)
    before = content(config.out)
    monkeypatch.setattr(MODULES[make], "tokenise", None)
    for path in text_file.parent.glob("t*.t*"):
        path.touch()  # equal text under a new time
    assert make(config, reporter) == manifest
    assert messages == [f"{config.out} is up to date"]
    assert content(config.out) == before


def test_a_foreign_folder_is_left_alone(made):
    make, config = made
    config.out.mkdir()
    with pytest.raises(UserError, match=r"out exists and is not a prepared folder: choose another"):
        make(config)
    config.out.rmdir()
    partial = config.out.with_name("out.partial")
    partial.mkdir()
    (partial / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match=r"out\.partial is not ours to clear: move it away"):
        make(config)
    assert (partial / "thesis.txt").read_text() == "precious"


def test_two_runs_never_write_the_same_folder(made):
    make, config = made
    partial = config.out.with_name("out.partial")
    partial.mkdir()
    with (partial / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"another run is writing .*out\.partial: wait"):
            make(config)
    make(config)


def test_a_killed_worker_is_explained(made, monkeypatch):
    make, config = made

    def broken(*arguments):
        raise BrokenProcessPool

    monkeypatch.setattr(MODULES[make], "tokenise", broken)
    with pytest.raises(UserError, match=r"killed.*workers=1: run the same command with fewer"):
        make(config)


@pytest.mark.parametrize(
    "name",
    ["settings.json", "tokenizer.model", "*.bin", "*.ends", "*.json", "*.idx", "manifest.json"],
)
def test_a_full_disk_names_the_file_leaves_nothing_of_it_and_loses_nothing(made, monkeypatch, name):
    make, config = made

    def full(descriptor):
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.with_name(path.name.removesuffix(".partial")).match(name):
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(UserError, match=r": No space left.*free some space and run") as caught:
            make(config)
    file = Path(str(caught.value).removeprefix("cannot write ").partition(": No")[0])
    assert file.match(name)
    assert not file.exists()
    assert [*config.out.with_name("out.partial").rglob("*.partial")] == []
    make(config)
    require_same_as_whole(make, config)
