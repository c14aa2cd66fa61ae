"""Small files of a run."""

from pathlib import Path

import pytest

from mgd.errors import UserError
from mgd.files import append_line, keep_lines, read_json


def test_a_file_that_may_not_be_read_is_not_to_be_deleted(tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    with pytest.raises(UserError, match="metrics.json is not there; start over with --restart"):
        read_json(path, ())
    path.write_text("{")
    with pytest.raises(UserError, match="metrics.json cannot be read: .*; delete it, or start over"):
        read_json(path, ())

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", denied)  # chmod does not stop root
    with pytest.raises(UserError, match="metrics.json cannot be read: Permission denied; open it to your user$"):
        read_json(path, ())


def test_lines_that_were_cut_short_or_are_not_wanted_go(tmp_path):
    log = tmp_path / "log.jsonl"
    keep_lines(log, lambda row: True)
    assert not log.exists()
    for step in (1, 2, 3):
        append_line(log, {"step": step, "image": "stra\u2028ße"})
    with log.open("ab") as file:
        file.write('{"step": 2, "image": "stra\u00df'.encode()[:-1])
    keep_lines(log, lambda row: row["step"] <= 2)
    append_line(log, {"step": 3})
    assert (
        log.read_text(encoding="utf-8")
        == '{"step": 1, "image": "stra\u2028ße"}\n{"step": 2, "image": "stra\u2028ße"}\n{"step": 3}\n'
    )
