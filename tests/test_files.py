"""Small files that are written line by line."""

from mgd.files import append_line, keep_lines


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
