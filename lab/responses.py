"""Responses on disk: each is written with its verdict as it finishes, and none is sampled twice.

A set's responses are in FOLDER/responses/NAME.jsonl. While they are sampled every process appends to its own part,
NAME.RANK.part; when all are there the main process writes them in order. An interrupted command goes on from the parts,
with any number of processes, and ends with the same file: a sample depends only on its own number.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from engine.distributed import Interrupted
from engine.files import read_jsonl, write_atomically
from engine.grader import check_grader
from engine.rollout_worker import Attempt, RolloutWorker, SamplingStats
from eval import Response, response_of
from lab.benchmarks import file_name
from lab.problems import DataError, Problem, read_problems
from rollout import Prompt, Sampling


def read_responses(path: Path) -> list[Response]:
    """The responses of a file, without a half-written last line. Raises DataError that names any other broken line."""
    responses = []
    try:
        for _, _, row in read_jsonl(path):
            responses.append(_response(row))
    except TypeError as error:
        what = f"{path}, line {len(responses) + 1} is no response of an evaluation ({str(error)[:200]!r})"
        raise DataError(f"{what}; remove the line or the file") from None
    except ValueError as error:
        raise DataError(f"{error}; remove the line or the file") from None
    return responses


def _response(row: dict) -> Response:
    """A line of a file of responses; TypeError where it is none."""
    r = Response(**row)
    texts = [r.data, r.problem_id, r.finish_reason, r.verdict, r.text, "" if r.answer is None else r.answer]
    counts = [r.sample, r.tokens, *(r.cuts.values() if isinstance(r.cuts, dict) else [])]
    if {*map(type, texts)} != {str} or {*map(type, counts)} != {int} or not isinstance(r.cuts, dict | None):
        raise TypeError("a value is of the wrong type")
    return r


def response_file(folder: Path, key: str) -> Path:
    """Where the responses of a set (or of a set in a setting) lie."""
    return folder / "responses" / f"{file_name(key)}.jsonl"


def parts_of(whole: Path) -> list[Path]:
    """What every process has written of a file that is not whole yet: exactly NAME.RANK.part."""
    name = re.compile(re.escape(whole.stem) + r"\.\d+\.part")
    return sorted(path for path in whole.parent.glob("*.part") if name.fullmatch(path.name))


def read_groups(folder: Path, name: str, n: int) -> tuple[list[Problem], list[list[Response]]]:
    """A finished set of an evaluation's folder: its problems, and the first n responses to each.

    Raises DataError where there are fewer, or more are under way.
    """
    path = response_file(folder, name)
    problems = read_problems(folder / "problems" / f"{file_name(name)}.jsonl", "keep")
    groups = grouped(problems, read_responses(path) if path.exists() else [], n)
    if parts_of(path) or any(len(group) != n for group in groups):
        raise DataError(f"{folder} does not hold all {n} responses to {name} yet: run its command again to its end")
    return problems, groups


def grouped(problems: Sequence[Problem], responses: Iterable[Response], n: int) -> list[list[Response]]:
    """The first n responses to each problem, in the order given; those to other problems are left out."""
    groups: dict[str, list[Response]] = {problem.id: [] for problem in problems}
    for response in responses:
        if response.problem_id in groups and response.sample < n:
            groups[response.problem_id].append(response)
    return list(groups.values())


def read_settings(folder: Path) -> dict:
    """settings.json of an evaluation's folder; DataError where it is not one."""
    try:
        settings = json.loads((folder / "settings.json").read_text())
        if not isinstance(settings, dict) or not {"data", "n", "curve", "match", "thinking"} <= settings.keys():
            raise ValueError("keys are missing")
    except FileNotFoundError:
        raise DataError(f"{folder} is no evaluation: it has no settings.json; give a folder of eval.py") from None
    except ValueError as error:
        raise DataError(f"{folder / 'settings.json'} is broken ({error}); evaluate again into another folder") from None
    return settings


