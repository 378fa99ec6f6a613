"""Problems in, graded attempts out: training, filtering and evaluation all sample here.

Each process answers its share of the prompts and grades every response while the next are being decoded.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch

from engine.distributed import Interrupted, Processes, StopRequest, note_place
from engine.errors import first_names
from engine.grader import Grader, check_grader
from engine.huggingface import named
from engine.sharding import gathered
from engine.terminal import note
from engine.tokenizer import Chat, check_prompts
from lab.console import wasted_responses
from lab.data_files import DataError
from lab.problems import Problem, asks_otherwise, prompt_text
from model import Transformer
from reward import Grade, last_boxed
from rollout import CacheLimits, Prompt, Rollout, SamplerStats, Sampling, generate

SECONDS_BETWEEN_LINES = 10.0
FIRST_RESPONSES = 64  # of a process: a wrong `thinking` is said here, not after hours of sampling


@dataclass
class Attempt:
    """One response to one problem."""

    rollout: Rollout
    text: str  # what the grader read
    grade: Grade


@dataclass
class SamplingStats:
    """The cost of sampling, over all processes; seconds are the slowest process's."""

    tokens: int = 0
    sample_seconds: float = 0.0
    grade_seconds: float = 0.0  # that sampling did not overlap: the exact path, and the wait for the last verdicts
    preemptions: int = 0
    memory_retries: int = 0  # times that sampling ran out of memory and continued with fewer rows
    idle_shares: tuple[float, ...] = (0.0,)  # for each process, the share of the slowest one's sampling time it waited

    @property
    def idle_share(self) -> float:
        """The mean of idle_shares."""
        return sum(self.idle_shares) / len(self.idle_shares)


