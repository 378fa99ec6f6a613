"""engine/files.py: JSON lines are read with their numbers; a cut last line is dropped, any other fault is reported."""

import json

import pytest

from engine.files import read_jsonl, write_atomically


def test_lines_are_numbered_and_a_cut_last_line_is_dropped_and_reported(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    write_atomically(path, [b'{"a": 1}\n', b"[2]\n"])
    assert list(read_jsonl(path)) == [(1, b'{"a": 1}\n', {"a": 1}), (2, b"[2]\n", [2])]
    assert capsys.readouterr().err == "" and [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]
    for cut in (b'{"a": 3', b"{}", b'{"a": "\xc3', b"\0\0\0"):  # the second lacks only its newline
        path.write_bytes(b'{"a": 1}\n' + cut)
        assert [row for _, _, row in read_jsonl(path)] == [{"a": 1}]
        assert capsys.readouterr().err == f"{path}: dropped 1 half-written last line (line 2)\n"


@pytest.mark.parametrize("broken", [b"", b'{"a": ', b"\xff", b"9" * 5000, b"[" * 100_000])
def test_a_broken_line_is_reported(tmp_path, broken):
    path = tmp_path / "rows.jsonl"
    for rest in (b"", json.dumps({}).encode() + b"\n"):
        path.write_bytes(b"{}\n" + broken + b"\n" + rest)
        with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: .+") as raised:
            list(read_jsonl(path))
        assert "\n" not in str(raised.value)
