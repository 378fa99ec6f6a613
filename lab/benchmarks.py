"""The known benchmarks by name, and the published results to compare with (RECIPE.md section 6)."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from lab.data_files import DATA_FILES, HUB_ID, NOT_DATA, DataError, data_name
from lab.scores import Evaluation


@dataclass(frozen=True)
class Benchmark:
    """The source of a benchmark and its title in a table."""

    title: str
    hub_id: str  # "owner/name:split", for problems.read_problems
    published_k: int | None = None  # samples per problem behind the published figures
    file: str = ""  # alternative name of its local file


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
    """Resolve data sets to {name: file, folder or hub id}. A source is a file, a folder, a hub id or a known name.

    A folder holds a data set per file, or the shards of one. A known name is searched for in `folder` and below,
    then on the hub. Raises DataError.
    """
    found: dict[str, str] = {}
    seen: dict[str, str] = {}
    for source in sources:
        path = Path(source)
        if source in BENCHMARKS:
            paths = [_local_file(source, folder) or BENCHMARKS[source].hub_id]
        elif path.is_dir():
            data = [file for file in path.iterdir() if file.name.endswith(DATA_FILES)]
            paths = sorted(file for file in data if not file.name.endswith(NOT_DATA))
            if not paths and not any(file.name.endswith(DATA_FILES) for file in path.rglob("*")):
                raise DataError(f"{path} has no {', '.join(DATA_FILES)} file; give a file or a benchmark")
            if not paths or any(re.search(r"-\d+-of-\d+\.", file.name) for file in paths):
                paths = [path]  # the shards of one data set
        elif (
            path.is_file()
            or Path(source.partition(":")[0]).is_dir()
            or path.name.endswith(DATA_FILES)
            or HUB_ID.fullmatch(source)
        ):
            paths = [source]
        else:
            near = difflib.get_close_matches(source, BENCHMARKS, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise DataError(
                f"{source} is not a file, a folder, a hub id owner/name or a known benchmark{hint}; "
                f"known are {', '.join(BENCHMARKS)}"
            )
        for place in map(str, paths):
            name = source if source in BENCHMARKS else data_name(place)
            name = place if name in found else name
            resolved = str(Path(place).resolve()) if Path(place).exists() else place
            if resolved in seen.values():
                raise DataError(f"{source} is given twice; give each data set once")
            if file_name(name) in seen:
                raise DataError(f"{source}: another data set is also named {file_name(name)}; rename one of the files")
            found[name], seen[file_name(name)] = place, resolved
    return found


def _local_file(name: str, folder: Path | None) -> Path | None:
    """Find a benchmark's file, NAME.parquet (or .jsonl, .json), in a folder or below it."""
    if folder is None:
        return None
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; give the one with the benchmark files")
    patterns = [f"**/{stem}{kind}" for stem in (name, BENCHMARKS[name].file) if stem for kind in DATA_FILES]
    return next((path for pattern in patterns for path in sorted(folder.glob(pattern))), None)


def published_table(measured: dict[str, Sequence[Evaluation]]) -> list[list[str]]:
    """Return a row for each measured model, header first, below those of RECIPE section 6 for the measured benchmarks.

    A measured cell is avg@n, its 95% interval and n, which may differ from the published one; "-" is not known.
    """
    names = dict.fromkeys(found.name for found in chain(*measured.values()))
    known = [name for name, benchmark in BENCHMARKS.items() if benchmark.published_k]
    titles = {name: b.title + f" avg@{b.published_k}" * bool(b.published_k) for name, b in BENCHMARKS.items()}
    rows = [["model", *(titles.get(name, name) for name in names)]]
    for model, figures in PUBLISHED.items() if names.keys() & set(known) else ():
        scores = dict(zip(known, figures, strict=True))
        rows.append([model, *(f"{scores[name]:.1f}" if name in scores else "-" for name in names)])
    for model, own in measured.items():
        cells = {e.name: f"{100 * e.avg:.1f} [{100 * e.low:.1f}, {100 * e.high:.1f}] @{e.n}" for e in own}
        rows.append([f"{model} (measured here)", *(cells.get(name, "-") for name in names)])
    return rows


def file_name(name: str) -> str:
    """Return the name of a data set with the characters that a file name allows."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.")


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells, header first, as text in aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
