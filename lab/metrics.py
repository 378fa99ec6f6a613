"""Write and read metrics.jsonl and rollouts.jsonl, and write TensorBoard files if the recipe asks for them.

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
from lab.glossary import markdown_table

FILES = ("metrics.jsonl", "rollouts.jsonl")


class MetricsError(UserError):
    """A file of the record cannot be read."""


class Metrics:
    """Append to metrics.jsonl and rollouts.jsonl of `folder`; `enabled=False` (ranks other than 0) does nothing.

    `position`: lines of both files to keep when resuming; later lines and half-written ones are dropped.
    Raises ImportError if `tensorboard` is set and the package is missing.
    """

    def __init__(
        self, folder: Path, tensorboard: bool = False, enabled: bool = True, position: Sequence[int] | None = None
    ):
        self.folder, self.enabled, self.board = folder, enabled, None
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
        rows = read_metrics(self.folder)
        for row in rows:
            self._remember(row)
        if tensorboard:
            purge = None if position is None else max((row["step"] for row in rows), default=-1) + 1
            self.board = _summary_writer(self.folder, purge)

    def write(self, row: dict) -> None:
        """Append one row and flush. TensorBoard gets its numbers as kind/key (evaluations: eval/NAME/key)."""
        if not self.enabled:
            return
        self._append(self.rows, [row])
        self.position[0] += 1
        self._remember(row)
        if self.board:
            prefix = f"eval/{row.get('name')}" if row["kind"] == "eval" else row["kind"]
            for key, value in row.items():
                parts = value.items() if isinstance(value, dict) else [(None, value)]
                for part, number in parts:
                    if isinstance(number, int | float) and key not in ("step", "stage", "final"):
                        self.board.add_scalar("/".join(filter(None, (prefix, key, part))), number, row["step"])

    def write_rollouts(self, rows: list[dict]) -> None:
        """Append whole groups of rollouts, for people to read."""
        if self.enabled:
            self._append(self.rollouts, rows)
            self.position[1] += len(rows)

    def sync(self) -> None:
        """Flush both files to disk: a checkpoint refers to their lines."""
        if self.enabled:
            os.fsync(self.rows.fileno())
            os.fsync(self.rollouts.fileno())

    def close(self) -> None:
        """Close all files."""
        if self.enabled:
            self.rows.close()
            self.rollouts.close()
        if self.board:
            self.board.close()

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


def _summary_writer(folder: Path, purge_step: int | None):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "run.tensorboard is set but TensorBoard is not installed: `pip install tensorboard`, or set it to false"
        ) from error
    board = SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step)
    board.add_text("glossary", markdown_table(), 0)
    return board
