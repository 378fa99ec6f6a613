"""The known benchmarks by name, and the published results that a measurement stands beside (RECIPE.md section 6)."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from lab.problems import DATA_FILES, HUB_ID, DataError
from lab.scores import Evaluation


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark comes from, and what it is called in a table."""

    title: str
    hub_id: str  # "owner/name:split", as problems.read_problems takes it
    published_k: int | None = None  # samples per problem behind the published figures
    file: str = ""  # another name that its local file goes by


BENCHMARKS = {
    "aime24": Benchmark("AIME24", "HuggingFaceH4/aime_2024:train", 32),
    "aime25": Benchmark("AIME25", "math-ai/aime25:test", 32),
    "minerva": Benchmark("Minerva", "math-ai/minervamath:test", 4),
    "olympiad": Benchmark("Olympiad", "math-ai/olympiadbench:test", 4),
    "amc23": Benchmark("AMC23", "AI-MO/aimo-validation-amc:train", 8),
    "math500": Benchmark("MATH-500", "HuggingFaceH4/MATH-500:test"),
    "gsm8k": Benchmark("GSM8K", "openai/gsm8k:main/test", file="gsm8k/test"),
}
PUBLISHED = {  # avg@k, in the order of the first five benchmarks
    "Qwen3-1.7B": (48.3, 36.8, 34.9, 55.1, 75.6),
    "POLARIS-1.7B": (66.9, 53.0, 38.9, 63.8, 85.8),
    "R1-Distill-Qwen-7B": (55.0, 39.7, 36.7, 56.8, 81.9),
    "POLARIS-7B": (72.6, 52.6, 40.2, 65.4, 89.0),
    "Qwen3-4B": (73.8, 65.6, 43.6, 62.2, 87.2),
    "POLARIS-4B": (81.2, 79.4, 44.0, 69.1, 94.8),
}


def find_data(sources: Sequence[str], folder: Path | None = None) -> dict[str, str]:
    """Data sets to read, as {name: file or hub id}. A source is a file, a folder of files, a hub id or a known name.

    A known name is looked for in `folder` and below before the hub is asked. Raises DataError.
    """
    found: dict[str, str] = {}
    seen: dict[str, str] = {}
    for source in sources:
        path = Path(source)
        if source in BENCHMARKS:
            paths = [_local_file(source, folder) or BENCHMARKS[source].hub_id]
        elif path.is_dir():
            paths = sorted(file for file in path.iterdir() if file.suffix in DATA_FILES)
            if not paths:
                raise DataError(f"{path} holds none of {', '.join(DATA_FILES)}; name a file or a benchmark")
        elif path.is_file() or path.suffix in DATA_FILES or HUB_ID.fullmatch(source):
            paths = [source]
        else:
            near = difflib.get_close_matches(source, BENCHMARKS, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise DataError(
                f"{source} is no file, folder or hub id owner/name, and no known benchmark{hint}; "
                f"known are {', '.join(BENCHMARKS)}"
            )
        for place in map(str, paths):
            name = source if source in BENCHMARKS else Path(place.partition(":")[0]).stem
            name = place if name in found else name
            resolved = str(Path(place).resolve()) if Path(place).exists() else place
            if resolved in seen.values():
                raise DataError(f"{source} is given twice; give each data set once")
            if file_name(name) in seen:
                raise DataError(f"{source}: another set is called {file_name(name)} too; rename one of the files")
            found[name], seen[file_name(name)] = place, resolved
    return found


def _local_file(name: str, folder: Path | None) -> Path | None:
    """A benchmark's file in a folder or below it: NAME.parquet (or .json, .jsonl)."""
    if folder is None:
        return None
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; give the one that holds the benchmark files")
    patterns = [f"**/{stem}{kind}" for stem in (name, BENCHMARKS[name].file) if stem for kind in DATA_FILES]
    return next((path for pattern in patterns for path in sorted(folder.glob(pattern))), None)


def published_table(measured: dict[str, Sequence[Evaluation]]) -> list[list[str]]:
    """RECIPE section 6 with a row for each measured model: a head, then rows. "-" is what was not measured.

    A measured cell is avg@n, its 95% interval, and n, since the published figures may stand on another.
    """
    columns = {name: f"{b.title} avg@{b.published_k}" for name, b in BENCHMARKS.items() if b.published_k}
    for found in chain(*measured.values()):
        columns.setdefault(found.name, BENCHMARKS[found.name].title if found.name in BENCHMARKS else found.name)
    rows = [["model", *columns.values()]]
    for who, scores in PUBLISHED.items():
        rows.append([who, *(f"{score:.1f}" for score in scores), *["-"] * (len(columns) - len(scores))])
    for who, own in measured.items():
        cells = {e.name: f"{100 * e.avg:.1f} [{100 * e.low:.1f}, {100 * e.high:.1f}] @{e.n}" for e in own}
        rows.append([f"{who} (measured here)", *(cells.get(name, "-") for name in columns)])
    return rows


def file_name(name: str) -> str:
    """The name of a set as a file may bear it."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.")


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first a head, in aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
             for row in rows]  # fmt: skip
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
