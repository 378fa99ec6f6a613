"""Problems: reading them, how hard they are for the model in hand, and which of them to train on.

Difficulty is relative: the pass rate of the model about to be trained, over a group of rollouts
(RECIPE section 1). Before training, the problems that it always solves are dropped (the J shape
becomes its mirror image); at the end of each stage, those that it has meanwhile learnt. All of it
is pure functions of problems and their history, but for the reading and writing of files.
"""

import difflib
import hashlib
import json
import math
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

INSTRUCTION = "Let's think step by step and output the final answer within \\boxed{}."
DATA_FILES = (".parquet", ".jsonl", ".json")
HUB_ID = re.compile(r"(?P<owner>[\w.-]+)/(?P<name>[\w.-]+)(:(?P<split>[\w./-]+))?")


class DataError(Exception):
    """Something in the data that a person has to put right; the message says what, where and how."""


@dataclass(frozen=True)
class Problem:
    """One problem to solve: its text, what counts as right, and what the data says about it."""

    id: str  # "source/name"; survives shuffling, filtering and resuming
    text: str  # the user's message as the data has it, before prompt_text
    answers: tuple[str, ...]  # accepted answers; any match counts
    type: str = ""  # the data's own kind of problem, where it has one
    difficulty: float | None = None  # the data's own figure, on the data's own scale
    solution: str = ""  # worked solution, for sft stages


# ---- reading and writing -------------------------------------------------------------------------


def read_problems(source: str | Path, on_bad_row: str = "stop") -> list[Problem]:
    """The problems of a local .parquet, .json or .jsonl file, or of a Hugging Face dataset "owner/name[:split]".

    on_bad_row: "stop" raises at the first row that cannot be used; "skip" leaves such rows out and says how many;
    "keep" keeps problems without an answer, says how many, and stops at other faults: an evaluation may have to count
    them. Of rows with the same id and text the first is kept, and the count is printed.
    Ids begin with the file's stem (the dataset's name), so that sources can be mixed. Raises DataError.
    """
    if on_bad_row not in ("stop", "skip", "keep"):
        raise DataError(f'on_bad_row is {on_bad_row!r}; it must be "stop", "skip" or "keep".')
    path, hub_id = Path(source), HUB_ID.fullmatch(str(source))
    if hub_id and path.suffix not in DATA_FILES and not path.parent.is_dir():
        stem, files = hub_id["name"], download(f"{hub_id['owner']}/{hub_id['name']}", hub_id["split"])
    else:
        stem, files = path.stem, [existing_file(path)]
    problems, repeated = settle_ids([p for file in files for p in read_file(file, stem, on_bad_row)], stem)
    if repeated:
        print(f"{source}: left out {len(repeated)} duplicate rows (first: {repeated[0]})", file=sys.stderr)
    return problems


def read_chats(source: str | Path) -> list[list[dict]]:
    """The chats of a .jsonl, .json or .parquet file whose rows have `messages`: role and content, an assistant's last.

    Fine-tuning data alone; raises DataError with the row's number. `has_chats` says whether a file is one.
    """
    path, chats = existing_file(Path(source)), []
    for number, row in parquet_rows(path) if path.suffix == ".parquet" else json_rows(path):
        messages = row.get("messages") if isinstance(row, dict) else None
        whole = (
            isinstance(messages, list)
            and messages
            and all(
                isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
                for m in messages
            )
        )
        if not whole or messages[-1]["role"] != "assistant":
            raise DataError(f"{path}, row {number} is no chat that ends with the assistant's message; mend the row.")
        chats.append(messages)
    return chats


def has_chats(source: str | Path) -> bool:
    """Whether a local file's first row has `messages`."""
    path = Path(source)
    if not path.is_file():
        return False
    _, row = next(iter(parquet_rows(path) if path.suffix == ".parquet" else json_rows(path)), (0, {}))
    return isinstance(row, dict) and "messages" in row


def existing_file(path: Path) -> Path:
    """The path itself; where there is no such file, DataError with the nearest name in its folder."""
    if path.is_file() and path.suffix in DATA_FILES:
        return path
    kinds = ", ".join(DATA_FILES)
    if path.is_file():
        raise DataError(f"{path} is not one of {kinds}; convert it to one of these.")
    folder = path if path.is_dir() else path.parent
    if not folder.is_dir():
        raise DataError(f"{path} cannot be read: the folder {folder} does not exist; check the path.")
    here = sorted(p.name for p in folder.iterdir() if p.suffix in DATA_FILES)
    near = difflib.get_close_matches(path.name, here, n=1, cutoff=0.0)
    hint = f"did you mean {folder / near[0]}?" if near else f"nor does {folder} hold any of {kinds}."
    raise DataError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}; {hint}")


