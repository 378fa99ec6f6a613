"""Responses on disk: each is written with its verdict as it finishes, and none is sampled twice.

While the responses to a set are sampled, every process appends to its own part, FOLDER/responses/NAME.RANK.part; at the
end the main process merges the parts into NAME.jsonl, in order. An interrupted command resumes from the parts, with any
number of processes, and ends with the same file: the draw of a sample depends only on its index.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from engine.distributed import Interrupted
from engine.files import read_jsonl, write_atomically, writing
from engine.grader import check_grader
from engine.rollout_worker import Attempt, RolloutWorker, SamplingStats
from eval import Response, response_of
from lab.benchmarks import file_name
from lab.data_files import DataError
from lab.problems import Problem, read_problems
from rollout import Prompt, Sampling


def read_responses(path: Path) -> list[Response]:
    """Read a file of responses, ignoring a half-written last line. Raises DataError naming any other broken line."""
    responses = []
    try:
        for _, _, row in read_jsonl(path):
            r = Response(**row)
            texts = [r.data, r.problem_id, r.finish_reason, r.verdict, r.text, "" if r.answer is None else r.answer]
            counts = [r.sample, r.tokens, *(r.cuts.values() if isinstance(r.cuts, dict) else [])]
            if {*map(type, texts)} != {str} or {*map(type, counts)} != {int} or not isinstance(r.cuts, dict | None):
                raise TypeError("a value has the wrong type")
            responses.append(r)
    except TypeError as error:
        what = f"{path}, line {len(responses) + 1} is not a response of an evaluation ({str(error)[:200]!r})"
        raise DataError(f"{what}; remove the line or the file") from None
    except ValueError as error:
        raise DataError(f"{error}; remove the line or the file") from None
    return responses


def write_responses(path: Path, responses: Iterable[Response]) -> None:
    """Write a file of responses atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, ((json.dumps(asdict(response)) + "\n").encode() for response in responses))


def response_file(folder: Path, key: str) -> Path:
    """Return the path of the responses to a set, or to a set under one setting."""
    return folder / "responses" / f"{file_name(key)}.jsonl"


def parts_of(path: Path) -> list[Path]:
    """Return the parts, NAME.RANK.part, that processes have written of a file NAME.jsonl."""
    return sorted(part for part in path.parent.glob("*.part") if part.with_suffix("").stem == path.stem)


def read_groups(folder: Path, name: str, n: int, rewarded: bool = False) -> tuple[list[Problem], list[list[Response]]]:
    """Read the problems of a finished set and the first n responses to each. Raises DataError if any is missing."""
    settings = read_settings(folder)
    if settings.get("curve") or settings.get("match"):
        what = "--regrade takes an evaluation made without --curve and --match, as do --compare and --match"
        raise DataError(f"{folder} is a curve; {what}")
    path = response_file(folder, name)
    problems = read_problems(folder / "problems" / f"{file_name(name)}.jsonl", "keep", rewarded)
    groups = group_by_problem(problems, read_responses(path) if path.exists() else [], n)
    if parts_of(path) or any(len(group) != n for group in groups):
        raise DataError(f"{folder} does not have all {n} responses to {name} yet; run its command again until it ends")
    return problems, groups


def group_by_problem(problems: Sequence[Problem], responses: Iterable[Response], n: int) -> list[list[Response]]:
    """Return the first n responses to each of these problems, in the order of the problems."""
    groups: dict[str, list[Response]] = {problem.id: [] for problem in problems}
    for response in responses:
        if response.problem_id in groups and response.sample < n:
            groups[response.problem_id].append(response)
    return list(groups.values())


def read_settings(folder: Path) -> dict:
    """Read settings.json of an evaluation's folder. Raises DataError if it is missing or broken."""
    try:
        settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        if not isinstance(settings, dict) or not {"data", "n", "curve", "match", "thinking"} <= settings.keys():
            raise ValueError("keys are missing")
    except FileNotFoundError:
        raise DataError(f"{folder} is not an evaluation: it has no settings.json; give a folder of eval.py") from None
    except ValueError as error:
        raise DataError(f"{folder / 'settings.json'} is broken ({error}); evaluate again into another folder") from None
    return settings


