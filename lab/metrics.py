"""Write and read metrics.jsonl and rollouts.jsonl.

Each line of metrics.jsonl is a JSON object with "kind", "step" and "stage"; lab/glossary.py explains its keys.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TextIO

from engine.errors import UserError
from engine.files import read_jsonl, write_atomically, writing
from lab.tracker import TensorBoard, Wandb

FILES = ("metrics.jsonl", "rollouts.jsonl")


class MetricsError(UserError):
    """A file of the record cannot be read."""


class Metrics:
    """Append to metrics.jsonl and rollouts.jsonl of `folder`; `enabled=False` (ranks other than 0) does nothing.

    `position`: lines of both files to keep when resuming; later lines and half-written ones are dropped.
    A `tracker` gets all rows too.
    """

    def __init__(self, folder: Path, enabled: bool = True, position: Sequence[int] | None = None):
        self.folder, self.enabled = folder, enabled
        self.tracker: TensorBoard | Wandb | None = None
        self.position = [0, 0]  # lines of metrics.jsonl and rollouts.jsonl, for checkpoints
        self.steps: list[dict] = []  # rows of the current rl stage, for alarms
        if not enabled:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for i, name in enumerate(FILES):
            path = self.folder / name
            if path.exists():
                kept = [line for line, _ in islice(read_rows(path), position and position[i])]
                write_atomically(path, kept)
                self.position[i] = len(kept)
        self.rows, self.rollouts = ((self.folder / name).open("a", encoding="utf-8") for name in FILES)
        for row in read_metrics(self.folder):
            self._remember(row)

    def write(self, row: dict) -> None:
        """Append one row and flush."""
        if not self.enabled:
            return
        self._append(self.rows, [row])
        self.position[0] += 1
        self._remember(row)
        if self.tracker:
            self.tracker.log(row)

    def write_rollouts(self, rows: list[dict]) -> None:
        """Append whole groups of rollouts, for people to read."""
        if self.enabled:
            self._append(self.rollouts, rows)
            self.position[1] += len(rows)
            if self.tracker:
                self.tracker.log_rollouts(rows)

    def sync(self) -> None:
        """Flush both files to disk: a checkpoint refers to their lines."""
        if self.enabled:
            os.fsync(self.rows.fileno())
            os.fsync(self.rollouts.fileno())

    def close(self) -> None:
        """Close both files, and the tracker."""
        for file in (self.rows, self.rollouts) if self.enabled else ():
            with suppress(OSError):  # of a full disk, which was said when a row could not be written
                file.close()
        if self.tracker:
            self.tracker.close()

    def _remember(self, row: dict) -> None:
        if row.get("kind") == "rl":
            if self.steps and self.steps[-1].get("stage") != row.get("stage"):
                self.steps = []
            self.steps.append(row)

    def _append(self, file: TextIO, rows: Sequence[dict]) -> None:
        with writing(Path(file.name)):
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()


def read_rows(path: Path) -> Iterator[tuple[bytes, dict]]:
    """Yield (line, row) of each line. A half-written last line is dropped, with a note on stderr.

    Raises MetricsError naming file and line at any other broken line, FileNotFoundError without a file.
    """
    try:
        for number, line, row in read_jsonl(path):
            if not isinstance(row, dict) or type(row.get("step")) is not int or type(row.get("kind", "")) is not str:
                raise ValueError(f'{path}, line {number}: not an object with a "step"')
            yield line, row
    except ValueError as error:
        raise MetricsError(f"{error}; fix or remove that line") from None


def read_metrics(folder: Path) -> list[dict]:
    """Return the rows of metrics.jsonl, as `read_rows` yields them."""
    return [row for _, row in read_rows(folder / "metrics.jsonl")]


def whole_lines(folder: Path) -> list[int]:
    """Count the lines of metrics.jsonl and of rollouts.jsonl before the first broken one."""
    counts = [0, 0]
    for i, name in enumerate(FILES):
        with suppress(FileNotFoundError, MetricsError):
            for _ in read_rows(folder / name):
                counts[i] += 1
    return counts