def download(repo: str, split: str | None) -> list[Path]:
    """The data files of a hub dataset: those of the split (default: train where there is one, else all)."""
    try:
        from huggingface_hub import HfApi, hf_hub_download
        from huggingface_hub.errors import HTTPError
    except ImportError as error:
        raise DataError(f"{repo} is no local file, and the hub needs: pip install huggingface_hub") from error
    try:
        names = HfApi().list_repo_files(repo, repo_type="dataset")
        data = sorted(n for n in names if n.endswith(DATA_FILES) and not n.endswith("dataset_infos.json"))
        of_split = [n for n in data if re.search(rf"(^|[/_-]){re.escape(split or 'train')}([-_./]|$)", n)]
        chosen = of_split or ([] if split else data)
        if not chosen:
            has = ", ".join(data) or "none"
            raise DataError(f"the dataset {repo} has no data file for {split or 'any split'}; it has: {has}.")
        return [Path(hf_hub_download(repo, name, repo_type="dataset")) for name in chosen]
    except (HTTPError, OSError, ValueError) as error:
        why = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise DataError(
            f"{repo} is no local file and not to be had from the hub ({why}); check name and network."
        ) from error


def read_file(path: Path, stem: str, on_bad_row: str) -> list[Problem]:
    """The usable rows of one file; id is "stem/own id", or "" where a row states none."""
    rows = list(parquet_rows(path) if path.suffix == ".parquet" else json_rows(path))
    if not rows:
        raise DataError(f"{path} holds no rows; put at least one problem into it.")
    schema = schema_of([row for _, row in rows if isinstance(row, dict)], path)
    problems, bad = [], []
    for number, row in rows:
        problem = schema(row) if isinstance(row, dict) else None
        reason = fault(problem) if problem else row
        kept = on_bad_row == "keep" and problem is not None and problem.text.strip()
        if reason and not kept and on_bad_row != "skip":
            raise DataError(f'{path}, row {number} {reason}; mend the row, or read with on_bad_row="skip".')
        if reason:
            bad.append(f"row {number} {reason}")
        if reason and not kept:
            continue
        # an id that names its source already was written by write_problems, and stays
        settled = not problem.id or (schema is from_own and "/" in problem.id)
        problems.append(problem if settled else replace(problem, id=f"{stem}/{problem.id}"))
    if not problems:
        raise DataError(f"{path} holds no usable row: {bad[0]}, and so on for all {len(bad)}; mend the file.")
    if bad:
        what = "kept, as problems that nothing can solve," if on_bad_row == "keep" else "left out"
        some = ", ".join(bad[:5]) + ", ..." * (len(bad) > 5)
        print(f"{path}: {what} {len(bad)} unusable rows ({some})", file=sys.stderr)
    return problems


def parquet_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """(row number, row) of a parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        return enumerate(pyarrow.parquet.read_table(path).to_pylist(), start=1)
    except pyarrow.ArrowException as error:
        raise DataError(
            f"{path} is no readable parquet file ({str(error).splitlines()[0]}); fetch it again."
        ) from error


def json_rows(path: Path) -> Iterator[tuple[int, dict | str]]:
    """(row number, row) of a JSON array or of JSON lines; in place of a row that is none, what is wrong with it."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        array = json.loads(text) if text.lstrip().startswith("[") else None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno} is malformed JSON ({error.msg}); mend the file there.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (at byte {error.start}); convert it to UTF-8.") from error
    if array is not None:
        yield from ((n, row if isinstance(row, dict) else "is no JSON object") for n, row in enumerate(array, start=1))
        return
    # not splitlines(): U+2028 may stand inside a JSON string
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            yield number, f"is malformed JSON ({error.msg}, column {error.colno})"
        else:
            yield number, row if isinstance(row, dict) else "is no JSON object"


# ---- schemas: row -> Problem, whose id is the row's own, or "" -----------------------------------


def from_own(row: dict) -> Problem:
    """What write_problems wrote: id, problem, answers."""
    return problem_of(row, row.get("id"), row.get("problem"), row.get("answers"))


