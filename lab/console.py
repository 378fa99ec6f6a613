"""What a step says on the console: one line, whose columns line up from step to step."""

import math


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