def write_settings(folder: Path, settings: dict) -> None:
    """Write settings.json, the first file of a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "settings.json", [json.dumps(settings, indent=2).encode()])


def write_responses(path: Path, responses: Iterable[Response]) -> None:
    """A file of responses, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, ((json.dumps(asdict(response)) + "\n").encode() for response in responses))


@dataclass
class Recorder:
    """Samples responses and keeps each on disk as it finishes; what is there already is not sampled again."""

    worker: RolloutWorker
    folder: Path  # the same for all processes
    work: SamplingStats  # tokens and seconds of all processes, over all calls

    def respond(
        self,
        name: str,
        problems: Sequence[Problem],
        n: int,
        sampling: Sampling,
        budgets: Sequence[int] = (),
        key: str = "",
    ) -> list[list[Response]]:
        """n responses to every problem, in order, on every process. They are kept under `key` (default: the name).

        With budgets, a response remembers how many characters its first so many tokens make. Raises Interrupted.
        """
        key = key or name
        processes, whole = self.worker.processes, response_file(self.folder, key)
        part = whole.with_suffix(f".{processes.rank}.part")

        def keep(attempt: Attempt) -> None:
            row = asdict(response_of(name, attempt, self._cuts(attempt, budgets) if budgets else None))
            with part.open("a", encoding="utf-8") as file:  # closed at once: other machines are to see it
                file.write(json.dumps(row) + "\n")

        have = None
        if processes.is_main:
            whole.parent.mkdir(parents=True, exist_ok=True)
            for old in parts_of(whole):  # of killed processes, which may have left half a line
                with old.open("rb+") as file:
                    file.truncate(file.read().rfind(b"\n") + 1)
            have = {(r.problem_id, r.sample) for r in self._read(whole)}
        have = processes.broadcast(have)  # read by one: all must deal out the same, and nobody may write before
        prompts = [prompt for problem in problems for prompt in self._missing(problem, n, have)]
        if prompts:
            if have:
                processes.say(f"{key}: {len(have):,} responses are there already")
            _, work, stopped = self.worker.sample(problems, prompts, sampling, keep, label=key)
            self.work.tokens += work.tokens
            self.work.sample_seconds += work.sample_seconds
            if stopped:
                raise Interrupted
        place = {problem.id: i for i, problem in enumerate(problems)}
        by_sample = {(place.get(r.problem_id, len(place)), r.problem_id, r.sample): r for r in self._read(whole)}
        responses = [response for _, response in sorted(by_sample.items(), key=lambda item: item[0])]
        processes.broadcast(None)  # everybody has read
        if processes.is_main and parts_of(whole):
            write_responses(whole, responses)
            for old in parts_of(whole):
                old.unlink()
        processes.broadcast(None)  # nobody writes a part before the old ones are gone
        groups = grouped(problems, responses, n)
        check_grader(Counter(r.verdict for group in groups for r in group), self.worker.most_failed_share)
        return groups

    def _missing(self, problem: Problem, n: int, have: set[tuple[str, int]]) -> list[Prompt]:
        """The problem's prompt once for each run of consecutive samples that are not there yet."""
        prompts: list[Prompt] = []
        for sample in (i for i in range(n) if (problem.id, i) not in have):
            if prompts and sample == prompts[-1].first + prompts[-1].n:
                prompts[-1] = replace(prompts[-1], n=prompts[-1].n + 1)
            else:
                prompts.append(replace(self.worker.prompt(problem, 1), first=sample))
        return prompts

    def _cuts(self, attempt: Attempt, budgets: Sequence[int]) -> dict[str, int]:
        """How many characters of the text the first tokens make, for every budget that the response exceeds."""
        tokens = attempt.rollout.tokens
        heads = {b: self.worker.tokenizer.decode(tokens[:b], skip_special_tokens=True) for b in budgets}
        # a character that is cut in two decodes to a replacement character
        return {str(b): len(head.rstrip("\ufffd")) for b, head in heads.items() if b < len(tokens)}

    def _read(self, whole: Path) -> list[Response]:
        """What all processes have written so far."""
        files = ([whole] if whole.exists() else []) + parts_of(whole)
        return [response for file in files for response in read_responses(file)]