def from_verl(row: dict) -> Problem:
    """POLARIS and verl: chat messages, reward_model.ground_truth, extra_info.index or .id."""
    extra, messages = nested(row, "extra_info"), row.get("prompt") or []
    # a system message is the chat template's business; an earlier turn would change the problem
    turns = [m.get("content") for m in messages if isinstance(m, dict) and m.get("role") != "system"]
    own_id = extra.get("index") if extra.get("index") is not None else extra.get("id")
    return problem_of(
        row, own_id, turns[0] if len(turns) == 1 else None, nested(row, "reward_model").get("ground_truth")
    )


def from_math(row: dict) -> Problem:
    """DeepScaleR and MATH: problem, answer, and what else there is."""
    own_id = row.get("id") if row.get("id") is not None else row.get("unique_id")
    return problem_of(row, own_id, row.get("problem"), row.get("answer"))


def from_gsm8k(row: dict) -> Problem:
    """GSM8K: a worked solution with calculator marks (<<48/2=24>>), then "#### 1,080"."""
    steps, _, answer = str(row.get("answer") or "").partition("####")
    answer = answer.strip().replace(",", "")
    solution = re.sub(r"<<[^<>]*>>", "", steps).strip() + f"\nThe final answer is \\boxed{{{answer}}}."
    return problem_of({**row, "solution": solution}, row.get("id"), row.get("question"), answer)


def from_questions(row: dict) -> Problem:
    """question and plain answer, as Minerva on the hub."""
    return problem_of(row, row.get("id"), row.get("question"), row.get("answer"))


def from_olympiad(row: dict) -> Problem:
    """OlympiadBench: question, and the list of accepted answers."""
    return problem_of(row, row.get("id"), row.get("question"), row.get("final_answer"))


SCHEMAS = {
    ("problem", "answers"): from_own,
    ("prompt", "reward_model"): from_verl,
    ("problem", "answer"): from_math,
    ("question", "final_answer"): from_olympiad,
    ("question", "answer"): from_questions,
}


def schema_of(rows: Sequence[dict], path: Path) -> Callable[[dict], Problem]:
    """The reader of rows with these columns; DataError shows the columns where none is known."""
    first = rows[0] if rows else {}
    for columns, schema in SCHEMAS.items():
        if first.keys() >= set(columns) or not first:
            # one marked solution makes a GSM8K file, in which a row without the mark has no answer
            marked = schema is from_questions and any("####" in str(row.get("answer")) for row in rows)
            return from_gsm8k if marked else schema
    known = ", or ".join(" + ".join(columns) for columns in SCHEMAS)
    raise DataError(f"{path} has the columns {', '.join(first)}, which is no known schema; rename them to {known}.")


def problem_of(row: dict, own_id, text, answers) -> Problem:
    """A Problem from what every schema has; fields that a row lacks stay empty."""
    return Problem(
        id="" if own_id is None else str(own_id),
        text=text if isinstance(text, str) else "",
        answers=accepted(answers),
        type=str(row.get("type") or row.get("subject") or ""),
        difficulty=figure(row["difficulty"] if row.get("difficulty") is not None else row.get("level")),
        solution=str(row.get("solution") or "").strip(),
    )


def nested(row: dict, column: str) -> dict:
    """A column that should hold a mapping; empty where it does not."""
    return row[column] if isinstance(row.get(column), dict) else {}


def accepted(value) -> tuple[str, ...]:
    """A ground truth as the distinct answers that it accepts; () where there is none."""
    if isinstance(value, str) and value.startswith('["'):  # only strings: "[-9, 9]" is a closed interval
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            pass  # then it is an answer that happens to begin so
    values = value if isinstance(value, list) else [value]
    known = [str(v).strip() for v in values if v is not None and v == v]  # nan is no answer
    return tuple(dict.fromkeys(a for a in known if a))


def figure(value) -> float | None:
    """A difficulty as a number ("3/8", as POLARIS writes it, is 0.375; "Level 5", as MATH does, is 5), or None."""
    match = re.fullmatch(r"(?:Level )?(-?\d+(?:\.\d+)?)(?:/([1-9]\d*))?", str(value))
    return float(match[1]) / float(match[2] or 1) if match else None


def fault(problem: Problem) -> str:
    """What makes a problem unusable, in words; empty when nothing does."""
    if not problem.text.strip():
        return "has no problem text"
    return "" if problem.answers else "has no answer"