@dataclass
class Recorder:
    """Samples responses and stores each as it finishes; stored ones are not sampled again."""

    worker: RolloutWorker
    folder: Path  # the same for all processes
    work: SamplingStats = field(default_factory=SamplingStats)  # of all processes, in the last call of `respond`
    asked: set[str] = field(default_factory=set)  # keys of this session: a curve adds to its own responses

    def respond(
        self,
        name: str,
        problems: Sequence[Problem],
        n: int,
        sampling: Sampling,
        budgets: Sequence[int] = (),
        key: str = "",
    ) -> list[list[Response]]:
        """Return n responses to each problem, in order, on every process; store them under `key` (default: the name).

        With token budgets, a response records how many characters of its text are within each. Raises Interrupted.
        """
        key = key or name
        processes, path = self.worker.processes, response_file(self.folder, key)

        def keep(attempt: Attempt) -> None:
            row = asdict(response_of(name, attempt, self._cuts(attempt, budgets) if budgets else None))
            part = path.with_suffix(f".{processes.rank}.part")
            # closed each time, so that other machines see the line
            with writing(part), part.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

        have = None
        if processes.is_main:
            path.parent.mkdir(parents=True, exist_ok=True)
            for part in parts_of(path):  # a killed process may have left half a line
                with part.open("rb+") as file:
                    file.truncate(file.read().rfind(b"\n") + 1)
            have = {(r.problem_id, r.sample) for r in _read_all(path)}
        have = processes.broadcast(have)  # every process must share out the same prompts, and write only after the read
        prompts = [prompt for problem in problems for prompt in self._missing(problem, n, have)]
        self.work = SamplingStats()
        if prompts:
            if have and key not in self.asked:
                processes.say(f"{key}: {len(have):,} responses are already stored")
            _, self.work, stopped = self.worker.sample(problems, prompts, sampling, keep, label=key)
            if stopped:
                raise Interrupted
        self.asked.add(key)
        place = {problem.id: i for i, problem in enumerate(problems)}
        by_sample = {(place.get(r.problem_id, len(place)), r.problem_id, r.sample): r for r in _read_all(path)}
        responses = [by_sample[sample] for sample in sorted(by_sample)]
        processes.all_gather(None)  # all processes have read
        if processes.is_main and (parts := parts_of(path)):
            write_responses(path, responses)
            for part in parts:
                part.unlink()
        processes.broadcast(None)  # the old parts are gone before anyone writes a new one
        groups = group_by_problem(problems, responses, n)
        check_grader(
            Counter(r.verdict for group in groups for r in group),
            self.worker.most_failed_share,
            self.worker.grader.failures,
        )
        return groups

    def _missing(self, problem: Problem, n: int, have: set[tuple[str, int]]) -> list[Prompt]:
        """Return the problem's prompt once for each run of consecutive samples that are not stored."""
        prompts: list[Prompt] = []
        for sample in (i for i in range(n) if (problem.id, i) not in have):
            if prompts and sample == prompts[-1].first + prompts[-1].n:
                prompts[-1] = replace(prompts[-1], n=prompts[-1].n + 1)
            else:
                prompts.append(replace(self.worker.prompt(problem, 1), first=sample))
        return prompts

    def _cuts(self, attempt: Attempt, budgets: Sequence[int]) -> dict[str, int]:
        """Return the number of characters within each token budget that the response exceeds."""
        tokens, cuts = attempt.rollout.tokens, {}
        for budget in budgets:
            if budget < len(tokens):
                head = self.worker.chat.decode(tokens[:budget])
                cuts[str(budget)] = len(head.rstrip("\ufffd"))  # which a character split between tokens decodes to
        return cuts


def _read_all(path: Path) -> list[Response]:
    """Read the finished file and the parts of all processes."""
    return [r for file in [path, *parts_of(path)] if file.exists() for r in read_responses(file)]
