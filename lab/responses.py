"""Responses on disk: each is written with its verdict as it finishes, and none is sampled twice.

A set's responses lie in FOLDER/responses/NAME.jsonl. While they are being made every process appends to a part of its
own, NAME.RANK.part; when all are there the main process orders them. What was interrupted goes on from the parts,
with however many processes, and ends with the same file: a sample depends on its own number alone.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from engine.attempts import Attempt, AttemptStats, Respondent, check_grader, deal
from engine.device import Interrupted
from engine.files import write_atomically
from lab.benchmarks import file_name
from lab.problems import DataError, Problem, read_problems
from lab.scores import Response
from rollout import Prompt, Sampling


def response_of(name: str, attempt: Attempt, cuts: dict[str, int] | None = None) -> Response:
    """What is kept of an attempt: without its tokens and log-probs."""
    rollout, grade = attempt.rollout, attempt.grade
    return Response(
        data=name,
        problem_id=rollout.problem_id,
        sample=rollout.index,
        tokens=len(rollout.tokens),
        finish_reason=rollout.finish_reason,
        verdict=grade.verdict,
        answer=grade.answer,
        text=attempt.text,
        cuts=cuts,
    )


def respond(
    respondent: Respondent, name: str, problems: Sequence[Problem], n: int, sampling: Sampling, label: str | None = None
) -> list[list[Response]]:
    """n responses to every problem, in order, on every process; nothing is written."""
    attempts, _ = respondent.attempt(problems, n, sampling, label)
    return [[response_of(name, attempt) for attempt in group] for group in attempts]


def read_responses(path: Path) -> list[Response]:
    """The responses of a file; a last line that was half-written when its process was killed is left out.

    Raises DataError, with the line, where the file holds anything else.
    """
    responses = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                response = Response(**json.loads(line))
                if wrong := [f.name for f in fields(Response) if not _fits(getattr(response, f.name), f.name)]:
                    raise ValueError(f"{wrong[0]} is of the wrong type")
                responses.append(response)
            except (ValueError, TypeError, RecursionError) as error:
                reason = str(error).strip()[:200]
                raise DataError(
                    f"{path}, line {number} is no response of an evaluation ({reason!r}); remove the line or the file"
                ) from None
    return responses


def _fits(value: object, name: str) -> bool:
    """Whether this is what a Response holds under that name."""
    if name in ("sample", "tokens"):
        return type(value) is int
    if name == "cuts":
        return value is None or (isinstance(value, dict) and all(type(count) is int for count in value.values()))
    return isinstance(value, str) or (name == "answer" and value is None)


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
    groups: list[list[Response]] = [[] for _ in problems]
    place = {problem.id: i for i, problem in enumerate(problems)}
    for response in read_responses(path) if path.exists() else []:
        if response.problem_id in place and response.sample < n:
            groups[place[response.problem_id]].append(response)
    if parts_of(path) or any(len(group) != n for group in groups):
        raise DataError(f"{folder} does not hold all {n} responses to {name} yet: run its command again to its end")
    return problems, groups


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
    """Asks a model and keeps every response on disk as it comes; what is there already is not sampled again."""

    respondent: Respondent
    folder: Path  # the same for all processes
    work: AttemptStats  # of this process, over all calls
    asked: set[str] = field(default_factory=set)  # keys that this session has worked on

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
        device, whole = self.respondent.device, response_file(self.folder, key)
        if device.is_main:
            whole.parent.mkdir(parents=True, exist_ok=True)
        # read by one, for all must deal out the same; the others write into a folder that is there, and only after that
        have = device.share({(r.problem_id, r.sample) for r in self._read(whole)} if device.is_main else None)
        missing = [(p, [i for i in range(n) if (p.id, i) not in have]) for p in problems]
        left = sum(len(samples) for _, samples in missing)
        if have and left and key not in self.asked:  # a curve asks for more and more of its own
            device.say(f"{key}: {len(have):,} responses are there already")
        self.asked.add(key)
        if left:
            prompts = [prompt for problem, samples in missing for prompt in self._prompts(problem, samples)]
            mine = deal(prompts, [None] * len(prompts), sampling.max_new_tokens, device.ranks)[device.rank]
            with self._part(whole).open("a", encoding="utf-8") as file:
                for attempt in self.respondent.stream(problems, mine, sampling, self.work, label=key):
                    cuts = self._cuts(attempt, budgets) if budgets else None
                    file.write(json.dumps(asdict(response_of(name, attempt, cuts))) + "\n")
                    file.flush()
        if any(device.gather(self.respondent.asked_to_stop())):
            raise Interrupted
        place = {problem.id: i for i, problem in enumerate(problems)}
        groups: list[list[Response]] = [[] for _ in problems]
        everything = {(r.problem_id, r.sample): r for r in self._read(whole)}
        for response in sorted(everything.values(), key=lambda r: r.sample):
            if response.problem_id in place and response.sample < n:
                groups[place[response.problem_id]].append(response)
        device.share(None)  # everybody has read
        if device.is_main and parts_of(whole):
            order = sorted(
                everything.values(), key=lambda r: (place.get(r.problem_id, len(place)), r.problem_id, r.sample)
            )
            write_responses(whole, order)
            for part in parts_of(whole):
                part.unlink()
        device.share(None)  # nobody writes a part before the old ones are gone
        check_grader(Counter(r.verdict for group in groups for r in group), self.respondent.most_failed_share)
        return groups

    def _prompts(self, problem: Problem, samples: Sequence[int]) -> list[Prompt]:
        """The problem's prompt once for each run of consecutive samples."""
        whole, prompts = self.respondent.prompt(problem, 0), []
        for sample in samples:
            if prompts and sample == prompts[-1].first + prompts[-1].n:
                prompts[-1] = replace(prompts[-1], n=prompts[-1].n + 1)
            else:
                prompts.append(replace(whole, n=1, first=sample))
        return prompts

    def _cuts(self, attempt: Attempt, budgets: Sequence[int]) -> dict[str, int]:
        """How many characters of the text the first tokens make, for every budget that the response exceeds."""
        tokens = attempt.rollout.tokens
        heads = {b: self.respondent.tokenizer.decode(tokens[:b], skip_special_tokens=True) for b in budgets}
        # a character that is cut in two decodes to a replacement character
        return {str(b): len(head.rstrip("\ufffd")) for b, head in heads.items() if b < len(tokens)}

    def _part(self, whole: Path) -> Path:
        """This process's own file, which ends in a whole line: what a killed process wrote last may not."""
        part = whole.with_suffix(f".{self.respondent.device.rank}.part")
        if part.exists():
            text = part.read_bytes()
            if not text.endswith(b"\n"):
                part.write_bytes(text[: text.rfind(b"\n") + 1])
        return part

    def _read(self, whole: Path) -> list[Response]:
        """What all processes have written so far."""
        files = ([whole] if whole.exists() else []) + parts_of(whole)
        return [response for file in files for response in read_responses(file)]