def settle_ids(problems: list[Problem], stem: str) -> tuple[list[Problem], list[str]]:
    """Problems with unique ids, and the ids of the duplicates left out.

    An id that stands for several texts, or is missing, gives way to a hash of the text.
    """
    keys = [normalised(p.text) for p in problems]
    texts = defaultdict(set)
    for problem, key in zip(problems, keys, strict=True):
        texts[problem.id].add(key)
    unique, repeated = {}, []
    for problem, key in zip(problems, keys, strict=True):
        if not problem.id or len(texts[problem.id]) > 1:
            problem = replace(problem, id=f"{stem}/{hashlib.sha256(key.encode()).hexdigest()[:16]}")
        if problem.id in unique:
            repeated.append(problem.id)
        else:
            unique[problem.id] = problem
    return list(unique.values()), repeated


def write_problems(problems: Iterable[Problem], path: str | Path) -> None:
    """One JSON object per line, as read_problems reads it; atomic. Raises DataError rather than overwrite."""
    path = Path(path)
    if path.exists():
        raise DataError(f"{path} exists already; choose another name, or remove it first.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        for p in problems:
            row = {"id": p.id, "problem": p.text, "answers": p.answers, "type": p.type,
                   "difficulty": p.difficulty, "solution": p.solution}  # fmt: skip
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(temporary, path)


def prompt_text(problem: Problem, instruction: str = INSTRUCTION) -> str:
    """The user's message with the instruction, which benchmark files carry already (RECIPE section 1)."""
    if not instruction or instruction in problem.text or INSTRUCTION in problem.text:
        return problem.text
    return f"{problem.text.rstrip()} {instruction}"


def normalised(text: str) -> str:
    """The text without the instruction, letter case, white space and dollar signs: what two copies share."""
    return "".join(text.replace(INSTRUCTION, "").replace("$", "").lower().split())


def contaminated(train: Iterable[Problem], benchmark: Iterable[Problem]) -> list[Problem]:
    """The training problems whose text, normalised, is a benchmark's."""
    held_out = {normalised(p.text) for p in benchmark}
    return [p for p in train if normalised(p.text) in held_out]


# ---- the history of pass rates -------------------------------------------------------------------


@dataclass(frozen=True)
class Visit:
    """One group of rollouts of one problem, as it was graded."""

    problem_id: str
    stage: float  # k - 0.5: the estimate before stage k
    step: int
    rewards: tuple[float, ...]  # the originals, before rescue and substitution (RECIPE section 1)


class History:
    """Every visit to every problem. A visit of the same problem, stage and step replaces the earlier
    one, so that steps replayed after a resume are not counted twice."""

    def __init__(self):
        self.by_problem: dict[str, dict[tuple[int, int], Visit]] = {}
        self.log: list[Visit] = []
        self.written: dict[Path, int] = {}  # how much of the log each file holds
        self.lines_dropped = 0

    def append(self, visit: Visit) -> None:
        if not visit.rewards:
            raise DataError(f"the visit to {visit.problem_id} at step {visit.step} has no rewards; grade it first.")
        self.by_problem.setdefault(visit.problem_id, {})[visit.stage, visit.step] = visit
        self.log.append(visit)

    def visits(self, problem_id: str) -> list[Visit]:
        return [visit for _, visit in sorted(self.by_problem.get(problem_id, {}).items())]

    def pass_rate(self, problem_id: str, since_stage: int | None = None) -> float | None:
        """Mean reward over all rollouts since the stage (default: ever), or None if it was not visited."""
        return mean_reward(v for v in self.visits(problem_id) if since_stage is None or v.stage >= since_stage)

    def estimate(self, problem_id: str, stage: int | None = None) -> float | None:
        """Mean reward within the last stage, up to the given one, that visited the problem, or None."""
        visits = [v for v in self.visits(problem_id) if stage is None or v.stage <= stage]
        return mean_reward(v for v in visits if v.stage == visits[-1].stage)

    def state_dict(self) -> dict:
        """JSON-able, for checkpoints."""
        rows = [v for visits in self.by_problem.values() for v in visits.values()]
        return {"visits": [[v.problem_id, v.stage, v.step, list(v.rewards)] for v in rows]}

    def load_state_dict(self, state: dict) -> None:
        self.by_problem, self.log, self.written = {}, [], {}
        for problem_id, stage, step, rewards in state["visits"]:
            self.append(Visit(problem_id, stage, step, tuple(rewards)))

    def save(self, path: str | Path) -> None:
        """Appends to a JSONL file the visits that it does not hold yet, one per line."""
        path = Path(path).resolve()
        new = self.log[self.written.get(path, 0) :]
        if path not in self.written and path.exists():
            held = set(History.load(path).log)
            new = [visit for visit in new if visit not in held]
            with open(path, "rb+") as file:  # what was cut off must not run into what follows
                file.truncate(file.read().rfind(b"\n") + 1)
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(visit)) + "\n" for visit in new)
        self.written[path] = len(self.log)

    @classmethod
    def load(cls, path: str | Path) -> "History":
        """What save wrote. A last line that was cut off is left out and counted in lines_dropped. Raises DataError."""
        history = cls()
        if not Path(path).is_file():
            raise DataError(f"{path} does not exist, so there are no pass rates to read; estimate them first.")
        *lines, rest = Path(path).read_text(encoding="utf-8").split("\n")
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                history.append(Visit(row["problem_id"], row["stage"], row["step"], tuple(row["rewards"])))
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path}, row {number} is no visit ({error!r}); mend or remove that line.") from error
        if rest:
            history.lines_dropped = 1
            print(f"{path}: left out a half-written last line (row {len(lines) + 1})", file=sys.stderr)
        return history


