"""Metrics of a run: JSONL and TensorBoard for the record, one line a step for the console.

metrics.jsonl is the record: one JSON object a line, with "kind", "step" and "stage". page.py draws it.
"""

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TextIO

from engine.files import write_atomically

FILES = ("metrics.jsonl", "rollouts.jsonl")
# what a row says that depends on neither times, rates nor memory: an interrupted run equals an uninterrupted one in
# these, and so do runs on one and the same CPU
DETERMINISTIC = (
    "kind", "step", "stage", "label", "name", "rule", "loss", "grad_norm", "lr", "skipped", "nonfinite", "reward_mean",
    "accuracy", "reward_correct", "reward_format", "reward_steps", "response_length_mean", "response_length_max",
    "truncated_share", "distinct4", "distinct4_left_out", "entropy", "groups", "solve_none", "solve_all",
    "zero_variance", "rescued", "substituted", "temperature", "max_response_tokens", "problems", "epoch",
    "clip_low_share", "clip_high_share", "dual_clip_share", "ratio_mean", "rescued_ratio_mean", "logprob_diff_mean",
    "logprob_diff_max", "avg", "low", "high", "n", "by_type", "by_difficulty", "pass_at", "maj_at", "by_length",
    "length_mean", "no_box_share", "before", "after", "kept", "dropped", "target_distinct4", "chosen", "curve",
)  # fmt: skip


class MetricsError(ValueError):
    """A record that cannot be read, or written, in one sentence: file and line."""


class Metrics:
    """Appends to metrics.jsonl and rollouts.jsonl of `folder`; `enabled=False` (ranks other than 0) does nothing.

    `position`: lines of both to go on from; what was written after them is dropped, as is a half-written line.
    Raises ImportError if `tensorboard` is asked for and the package is missing."""

    def __init__(
        self, folder: Path, tensorboard: bool = False, enabled: bool = True, position: Sequence[int] | None = None
    ):
        self.folder, self.enabled, self.tensorboard, self.board = Path(folder), enabled, tensorboard, None
        self.position = [0, 0]  # lines of metrics.jsonl and rollouts.jsonl, for checkpoints
        self.steps: list[dict] = []  # the rows of the present rl stage, for alarms
        if not enabled:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._begin(position)

    def _begin(self, position: Sequence[int] | None) -> None:
        self._keep((math.inf, math.inf) if position is None else position)
        self.rows, self.rollouts = ((self.folder / name).open("a") for name in FILES)
        rows, self.steps = read_metrics(self.folder), []
        for row in rows:
            self._note(row)
        if self.tensorboard:
            purge = None if position is None else max((row["step"] for row in rows), default=-1) + 1
            self.board = _summary_writer(self.folder, purge_step=purge)

    def _note(self, row: dict) -> None:
        if row["kind"] == "rl":
            self.steps = [*(self.steps if self.steps and self.steps[-1]["stage"] == row["stage"] else []), row]

    def _append(self, file: TextIO, rows: Sequence[dict]) -> None:
        try:
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
        except OSError as error:
            raise MetricsError(
                f"{file.name}: a line cannot be written ({error.strerror}): make room, then go on with "
                f"--resume {self.folder}"
            ) from None

    def write(self, row: dict) -> None:
        """Appends one row and flushes. TensorBoard gets its numbers as kind/key (eval/NAME/key for evaluations)."""
        if not self.enabled:
            return
        self._append(self.rows, [row])
        self.position[0] += 1
        self._note(row)
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
            self._append(self.rollouts, rows)
            self.position[1] += len(rows)

    def sync(self) -> None:
        """Brings both files to the disk: a checkpoint counts on their lines."""
        if self.enabled:
            os.fsync(self.rows.fileno())
            os.fsync(self.rollouts.fileno())

    def cut_back_to(self, position: Sequence[int]) -> None:
        """On resume: drops what was written after a checkpoint that noted this position, atomically for each file."""
        if not self.enabled:
            return
        self.close()
        self._begin(position)

    def _keep(self, most_lines: Sequence[float]) -> None:
        """Rewrites both files with their whole lines, at most so many, and counts them."""
        for i, (name, most) in enumerate(zip(FILES, most_lines, strict=True)):
            path = self.folder / name
            lines = _read_lines(path) if path.exists() else iter(())
            kept = [line for line, _ in islice(lines, None if most == math.inf else int(most))]
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


