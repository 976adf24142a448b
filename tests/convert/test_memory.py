"""Conversions hold a few tensors in memory, never a model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from magnetar.data.text.token_files import read_manifest
from tests.convert.checkpoints import write_checkpoint
from tests.ranks import ROOT
from tests.runs import make_corpus

MIB = 2**20
PART = 4 * MIB  # bytes of a file of a run's checkpoint
# 16 layers of 3.2 million parameters, and a million in the embedding: 200 MB. The largest tensor
# has 4 MiB.
DENSE = {"magnetar.model.moe": None, "magnetar.model.num_layers": 16}
LARGE = {
    "magnetar.model.d_model": 512,
    "magnetar.model.d_ff": 2048,
    "magnetar.model.vocab_size": 2048,
}
SMALL = {"magnetar.model.vocab_size": 301}
# Runs two commands, and prints how far memory rose in the second: the first loads what torch loads
# when it is first needed.
PROGRAM = f"""
import json, sys, threading, time
from magnetar.convert import run_folders
from magnetar.launchers.convert import main
run_folders.PART_BYTES = run_folders.IMPORTED_PART_BYTES = {PART}

def anonymous():
    line = next(x for x in open("/proc/self/status") if x.startswith("RssAnon"))
    return 1024 * int(line.split()[1])

def watch():
    while not done.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.001)

small, large = json.loads(sys.argv[1])
main(small)
before = anonymous()
done, peak = threading.Event(), [before]
watching = threading.Thread(target=watch)
watching.start()
main(large)
done.set()
watching.join()
print(peak[0] - before)
"""


def rise(folder: Path, out: str, command: str, source: str, *options: str) -> int:
    """Bytes of memory, mapped files not counted, that a command takes beyond a small one's."""
    both = [
        [command, str(folder / f"{source}{size}"), "--out", str(folder / f"{out}{size}"), *options]
        for size in ("_small", "")
    ]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(both)],
        cwd=ROOT,
        # Freed tensors go back to the system at once: the peak is what was held, not what the
        # allocator kept.
        env=os.environ | {"PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.slow
def test_no_conversion_holds_a_model_in_memory(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus")
    entries = {"tokenizer_fingerprint": read_manifest(corpus).tokenizer_fingerprint}
    for name, shape in (("run_small", SMALL), ("run", LARGE)):
        changes = DENSE | shape | {"magnetar.data.path": str(corpus)}
        write_checkpoint(tmp_path / name, changes=changes, entries=entries)
    rises = {
        out: rise(tmp_path, out, *arguments) / MIB
        for out, arguments in {
            "exported": ("export", "run"),
            "sharded": ("export", "run", "--shard-size", "20MB"),
            "rounded": ("export", "run", "--dtype", "bfloat16"),
            "imported": ("import", "exported"),
            "upcycled": ("upcycle", "exported", "--num-experts", "3"),
            "dense": ("densify", "upcycled", "--mean"),
            "shrunk": ("shrink", "run", "--layers", "0,3,6,9,12,15"),
            "resharded": ("reshard", "run", "--world-size", "2", "--zero-stage", "1"),
        }.items()
    }
    assert size(tmp_path / "exported") > 190 * MIB
    assert size(tmp_path / "upcycled") > 320 * MIB
    assert len(list((tmp_path / "resharded").glob("*/*/*.safetensors"))) > 100
    # What a file will hold, and the copy of it that safetensors makes.
    assert rises["resharded"] < 2.5 * PART / MIB
    # A float64 sum of the largest tensor, the tensor, and copies of both.
    assert max(rises.values()) < 24, rises
