"""What a step's statistics become in a record, and what of metrics.jsonl is one."""

import errno
import json
import math
import os
from pathlib import Path

import pytest
import torch

from magnetar.data.atomic import append
from magnetar.engine.metrics import keep_records_up_to, monitor_tag, read_records, routing_record
from magnetar.models.moe.layer import RoutingStats


def stats(load: list[float], dropped: float, first_choices: list[int]) -> RoutingStats:
    return RoutingStats(
        probs=torch.tensor(first_choices, dtype=torch.float64),
        first_choices=torch.tensor(first_choices, dtype=torch.float64),
        entropy=torch.tensor(0.7 * sum(first_choices), dtype=torch.float64),
        log_z_squared=torch.tensor(0.0, dtype=torch.float64),
        load=torch.tensor(load, dtype=torch.float64),
        dropped=torch.tensor(dropped, dtype=torch.float64),
        temperature=torch.tensor(0.3, dtype=torch.float64),
    )


def test_a_layers_record_has_shares_and_means() -> None:
    record = routing_record("layer_2", stats([10.0, 6.0, 0.0, 0.0], 4.0, [6, 2, 0, 0]))
    assert record == pytest.approx(
        {
            "layer_2/routing_entropy": 0.7,
            "layer_2/load_max": 2.5,
            "layer_2/load_min": 0.0,
            "layer_2/dropped": 0.25,
            "layer_2/balance_loss": 4 * (0.75**2 + 0.25**2),
            "layer_2/temperature": 0.3,
        }
    )


def test_a_batch_of_padding_alone_has_a_record_of_finite_numbers() -> None:
    record = routing_record("layer_2", stats([0.0] * 4, 0.0, [0] * 4))
    assert record.pop("layer_2/temperature") == pytest.approx(0.3)
    assert set(record.values()) == {0.0}
    assert all(math.isfinite(value) for value in record.values())


NO_RECORDS = [
    b"\0\0\0",
    b"\xff\xfe{",
    '{"step": 3, "loss": 1.5}'.encode("utf-16-le").replace(b"\n", b""),
    b"null",
    b"{}",
    b"[1, 2]",
    b"7",
    b'{"broken',
    b"[" * 100_000,
    b'{"step":' * 50_000,
    b'{"step": 1, "loss": ' + b"9" * 5_000 + b"}",
    b'{"step": ' + b"9" * 5_000 + b', "loss": 2.0}',
    b'{"step": 1, "loss": NaN}',
    b'{"step": 1, "loss": 1e999}',
    b'{"step": 1, "loss": "2.0"}',
    b'{"step": 1, "loss": [2.0]}',
    b'{"step": "1", "loss": 2.0}',
    b'{"step": true, "loss": 2.0}',
    b'{"step": null, "loss": 2.0}',
    b'{"step": 1.5, "loss": 2.0}',
    b'{"step": -1, "loss": 2.0}',
    b'{"step": 1}',
    b'{"loss": 2.0}',
    b'{"step": 1, "loss": 2.0} {"step": 2, "loss": 2.0}',
    b'{"step": 1, "loss": 2.0, "\\ud800": 1}',
]
LINES = [b'{"step": %d, "loss": 2.0, "grad_norm": null}' % step for step in (1, 2, 3)]


@pytest.mark.parametrize("line", NO_RECORDS, ids=lambda line: repr(line[:30]))
def test_a_line_that_is_no_record_is_left_out_with_a_word_and_kept(
    line: bytes, tmp_path: Path
) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b"\n".join([LINES[0], line, b"", LINES[1] + b"\r", LINES[2], b'{"ste']))
    records, left_out, words = read_records(file)
    assert [record["step"] for _, record in records] == [1, 2, 3]
    assert all(math.isnan(record["grad_norm"]) for _, record in records)
    assert left_out == [line]
    assert words == f"{file}: line 2 is no record and is left out ({line[:40]!r})"
    assert keep_records_up_to(file, 2) == f"{words} and kept in metrics.left_out"
    assert file.read_bytes() == b"\n".join([LINES[0], LINES[1] + b"\r", b""])
    assert (tmp_path / "metrics.left_out").read_bytes() == line + b"\n"
    assert read_records(file)[2] == keep_records_up_to(file, 2) == ""


def test_several_lines_are_counted_and_a_last_line_may_lack_its_end(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b"\n".join([b"x", LINES[0], b"\xff", LINES[1]]))
    assert "2 lines, line 1 first, are no records and are left out (b'x')" in (
        keep_records_up_to(file, 9)
    )
    append(file, json.dumps({"step": 3, "valid_loss": 1.0}) + "\n")
    assert [record["step"] for _, record in read_records(file)[0]] == [1, 2, 3]


def test_a_record_that_a_full_disk_takes_in_part_is_taken_back_and_its_file_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, write, room = tmp_path / "metrics.jsonl", os.write, [3]

    def write_in_part(descriptor: int, content: bytes) -> int:
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, content[: room.pop()])

    append(file, "whole\n")
    monkeypatch.setattr(os, "write", write_in_part)
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics\.jsonl'"):
        append(file, "another\n")
    monkeypatch.undo()
    append(file, "again\n")
    assert file.read_text() == "whole\nagain\n"


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("loss", "train/loss"),
        ("valid_loss", "valid/loss"),
        ("valid_bleu/en-de", "valid/bleu/en-de"),
        ("layer_2/temperature", "layer_2/temperature"),
    ],
)
def test_tags_group_metrics_by_what_they_are_of(name: str, tag: str) -> None:
    assert monitor_tag(name) == tag
