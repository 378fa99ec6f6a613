"""engine/files.py: JSON lines are read with their numbers; a cut last line is dropped, any other fault is reported."""

import json
import resource
from contextlib import contextmanager

import pytest
import torch

from engine.errors import sentence
from engine.files import read_jsonl, write_atomically
from engine.huggingface import new_folder, save_file


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


@contextmanager
def files_of_at_most(size):
    """Let the system refuse what a full disk would refuse."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_what_a_full_disk_cuts_off_is_named_and_removed(tmp_path):
    write_atomically(tmp_path / "report.html", [b"old"])
    with files_of_at_most(1000), pytest.raises(OSError) as of_file:
        write_atomically(tmp_path / "report.html", [b"x" * 500] * 3)
    with files_of_at_most(1000), pytest.raises(OSError) as of_folder:
        with new_folder(tmp_path / "model") as unfinished:
            save_file({"weight": torch.zeros(1000)}, unfinished / "model.safetensors")
    for raised, name in ((of_file, "report.html"), (of_folder, "model")):
        expected = f"{tmp_path / name} cannot be written (File too large): free some space there, then resume"
        assert sentence(raised.value, "resume") == expected
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("report.html", b"old")]
    missing = FileNotFoundError(2, "No such file or directory", "a")
    assert sentence(missing) == "[Errno 2] No such file or directory: 'a'"