def mean_reward(visits: Iterable[Visit]) -> float | None:
    """Mean over all rollouts of these visits, or None without any."""
    rewards = [reward for visit in visits for reward in visit.rewards]
    return sum(rewards) / len(rewards) if rewards else None


# ---- the shape of the data -----------------------------------------------------------------------


def histogram(rates: Iterable[float], group_size: int = 8) -> list[int]:
    """How many problems are solved 0, 1, ... group_size times in group_size (to the nearest)."""
    counts = [0] * (group_size + 1)
    for rate in rates:
        counts[math.floor(rate * group_size + 0.5)] += 1
    return counts


def verdict(counts: list[int]) -> str:
    """The histogram's shape in a word: training wants "mirrored J" (RECIPE section 1).

    "too hard": more than half of the problems are never solved; "J" / "mirrored J": at least half lie
    on the easy / hard side of the middle; "U": two thirds lie at the two ends; else "level".
    """
    total, half = sum(counts), len(counts) // 2
    if total == 0:
        return "empty"
    if counts[0] > total / 2:
        return "too hard"
    if sum(counts[-half:]) >= total / 2:
        return "J"
    if counts[0] + counts[-1] >= total * 2 / 3:
        return "U"
    return "mirrored J" if sum(counts[:half]) >= total / 2 else "level"


def zero_variance_share(rates: Iterable[float], group_size: int = 8) -> float:
    """Expected share of groups whose rewards are all equal and teach nothing: the mean of p^G + (1 - p)^G."""
    p = np.asarray(list(rates), dtype=float)
    return float(np.mean(p**group_size + (1 - p) ** group_size)) if p.size else 0.0


def draw_histogram(before: list[int], after: list[int], width: int = 28) -> str:
    """Both histograms side by side, as text for the console."""
    group_size, most = len(before) - 1, max(*before, *after, 1)
    lines = [f"solved  {f'before ({verdict(before)})':<{width + 9}}after ({verdict(after)})"]
    for solved, counts in enumerate(zip(before, after, strict=True)):
        bars = [f"{count:>7} {'#' * math.ceil(count * width / most)}" for count in counts]
        lines.append(f"{f'{solved}/{group_size}':>6} {bars[0]:<{width + 9}}{bars[1]}".rstrip())
    return "\n".join(lines + [f"{'all':>6} {sum(before):>7} {'':<{width + 1}}{sum(after):>7}"])


# ---- the filter before training, and the drop after each stage -----------------------------------


@dataclass(frozen=True)
class Filtered:
    """What a filter kept and dropped, with the histograms before and after."""

    kept: list[Problem]
    dropped: list[Problem]
    before: list[int]  # histograms of pass rates; problems without any estimate are in neither
    after: list[int]