def whole_lines(folder: Path) -> list[int]:
    """How many lines of metrics.jsonl and of rollouts.jsonl are whole, up to the first that is not."""
    counts = [0, 0]
    for i, name in enumerate(FILES):
        with suppress(FileNotFoundError, MetricsError):
            for _ in _read_lines(folder / name):
                counts[i] += 1
    return counts


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


SMOOTHED = 5  # steps over which an alarm takes its means
QUIET = 10  # steps for which an alarm must have been silent before it is said again
# thresholds of the alarms; RECIPE's where it gives one, else choices
MOST_ZERO_VARIANCE = 2 / 3  # of groups: from there on the update is skipped (RECIPE section 4)
MOST_TRUNCATED = 0.1  # of rollouts: at 52K fewer were cut; 24K, with less than 15%, did harm (RECIPE section 3)
MOST_GROWTH = 2.0  # a choice: of the mean length within a stage, unless accuracy grew as well
LEAST_DIVERSITY, MOST_DIVERSITY = 0.75, 1.25  # a choice: of distinct-4 at the stage's start, which a stage restores
LEAST_ENTROPY = 0.25  # a choice: of that at the stage's start


def standing_alarms(steps: Sequence[dict]) -> dict[str, str]:
    """What is wrong after the last of these rows, the "rl" rows of one stage: a sentence by its kind.

    Every figure is the mean over the last SMOOTHED rows, against that over the stage's first where it is relative.
    """

    def mean(key: str, rows: Sequence[dict]) -> float:
        values = [row[key] for row in rows if isinstance(row.get(key), int | float) and math.isfinite(row[key])]
        return sum(values) / len(values) if values else math.nan  # which no comparison holds for

    if len(steps) < SMOOTHED:
        return {}
    first, last = steps[:SMOOTHED], steps[-SMOOTHED:]
    found = {}
    groups = mean("groups", last)
    empty = mean("zero_variance", last) / groups if groups else math.nan
    if empty > MOST_ZERO_VARIANCE:
        found["zero variance"] = (
            f"{empty:.0%} of the groups have no signal: the problems are too easy or too hard for the model"
        )
    truncated = mean("truncated_share", last)
    if truncated > MOST_TRUNCATED:
        found["truncation"] = f"{truncated:.0%} of the rollouts are cut off: raise the stage's max_response_tokens"
    was, now = mean("response_length_mean", first), mean("response_length_mean", last)
    if now > MOST_GROWTH * was and mean("accuracy", last) <= mean("accuracy", first):
        found["length"] = f"responses run away: {now:.0f} tokens, not {was:.0f}, and no more of them are right"
    was, now = mean("distinct4", first), mean("distinct4", last)
    if now < LEAST_DIVERSITY * was:
        found["diversity"] = f"diversity collapses: distinct-4 {now:.3f}, not {was:.3f}: raise the temperature"
    elif now > MOST_DIVERSITY * was:
        found["diversity"] = f"diversity explodes: distinct-4 {now:.3f}, not {was:.3f}: lower the temperature"
    was, now = mean("entropy", first), mean("entropy", last)
    if now < LEAST_ENTROPY * was:
        found["entropy"] = f"entropy collapses: {now:.3f} nats a token, not {was:.3f}"
    return found


def new_alarms(steps: Sequence[dict]) -> list[str]:
    """The alarms that begin with the last of these rows: one that goes on, or flickers, is said once."""
    said = {kind for ago in range(1, QUIET + 1) for kind in standing_alarms(steps[:-ago])}
    return [sentence for kind, sentence in standing_alarms(steps).items() if kind not in said]


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
