"""Small token files and texts for the tests of data/."""

import hashlib
import random
from pathlib import Path

import numpy as np
import pytest

from magnetar.data.prepared_folder import Reporter
from magnetar.data.text.token_files import SplitRecord, TokenSplit

WORDS = ["sea", "ship", "sail", "north", "wind", "harbour", "the", "of", "a", "old", "blue", "zéro"]


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """No test loses its power, and a busy disk takes seconds for each fsync."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture
def messages():
    return []


@pytest.fixture
def reporter(messages):
    return Reporter(message=messages.append)


@pytest.fixture
def make_split(tmp_path):
    def make(num_tokens, vocab_size=1000):
        tokens = (np.arange(num_tokens) % vocab_size).astype("<u2")
        path = tmp_path / "train.bin"
        tokens.tofile(path)
        with path.with_suffix(".idx").open("wb") as file:
            np.save(file, np.array([0, num_tokens], dtype="<u8"))
        digest = hashlib.sha256(tokens.tobytes()).hexdigest()
        record = SplitRecord(
            num_tokens=num_tokens, num_documents=1, num_bytes=4 * num_tokens, sha256=digest
        )
        return TokenSplit(path, record, "uint16", vocab_size)

    return make


@pytest.fixture
def documents():
    """120 documents of a few lines; deterministic."""
    draw = random.Random(0)
    return [
        "\n".join(" ".join(draw.choices(WORDS, k=12)) for _ in range(draw.randint(1, 5)))
        for _ in range(120)
    ]


@pytest.fixture
def text_file(tmp_path, documents) -> Path:
    """The documents in one .txt, separated by blank lines."""
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(documents) + "\n")
    return path