@dataclass
class RolloutWorker:
    """What a process needs to sample and grade: the model, its chats, the cache limits and a grader."""

    model: Transformer
    chat: Chat
    stop_tokens: tuple[int, ...]
    limits: CacheLimits
    grader: Grader
    processes: Processes
    instruction: str
    stop: StopRequest | None = None  # abandons sampling
    most_failed_share: float = 0.02  # of answers on which the grader itself may fail before it stops the run
    warned: set[tuple[str, str]] = field(default_factory=set)  # (label, kind) of warnings said

    def message(self, problem: Problem) -> dict:
        """Return a problem as a user's message."""
        return {"role": "user", "content": prompt_text(problem, self.instruction)}

    def prompt(self, problem: Problem, n: int) -> Prompt:
        """Return a problem's prompt."""
        with named(f"problem {problem.id}"):
            return Prompt(problem.id, self.chat.prompt([self.message(problem)]), n)

    def prompts(
        self, problems: Sequence[Problem], asked: dict[str, tuple[str, Sequence[int]]], most_tokens: int | None = None
    ) -> list[Prompt]:
        """Return the prompts of all problems, and add them to `asked`, which `check` takes.

        Raises DataError when some have more than `most_tokens`.
        """
        prompts = [self.prompt(problem, 1) for problem in problems]
        others = [problem.id for problem in problems if asks_otherwise(problem, self.instruction)]
        if others and ("", "instruction") not in self.warned:
            self.warned.add(("", "instruction"))
            note(
                f"note: {len(others):,} of {len(problems):,} problems ({first_names(others, 3)}) ask for another form "
                "of answer than the box, which alone is graded: remove that from their text, or switch ours off "
                'with instruction = "" (--instruction "")'
            )
        asked |= {problem.id: (problem.text, own.tokens) for problem, own in zip(problems, prompts, strict=True)}
        too_long = [prompt for prompt in prompts if most_tokens is not None and len(prompt.tokens) > most_tokens]
        if too_long:
            names = first_names([f"{prompt.problem_id} ({len(prompt.tokens)} tokens)" for prompt in too_long])
            raise DataError(
                f"{len(too_long):,} of {len(prompts):,} prompts have more than the {most_tokens} tokens that the stage "
                f'allows: raise max_prompt_tokens, set on_bad_row = "skip", or remove {names}'
            )
        return prompts

    def too_long(self, problems: Sequence[Problem], most_tokens: int, source: str) -> set[str]:
        """Return the ids of the problems whose prompts have more than `most_tokens`, and say that they are left out."""
        long = [problem.id for problem in problems if len(self.prompt(problem, 1).tokens) > most_tokens]
        if long:
            what = f"{len(long):,} of {len(problems):,} problems, whose prompts have more than {most_tokens} tokens"
            self.processes.say(f"{source}: left out {what} ({first_names(long)})")
        return set(long)

    def check(self, asked: dict[str, tuple[str, Sequence[int]]]) -> None:
        """Say what `check_prompts` finds in prompts; one process looks, for all have the same."""
        for found in check_prompts(self.chat.tokenizer, asked) if self.processes.is_main else ():
            note(f"note: {found}")

    def asked_to_stop(self) -> bool:
        """Whether this process was asked to stop."""
        return self.stop is not None and self.stop.asked

    def stream(
        self,
        problems: Sequence[Problem],
        prompts: Sequence[Prompt],
        sampling: Sampling,
        stats: SamplingStats,
        label: str | None = None,
    ) -> Iterator[Attempt]:
        """Yield this process's attempts, each once it is sampled and graded; fill in empty `stats` at the end.

        A label shows progress. After a request to stop, no more are sampled.
        """
        asked = {problem.id: problem for problem in problems}
        total, done, finished_tokens = sum(prompt.n for prompt in prompts), 0, 0
        sampler, ungraded = SamplerStats(), deque()
        started = last_line = time.perf_counter()

        def next_graded() -> Attempt:
            rollout, text, ticket = ungraded.popleft()
            return Attempt(rollout, text, self.grader.collect([ticket])[0])

        note_place("gathering the weights for sampling")
        with gathered(self.model):
            note_place("sampling", collective=False)
            for rollout in generate(self.model, prompts, sampling, self.limits, sampler, self.asked_to_stop):
                text = self.chat.decode(rollout.tokens)
                submitted = time.perf_counter()
                problem = asked[rollout.problem_id]
                ungraded.append((rollout, text, self.grader.submit(text, problem.answers, problem.row)))
                now, done, finished_tokens = time.perf_counter(), done + 1, finished_tokens + len(rollout.tokens)
                stats.grade_seconds += now - submitted
                while ungraded and self.grader.ready(ungraded[0][2]):
                    yield next_graded()
                if label and now - last_line > SECONDS_BETWEEN_LINES:
                    last_line, speed = now, sampler.decoded_tokens / (now - started)
                    # the first responses to finish are the shortest, and tell little about the others
                    typical = finished_tokens / done if 10 * done > total else sampling.max_new_tokens
                    left = max(0.0, total * typical - sampler.decoded_tokens) / speed
                    eta = timedelta(seconds=round(left))
                    self.processes.say(f"{label}: {done}/{total} responses  {speed:,.0f} tok/s  ETA {eta}")
        sampled = time.perf_counter()
        if self.processes.device.type == "cuda":
            torch.cuda.empty_cache()  # the update uses the KV cache's memory
        while ungraded:
            yield next_graded()
        stats.grade_seconds += time.perf_counter() - sampled
        stats.sample_seconds = sampled - started
        stats.tokens, stats.preemptions = sampler.decoded_tokens, sampler.preemptions
        stats.memory_retries = sampler.memory_retries
        if sampler.memory_retries:
            self.processes.say(
                f"sampling ran out of memory {sampler.memory_retries} times and continued with fewer rows or a smaller "
                f"cache: lower the recipe's sampler.rows, or set a smaller sampler.cache_tokens"
            )

    def sample(
        self,
        problems: Sequence[Problem],
        prompts: Sequence[Prompt],
        sampling: Sampling,
        keep: Callable[[Attempt], Any] = lambda attempt: attempt,
        label: str | None = None,
        expected_tokens: Sequence[float | None] | None = None,
    ) -> tuple[list, SamplingStats, bool]:
        """Answer the prompts on all processes, each its share (see `deal` for the expected tokens).

        Returns the results of `keep`, called on each of this process's attempts once it is graded; the stats of all
        processes; and whether any of them was asked to stop, so that some prompts are unanswered. Raises GraderError
        on every process when the grader fails often.
        """
        expected = [None] * len(prompts) if expected_tokens is None else expected_tokens
        share = deal(prompts, expected, sampling.max_new_tokens, self.processes.world_size)[self.processes.rank]
        kept, stats, verdicts, seen = [], SamplingStats(), Counter(), Counter()
        for attempt in self.stream(problems, share, sampling, stats, label):
            kept.append(keep(attempt))
            verdicts[attempt.grade.verdict] += 1
            seen += self.faults(attempt)
            if seen["all"] == FIRST_RESPONSES:  # the shortest, so that only one cause is certain
                self.warn(Counter(all=seen["all"], unclosed=seen["unclosed"]), sampling, label)
        mine = stats, verdicts, seen, self.asked_to_stop(), self.grader.failures
        everyone = self.processes.all_gather(mine, "the end of sampling")
        all_stats, all_verdicts, all_seen, stopped, all_failures = zip(*everyone, strict=True)
        failures = {verdict: text for own in reversed(all_failures) for verdict, text in own.items()}
        for verdict, text in failures.items():
            if ("", verdict) not in self.warned:
                whose = f"reward function, first response {verdict.removeprefix('reward ')}"
                whose = "grader, first gold that cannot be read" if verdict == "grader failed" else whose
                self.processes.say(f"warning: {whose}: {text}")
            self.warned.add(("", verdict))
        check_grader(sum(all_verdicts, Counter()), self.most_failed_share, failures)
        self.warn(sum(all_seen, Counter()), sampling, label)
        return kept, combine(all_stats), any(stopped)

    def faults(self, attempt: Attempt) -> Counter:
        """Count a response for `wasted_responses`."""
        seen = Counter(all=1, cut=attempt.rollout.finish_reason == "length")
        if attempt.grade.verdict == "no answer":
            # a reward function is only uncalled where the thinking is unclosed
            boxed = self.grader.reward is not None or last_boxed(attempt.text, thinking=False) is not None
            seen.update({"unclosed": boxed, "no box": not boxed, "empty": not attempt.text.strip()})
        return seen

    def warn(self, seen: Counter, sampling: Sampling, label: str | None) -> None:
        """Say why nearly all responses are wasted, each cause once for a label."""
        for kind, sentence in wasted_responses(seen, sampling.max_new_tokens).items():
            said = f"{label}: " * bool(label), kind
            if said not in self.warned:
                self.processes.say(f"warning: {said[0]}{sentence}")
            self.warned.add(said)

    def attempt(
        self,
        problems: Sequence[Problem],
        n: int,
        sampling: Sampling,
        label: str | None = None,
        expected_tokens: Sequence[float | None] | None = None,
    ) -> tuple[list[list[Attempt]], SamplingStats]:
        """Make n attempts at each problem; return them in the problems' order, the same on every process.

        A label shows progress. Expected tokens are per response to each problem (None: unknown). Raises on every
        process: Interrupted when the run was asked to stop, GraderError when the grader fails often.
        """
        prompts = [self.prompt(problem, n) for problem in problems]
        mine, stats, stopped = self.sample(problems, prompts, sampling, label=label, expected_tokens=expected_tokens)
        if stopped:
            raise Interrupted
        groups: dict[str, list[Attempt]] = {problem.id: [] for problem in problems}
        for attempts in self.processes.all_gather(mine, "the exchange of attempts"):
            for attempt in attempts:
                groups[attempt.rollout.problem_id].append(attempt)
        for group in groups.values():
            group.sort(key=lambda attempt: attempt.rollout.index)
        return list(groups.values()), stats