def filter_mirrored_j(
    problems: list[Problem],
    history: History,
    drop_at: float = 1.0,
    keep_above: float = 0.0,
    max_unsolved_share: float | None = None,
    seed: int = 0,
    group_size: int = 8,
) -> Filtered:
    """Drops the problems that the model always solves and keeps the rest, 0/8 too (RECIPE section 1).

    Kept: keep_above <= pass rate < drop_at, by the latest estimate. max_unsolved_share: at most this
    share of what is kept may be unsolved; a random part, set by the seed, of the unsolved is kept.
    Raises DataError if a problem has no estimate.
    """
    rates = {p.id: history.estimate(p.id) for p in problems}
    missing = [problem_id for problem_id, rate in rates.items() if rate is None]
    if missing:
        raise DataError(
            f"{len(missing)} problems have no pass rate (first: {missing[0]}); estimate them before filtering."
        )
    keep = {problem_id for problem_id, rate in rates.items() if keep_above <= rate < drop_at}
    if max_unsolved_share is not None and max_unsolved_share < 1:
        unsolved = sorted(problem_id for problem_id in keep if rates[problem_id] == 0)
        solved = len(keep) - len(unsolved)
        room = math.floor(solved * max_unsolved_share / (1 - max_unsolved_share) + 1e-9)
        keep -= {unsolved[i] for i in np.random.default_rng(seed).permutation(len(unsolved))[room:]}
    return split_by(problems, keep, rates, group_size)


def drop_easy(
    problems: list[Problem],
    history: History,
    stage: int,
    threshold: float = 0.9,
    window: str = "stage",
    group_size: int = 8,
) -> Filtered:
    """Drops the problems whose accuracy is above the threshold, at the end of a stage (RECIPE section 1).

    window: "stage" looks at the visits within the stage just ended (a problem not visited in it keeps
    its earlier estimate), "all" at every visit ever. A problem never visited is kept.
    """
    if window not in ("stage", "all"):
        raise DataError(f'the window of the drop is {window!r}; it must be "stage" or "all".')
    rates = {p.id: history.estimate(p.id, stage) if window == "stage" else history.pass_rate(p.id) for p in problems}
    keep = {problem_id for problem_id, rate in rates.items() if rate is None or rate <= threshold}
    return split_by(problems, keep, rates, group_size)


def split_by(problems: list[Problem], keep: set[str], rates: dict[str, float | None], group_size: int) -> Filtered:
    """Divide problems by id, with both histograms of their pass rates."""
    kept, dropped = [p for p in problems if p.id in keep], [p for p in problems if p.id not in keep]
    before, after = ([rates[p.id] for p in some if rates[p.id] is not None] for some in (problems, kept))
    return Filtered(kept, dropped, histogram(before, group_size), histogram(after, group_size))


def require_batch(filtered: Filtered, batch_size: int) -> None:
    """Raises DataError, with the histograms, if what is left cannot fill a batch."""
    if len(filtered.kept) < batch_size:
        total = len(filtered.kept) + len(filtered.dropped)
        raise DataError(
            f"{len(filtered.kept)} of {total} problems are left, fewer than a batch of {batch_size}; lower the "
            f"batch size, drop fewer or add harder problems.\n{draw_histogram(filtered.before, filtered.after)}"
        )


# ---- the order of training -----------------------------------------------------------------------


class DataOrder:
    """Endless epochs over the problems, each a permutation drawn from (seed, stage, epoch).

    The position (problems handed out so far) is the only state. Any batch_size problems in a row are all
    different, across epochs too; so the seams between epochs depend on the batch size.
    """

    def __init__(self, problems: list[Problem], batch_size: int, seed: int, stage: int):
        self.problems = sorted(problems, key=lambda p: p.id)
        self.batch_size, self.seed, self.stage = batch_size, seed, stage
        self.epochs: list[list[int]] = []
        twins = [a.id for a, b in pairwise(self.problems) if a.id == b.id]
        if twins:
            raise DataError(f"several problems have the id {twins[0]}; give each problem its own.")
        if len(problems) < batch_size:
            short = f"{len(problems)} problems cannot fill a batch of {batch_size}"
            raise DataError(f"{short}; lower the batch size or add problems.")

    def batch(self, position: int) -> list[Problem]:
        places = range(position, position + self.batch_size)
        size = len(self.problems)
        return [self.problems[self.order(place // size)[place % size]] for place in places]

    def order(self, epoch: int) -> list[int]:
        while len(self.epochs) <= epoch:
            key = [self.seed, self.stage, len(self.epochs)]
            drawn = np.random.Generator(np.random.PCG64(key)).permutation(len(self.problems)).tolist()
            last = self.epochs[-1][1 - self.batch_size :] if self.epochs and self.batch_size > 1 else []
            # what ended the last epoch waits until it is a batch ago
            for slot in range(len(last)):
                barred = set(last[slot:])
                pick = next(i for i in range(slot, len(drawn)) if drawn[i] not in barred)
                drawn.insert(slot, drawn.pop(pick))
            self.epochs.append(drawn)
        return self.epochs[epoch]
