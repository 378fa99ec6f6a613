"""bench/gpu_check.py: a check that fails or hangs becomes a line, and the next one starts. Without torch."""

import json
import os
import sys
import time
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from bench import gpu_check  # noqa: E402

# a stand-in for bench/gpu_checks.py: each check writes a figure, then ends as its name says
CHILD = """
import faulthandler, json, os, subprocess, sys, time
words = sys.argv[1:]
name, out = words[words.index("--one") + 1], words[words.index("--out") + 1]
limit = sys.stdin.readline()
if limit:
    faulthandler.dump_traceback_later(float(limit) / 2)
    row = {"check": name, "what": "found", "value": 0.25, "unit": "s", "target": "< 0.5", "path": "plain", "note": ""}
    with open(out + "/results.jsonl", "a") as file:
        file.write(json.dumps(row | {"card": "abacus", "torch": "0.1"}) + "\\n")
    if name == "raises":
        raise ValueError("boom")
    if name == "hangs":
        child = subprocess.Popen(["sleep", "60"])
        print("grandchild", child.pid, flush=True)
        time.sleep(60)
    if name == "killed":
        os.kill(os.getpid(), 9)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that runs checks of CHILD and returns what was found and the folder."""
    (tmp_path / "child.py").write_text(CHILD)
    monkeypatch.setattr(gpu_check, "COMMAND", [sys.executable, str(tmp_path / "child.py")])

    def checks(limits, seconds):
        monkeypatch.setattr(gpu_check, "CHECKS", {name: (limit, "") for name, limit in limits.items()})
        return gpu_check.run_checks(list(limits), seconds, False, tmp_path), tmp_path

    return checks


def test_a_check_that_fails_hangs_or_is_killed_becomes_a_line_and_the_next_one_starts(run):
    begun = time.monotonic()
    rows, folder = run({"raises": 30, "hangs": 1.5, "killed": 30, "fine": 30}, 300)
    assert time.monotonic() - begun < 25
    ended = {row["check"]: row for row in rows if "status" in row}
    statuses = {name: row["status"] for name, row in ended.items()}
    assert statuses == {"raises": "failed", "hangs": "timeout", "killed": "failed", "fine": "ok"}
    assert ended["raises"]["error"] == "ValueError: boom" and not ended["fine"]["error"]
    assert "child.py" in ended["hangs"]["error"] and "line" in ended["hangs"]["error"]  # where it hung
    # what was measured before the end counts, and every line names the machine
    assert [row["check"] for row in rows if "value" in row] == list(statuses)
    assert all((row["card"], row["torch"]) == ("abacus", "0.1") for row in rows)
    logs = (folder / "logs.txt").read_text()
    assert [name for name in statuses if f"===== {name}: {statuses[name]} =====" in logs] == list(statuses)
    grandchild = int(logs.partition("grandchild ")[2].split()[0])
    state = Path(f"/proc/{grandchild}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"
    assert sorted(os.listdir(folder)) == ["child.py", "logs.txt", "results.jsonl"]
    assert [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()] == rows


def test_what_no_longer_fits_is_skipped_by_name(run):
    rows, folder = run({"hangs": 4, "long": 1000, "fine": 3}, 7.5)
    statuses = {row["check"]: row["status"] for row in rows if "status" in row}
    assert statuses == {"hangs": "timeout", "long": "skipped", "fine": "skipped"}
    assert sorted(os.listdir(folder)) == ["child.py", "logs.txt", "results.jsonl"]


def test_the_table_has_targets_and_the_path_that_ran():
    figure = {"check": "a", "unit": "", "path": "plain", "note": "", "card": "abacus", "torch": "0.1"}
    rows = [
        figure | {"what": "small", "value": 0.004, "target": "< 0.005"},
        figure | {"what": "large", "value": 0.5, "target": ">= 0.7", "path": "other"},
        figure | {"what": "none", "value": None, "target": ">= 1", "note": "not available: no CUDA"},
        {"check": "a", "status": "ok", "seconds": 1.0, "error": ""},
    ]
    assert gpu_check.table(rows).splitlines() == [
        "abacus, torch 0.1",
        "a: ok, 1.0 s",
        "  small: 0.004  < 0.005: met  [plain]",
        "  large: 0.5  >= 0.7: MISSED  [other]",
        "  none:  not available: no CUDA  [plain]",
    ]