def deal(
    prompts: Sequence[Prompt], expected_tokens: Sequence[float | None], most_tokens: int, ranks: int
) -> list[list[Prompt]]:
    """Divide prompts so that all ranks finish together: the longest first, each to the rank with the least work.

    `expected_tokens` are per response to each prompt, at most `most_tokens`; None, unknown, counts as the mean. The
    responses to one prompt are split only where together they would take their rank past its fair share by more than
    half a response and the prompt, which the split prefills once more. A response does not depend on its rank.
    """
    if ranks == 1:
        return [list(prompts)]
    known = [tokens for tokens in expected_tokens if tokens is not None]
    typical = sum(known) / len(known) if known else most_tokens
    each = [min(typical if tokens is None else tokens, most_tokens) for tokens in expected_tokens]
    work = [len(prompt.tokens) + prompt.n * tokens for prompt, tokens in zip(prompts, each, strict=True)]
    fair = sum(work) / ranks
    shares: list[list[Prompt]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for i in sorted(range(len(prompts)), key=lambda i: -work[i]):
        prompt, prefill, dealt = prompts[i], len(prompts[i].tokens), 0
        while dealt < prompt.n:
            rank, take = loads.index(min(loads)), prompt.n - dealt
            room = fair - loads[rank]
            if prefill + take * each[i] - room > prefill + each[i] / 2:
                take = min(take, max(1, round((room - prefill) / each[i])))
            limits = prompt.limits and prompt.limits[dealt : dealt + take]
            shares[rank].append(replace(prompt, n=take, first=prompt.first + dealt, limits=limits))
            loads[rank] += prefill + take * each[i]
            dealt += take
    return shares


def combine(stats: Sequence[SamplingStats]) -> SamplingStats:
    """Combine the stats of all processes: sums of counts, the longest times, and each process's idle share."""
    longest = max(own.sample_seconds for own in stats)
    return SamplingStats(
        tokens=sum(own.tokens for own in stats),
        sample_seconds=longest,
        grade_seconds=max(own.grade_seconds for own in stats),
        preemptions=sum(own.preemptions for own in stats),
        memory_retries=sum(own.memory_retries for own in stats),
        idle_shares=tuple(1 - own.sample_seconds / longest if longest else 0.0 for own in stats),
    )
