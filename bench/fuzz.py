"""Fuzz every reader and the recipe parser: how many inputs are read, and how many refused with a sentence?

    python bench/fuzz.py                            # 2,000 examples of each target; a few minutes
    python bench/fuzz.py --examples 20000 --seed 7 --only recipe

The targets are those of tests/test_fuzz.py, which runs a few examples of each. Anything but a correct result or
one sentence of the reader's error class (another exception, a wrong value, more than 5 seconds) is a failure: it is
shown with its smallest example, and the exit status is 1. Needs `hypothesis` and `pytest` (requirements.txt).
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from test_fuzz import TARGETS, fuzz  # noqa: E402

from lab.benchmarks import text_table  # noqa: E402


def main() -> None:
    """Fuzz the selected targets and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=2000, help="examples of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="targets whose name contains this")
    arguments = parser.parse_args()
    rows, record, failures = [["target", "tried", "read", "refused", "neither", "s"]], {}, 0
    for target in (target for target in TARGETS if arguments.only in target.name):
        begun, got, failed = time.perf_counter(), {}, 0
        try:
            with tempfile.TemporaryDirectory() as folder:
                got = fuzz(target, Path(folder), arguments.examples, arguments.seed)
        except Exception as error:  # any exception is a finding
            failed = 1
            causes = error.exceptions if isinstance(error, ExceptionGroup) else [error]
            for cause in causes:
                notes = "\n".join(getattr(cause, "__notes__", []))[:2000]
                print(f"{target.name}: {type(cause).__name__}: {str(cause)[:500]}\n{notes}", file=sys.stderr)
        failures += failed
        counts = {"read": got.get("read", 0), "refused": got.get("refused", 0), "neither": failed}
        seconds = time.perf_counter() - begun
        record[target.name] = counts
        rows.append([target.name, str(sum(counts.values())), *map(str, counts.values()), f"{seconds:.0f}"])
        print(f"{target.name}: {counts}", file=sys.stderr)
    print(text_table(rows))
    print(json.dumps({"examples": arguments.examples, "seed": arguments.seed, "targets": record}))
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
