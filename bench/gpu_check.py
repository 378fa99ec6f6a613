"""All GPU figures in one command: do the CUDA paths agree, and how close are they to the machine's limits?

    pip download --no-deps -d .whl math-verify==0.9.0 latex2sympy2_extended==1.11.0 antlr4-python3-runtime==4.13.2
    # on the machine with the GPU, which needs no network:
    python3 -m pip install -q --no-index --no-deps --target /tmp/site .whl/*.whl
    PYTHONPATH=/tmp/site python3 bench/gpu_check.py --seconds 480

    python bench/gpu_check.py --only attention decode-kernel     # some of the checks; --list names them all
    python bench/gpu_check.py --small                            # anywhere: tiny shapes in float32 on a CPU

Every check of bench/gpu_checks.py is a child process with a time limit; one that fails or hangs becomes a line of
results.jsonl and the next one starts. Every figure names the card, the version of torch and the path that really ran.
The folder --out gets results.jsonl (each figure as soon as it is known), logs.txt and table.txt.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECKS = {  # by importance: seconds it may take, and what it measures, with the function of bench/gpu_checks.py
    "machine": (40, "ceilings of bandwidth and matrix rate; an nccl group of one process"),
    "attention": (50, "packed attention and log-probs against float64"),
    "decode-kernel": (60, "the paged decode kernel against float64, and its bandwidth"),
    "agreement": (45, "log-prob difference between sampler and trainer in bfloat16"),
    "graphs": (50, "CUDA graphs against single steps; memory after sampling"),
    "decode-time": (75, "time of a decode step by context"),
    "train": (100, "train.py on a small world, killed and resumed"),
    "memory-24": (60, "a 24 GB card: full cache, preemption, out-of-memory"),
    "evening": (90, "a step of the recipes for a 24 GB card, beside their plan"),
    "update": (130, "tokens per second, utilisation and memory of the update"),
    "generate": (90, "ragged sampling beside transformers"),
}
COMMAND = [sys.executable, __file__]  # with --one NAME it runs a check
LEAST_SHARE = 0.3  # of a check's limit: with less time left it is skipped
TABLE_CHARACTERS = 11_000


class Child:
    """A check in a process group of its own; it imports torch at once and waits for `go`."""

    def __init__(self, name: str, small: bool, out: Path):
        self.name, self.log = name, out / f"log-{name}.tmp"
        words = [*COMMAND, "--one", name, "--out", str(out), *["--small"] * small]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
            )

    def go(self, limit: float) -> tuple[str, str]:
        """Run the check for at most `limit` seconds; return its status and the last word of what went wrong."""
        try:
            self.process.communicate(f"{limit}\n".encode(), timeout=limit)
            status = "failed" if self.process.returncode else "ok"
        except subprocess.TimeoutExpired:
            status = "timeout"
        finally:  # also after Ctrl-C
            self.kill()
        return status, "" if status == "ok" else last_word(self.log.read_text(errors="replace"), status)

    def kill(self) -> None:
        """End the check and what it started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()


def last_word(log: str, status: str) -> str:
    """Return the last line of a traceback or, for a check that hung, the innermost line of code it had reached."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    stacks = [i for i, line in enumerate(lines) if "(most recent call first)" in line]
    if status == "timeout" and stacks and stacks[-1] + 1 < len(lines):
        return f"at {lines[stacks[-1] + 1]}"
    return lines[-1][:300] if lines else "no output"


def append(path: Path, line: str) -> None:
    """Append a line in one write, so that a kill cannot leave half of it."""
    with path.open("a") as file:
        file.write(line + "\n")


def read_results(path: Path) -> list[dict]:
    """Return the lines of results.jsonl, without one that a kill has cut."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def run_checks(names: list[str], seconds: float, small: bool, out: Path) -> list[dict]:
    """Run the checks one after the other, each child starting up while the one before it works."""
    results, logs = out / "results.jsonl", out / "logs.txt"
    end, waiting = time.monotonic() + seconds, None
    for i, name in enumerate(names):
        begun, limit = time.monotonic(), CHECKS[name][0]
        available = min(limit, end - begun - 3)
        if available < LEAST_SHARE * limit:
            status, error = "skipped", f"{max(0, available):.0f} s left of its {limit}"
        else:
            child = waiting if waiting and waiting.name == name else Child(name, small, out)
            waiting = Child(names[i + 1], small, out) if i + 1 < len(names) else None
            status, error = child.go(available)
            with logs.open("ab") as file:
                file.write(f"\n===== {name}: {status} =====\n".encode() + child.log.read_bytes()[-200_000:])
            child.log.unlink()
        if waiting and status == "skipped" and waiting.name == name:
            waiting.kill()
            waiting.log.unlink()
            waiting = None
        took = time.monotonic() - begun
        seen = [row for row in read_results(results) if row.get("card")]
        machine = {key: seen[-1][key] for key in ("card", "torch")} if seen else {}
        append(
            results, json.dumps({"check": name, "status": status, "seconds": round(took, 1), "error": error, **machine})
        )
        print(f"{name}: {status}, {took:.1f} s {error}", flush=True)
    return read_results(results)


def verdict(row: dict) -> str:
    """Return whether a figure meets its target, such as "< 0.005"."""
    if not row.get("target") or row["value"] is None:
        return ""
    sign, bound = row["target"].split()
    met = row["value"] < float(bound) if sign == "<" else row["value"] >= float(bound)
    return f"{row['target']}: {'met' if met else 'MISSED'}"


def table(rows: list[dict]) -> str:
    """Return all figures as text: a heading per check, and a path where it differs from the line before."""
    lines = []
    for status in (row for row in rows if "status" in row):
        error = f" ({status['error']})" if status["error"] else ""
        lines.append(f"{status['check']}: {status['status']}, {status['seconds']} s{error}")
        path = ""
        for row in rows:
            if row["check"] != status["check"] or "status" in row:
                continue
            value = "" if row["value"] is None else f" {row['value']:.4g} {row['unit']}".rstrip()
            changed, path = row["path"] != path, row["path"]
            parts = [f"  {row['what']}:{value}", row["note"], verdict(row), f"[{path}]" if changed and path else ""]
            lines.append("  ".join(part for part in parts if part))
    machine = next((row for row in rows if row.get("card")), {"card": "no card seen", "torch": "?"})
    return "\n".join([f"{machine['card']}, torch {machine['torch']}", *lines])


def main() -> None:
    """Run the checks, or one of them in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=480, help="for all checks; what no longer fits is skipped")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ROOT / "bench/out/gpu")))
    parser.add_argument("--only", nargs="+", choices=CHECKS, help="default: all")
    parser.add_argument("--small", action="store_true", help="tiny shapes in float32, for a CPU")
    parser.add_argument("--list", action="store_true", help="name the checks and their limits")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(f"{name:14} {limit:4} s  {what}" for name, (limit, what) in CHECKS.items()))
        return
    if arguments.one:
        sys.path.insert(0, str(ROOT))
        from bench.gpu_checks import run_check

        run_check(arguments.one, arguments.small, arguments.out / "results.jsonl")
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in ("results.jsonl", "logs.txt", "table.txt"):
        (arguments.out / name).unlink(missing_ok=True)
    rows = run_checks(arguments.only or list(CHECKS), arguments.seconds, arguments.small, arguments.out)
    text = table(rows)
    (arguments.out / "table.txt").write_text(text + "\n")
    print(text[:TABLE_CHARACTERS])
    sys.exit(any(row.get("status") in ("failed", "timeout") for row in rows))


if __name__ == "__main__":
    main()
