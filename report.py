"""Metrics of a run: JSONL and TensorBoard for the record, one line a step for the console.

metrics.jsonl is the record: one JSON object a line, with "kind", "step" and "stage". page.py draws it.
"""

import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

FILES = ("metrics.jsonl", "rollouts.jsonl")


class MetricsError(ValueError):
    """A record that cannot be read, in one sentence: file and line."""


class Metrics:
    """Appends to metrics.jsonl and rollouts.jsonl of `folder`; `enabled=False` (ranks other than 0) does nothing.

    Raises ImportError if `tensorboard` is asked for and the package is missing."""

    def __init__(self, folder: Path, tensorboard: bool = False, enabled: bool = True):
        self.folder, self.enabled, self.board = Path(folder), enabled, None
        self.position = [0, 0]  # lines of metrics.jsonl and rollouts.jsonl, for checkpoints
        if not enabled:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if tensorboard:
            self.board = _summary_writer(self.folder)
        self._keep((math.inf, math.inf))  # a half-written last line would swallow the next row
        self._open()

    def _open(self) -> None:
        self.rows, self.rollouts = ((self.folder / name).open("a") for name in FILES)

    def write(self, row: dict) -> None:
        """Appends one row and flushes. TensorBoard gets its numbers as kind/key (eval/NAME/key for evaluations)."""
        if not self.enabled:
            return
        self.rows.write(json.dumps(row) + "\n")
        self.rows.flush()
        self.position[0] += 1
        if self.board:
            prefix = f"eval/{row.get('name')}" if row["kind"] == "eval" else row["kind"]
            for key, value in row.items():
                parts = value.items() if isinstance(value, dict) else [(None, value)]
                for part, number in parts:
                    if isinstance(number, int | float) and key not in ("step", "stage", "final"):
                        self.board.add_scalar("/".join(filter(None, (prefix, key, part))), number, row["step"])

    def write_rollouts(self, rows: list[dict]) -> None:
        """Appends a few whole rollouts of a step, for people to read."""
        if self.enabled:
            self.rollouts.writelines(json.dumps(row) + "\n" for row in rows)
            self.rollouts.flush()
            self.position[1] += len(rows)

    def cut_back_to(self, position: Sequence[int]) -> None:
        """On resume: drops what was written after a checkpoint that noted this position, atomically for each file."""
        if not self.enabled:
            return
        self.rows.close()
        self.rollouts.close()
        self._keep(position)
        self._open()
        if self.board:
            self.board.close()
            steps = [row["step"] for row in read_metrics(self.folder)]
            self.board = _summary_writer(self.folder, purge_step=max(steps, default=-1) + 1)

    def _keep(self, most_lines: Sequence[float]) -> None:
        """Rewrites both files with their whole lines, at most so many, and counts them."""
        for i, (name, most) in enumerate(zip(FILES, most_lines, strict=True)):
            path = self.folder / name
            lines = [line for line, _ in _read_lines(path)] if path.exists() else []
            kept = lines[: len(lines) if most == math.inf else int(most)]
            self.position[i] = len(kept)
            if path.exists():
                write_atomically(path, (line.rstrip(b"\n") + b"\n" for line in kept))

    def close(self) -> None:
        if self.enabled:
            self.rows.close()
            self.rollouts.close()
        if self.board:
            self.board.close()


def _summary_writer(folder: Path, purge_step: int | None = None):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "TensorBoard was asked for but is not installed: `pip install tensorboard`, or switch it off."
        ) from error
    return SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step)


def write_atomically(path: Path, chunks: Iterable[bytes]) -> None:
    """Write under another name, then rename: the path holds the old bytes or all of the new ones."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.writelines(chunks)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _read_lines(path: Path) -> Iterator[tuple[bytes, dict]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                if (
                    not isinstance(row, dict)
                    or type(row.get("step")) is not int
                    or type(row.get("kind", "")) is not str
                ):
                    raise ValueError('not an object with a "step"')
            except (ValueError, RecursionError) as error:
                if not file.peek(1):
                    print(f"{path}: dropped 1 half-written last line (line {number})", file=sys.stderr)
                    return
                raise MetricsError(f"{path}, line {number}: {str(error)[:200]}; mend or remove that line") from None
            yield line, row


def read_metrics(folder: Path) -> list[dict]:
    """The rows of metrics.jsonl. A half-written last line is dropped, and said on stderr.

    Raises MetricsError naming file and line for a broken line elsewhere, FileNotFoundError where there is no file."""
    return [row for _, row in _read_lines(Path(folder) / "metrics.jsonl")]


def format_eta(seconds: float) -> str:
    """Two units, seven characters at most up to 99 days: "3m 05s", "2h 11m", "4d 03h"; "?" if not known."""
    if not math.isfinite(seconds) or seconds < 0:
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02d}h"
    return f"{hours}h {minute:02d}m" if hours else f"{minutes}m {second:02d}s"


def console_line(row: dict, total_steps: int, eta_s: float) -> str:
    """One line for an "rl" or "sft" row; the columns of both line up. tok/s and grade are of the whole step."""

    def cell(value: float | None, width: int, spec: str) -> str:
        if value is None:
            return "-".rjust(width)
        text = format(value, spec)
        return (text if len(text) <= width else f"{value:.0e}").rjust(width)

    width = max(4, len(str(total_steps)))
    cells = [f"{row['stage']:>2} {row['kind']:<3}", f"{row['step']:>{width}}/{total_steps:<{width}}"]
    if row["kind"] == "rl":
        changed = f"rescued {cell(row.get('rescued'), 3, '.0f')} subst {cell(row.get('substituted'), 4, '.0f')}"
        cells += [
            f"reward {cell(row.get('reward_mean'), 6, '.3f')}",
            f"len {cell(row.get('response_length_mean'), 6, '.0f')}",
            f"trunc {cell(row.get('truncated_share'), 6, '.1%')}",
            f"d4 {cell(row.get('distinct4'), 5, '.3f')}",
            f"T {cell(row.get('temperature'), 4, '.2f')}",
            f"zerovar {cell(row.get('zero_variance'), 4, '.0f')}/{cell(row.get('groups'), 4, '.0f').strip():<4}",
            "update skipped".ljust(len(changed)) if row.get("skipped") else changed,
        ]
        speed = row["tokens"] / row["seconds"] if row.get("tokens") and row.get("seconds") else None
    else:
        blank = len("len 123456  trunc 12.3%_  d4 0.123  T 1.23  zerovar 1234/1234  rescued 123 subst 1234")
        cells += [f"loss   {cell(row.get('loss'), 6, '.3f')}", " " * blank]
        speed = row.get("tokens_per_s")
    waited = row["seconds_grade"] / row["seconds"] if "seconds_grade" in row and row.get("seconds") else None
    grading = f"grade {cell(waited, 5, '.1%')}" if row["kind"] == "rl" else " " * len("grade 12.3%")
    return "  ".join([*cells, f"{cell(speed, 6, '.0f')} tok/s {grading}", f"eta {format_eta(eta_s):>7}"])
