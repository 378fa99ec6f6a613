"""Problems in, graded attempts out: the one way in which training, filtering and evaluation sample.

Each process answers its share of the prompts and grades every response while the next are being decoded.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from engine.distributed import Interrupted, Processes, StopRequest, note_place
from engine.errors import UserError
from engine.grader import Grader
from engine.sharding import gathered
from engine.tokenizer import encode_chat
from lab.problems import DataError, Problem, prompt_text
from model import Transformer
from reward import Grade
from rollout import CacheLimits, Prompt, Rollout, SamplerStats, Sampling, generate

SECONDS_BETWEEN_LINES = 10.0
LEAST_FAILURES = 5  # fewer failures of the grader than this stop nothing, whatever their share


@dataclass
class Attempt:
    """One response to one problem."""

    rollout: Rollout
    text: str  # what the grader read
    grade: Grade


@dataclass
class SamplingStats:
    """What making them took, over all processes; the seconds are the slowest process's."""

    tokens: int = 0
    sample_seconds: float = 0.0
    grade_seconds: float = 0.0  # of this process: the exact path, and the wait after sampling; workers hide behind it
    preemptions: int = 0
    memory_retries: int = 0  # times that sampling ran out of memory and went on with fewer rows
    idle_shares: tuple[float, ...] = (0.0,)  # of the time that the slowest process sampled, for each process

    @property
    def idle_share(self) -> float:
        """Of all processes' time while they sampled, the share in which they waited for the slowest."""
        return sum(self.idle_shares) / len(self.idle_shares)


class GraderError(UserError):
    """The grader fails too often for its verdicts to be believed."""


def check_grader(verdicts: Mapping[str, int], most_failed_share: float) -> None:
    """Raise GraderError when more than a share of these verdicts are the grader's own failures."""
    failed, graded = verdicts.get("grader failed", 0), sum(verdicts.values())
    if failed >= LEAST_FAILURES and failed > most_failed_share * graded:
        raise GraderError(
            f"the grader failed on {failed} of {graded} answers ({failed / graded:.1%}, more than the "
            f"{most_failed_share:.1%} allowed): see that math-verify imports and that its workers have the memory they "
            f"need, or allow a larger share (reward.most_failed_share in a recipe, --most-failed-share of eval.py)"
        )


@dataclass
class RolloutWorker:
    """A model that can be asked: its weights, tokenizer, cache and grader, on all processes together."""

    model: Transformer
    tokenizer: PreTrainedTokenizerBase
    stop_tokens: tuple[int, ...]
    limits: CacheLimits
    grader: Grader
    processes: Processes
    instruction: str
    stop: StopRequest | None = None  # where given, sampling is abandoned when it asks for it
    most_failed_share: float = 0.02  # of answers on which the grader itself may fail before that stops the run

    def prompt(self, problem: Problem, n: int, most_tokens: int | None = None) -> Prompt:
        """A problem's prompt; raises DataError when it is longer than the stage allows."""
        message = {"role": "user", "content": prompt_text(problem, self.instruction)}
        tokens = encode_chat(self.tokenizer, [message])
        if most_tokens is not None and len(tokens) > most_tokens:
            raise DataError(
                f"problem {problem.id}: its prompt has {len(tokens)} tokens, the stage allows {most_tokens}: "
                f"raise max_prompt_tokens or remove the problem"
            )
        return Prompt(problem.id, tokens, n)

    def asked_to_stop(self) -> bool:
        """Whether this process was told to stop."""
        return self.stop is not None and self.stop.asked

    def stream(
        self,
        problems: Sequence[Problem],
        prompts: Sequence[Prompt],
        sampling: Sampling,
        stats: SamplingStats,
        label: str | None = None,
    ) -> Iterator[Attempt]:
        """This process's attempts, each as soon as it is sampled and graded; `stats` is filled in at the end.

        A label shows progress. Once the run was asked to stop no more are sampled.
        """
        answers = {problem.id: problem.answers for problem in problems}
        total, done = sum(prompt.n for prompt in prompts), 0
        finished_tokens = 0
        sampler, waiting = SamplerStats(), deque()  # sampled, the verdict still to come
        started = last_line = time.perf_counter()

        def graded() -> Attempt:
            rollout, text, ticket = waiting.popleft()
            return Attempt(rollout, text, self.grader.collect([ticket])[0])

        note_place("gathering the weights for sampling")
        with gathered(self.model):
            note_place("sampling", collective=False)
            for rollout in generate(self.model, prompts, sampling, self.limits, sampler, self.asked_to_stop):
                text = self.tokenizer.decode(rollout.tokens, skip_special_tokens=True)
                begun = time.perf_counter()
                waiting.append((rollout, text, self.grader.submit(text, answers[rollout.problem_id])))
                now, done, finished_tokens = time.perf_counter(), done + 1, finished_tokens + len(rollout.tokens)
                stats.grade_seconds += now - begun
                while waiting and self.grader.ready(waiting[0][2]):
                    yield graded()
                if label and now - last_line > SECONDS_BETWEEN_LINES:
                    last_line, speed = now, sampler.decoded_tokens / (now - started)
                    # the first to finish are the shortest
                    typical = finished_tokens / done if 10 * done > total else sampling.max_new_tokens
                    left = max(0.0, total * typical - sampler.decoded_tokens) / speed
                    eta = timedelta(seconds=round(left))
                    self.processes.say(f"{label}: {done}/{total} responses  {speed:,.0f} tok/s  ETA {eta}")
        sampled = time.perf_counter()
        if self.processes.device.type == "cuda":
            torch.cuda.empty_cache()  # the cache's memory is the update's now
        while waiting:
            yield graded()
        stats.grade_seconds += time.perf_counter() - sampled
        stats.sample_seconds += sampled - started
        stats.tokens += sampler.decoded_tokens
        stats.preemptions += sampler.preemptions
        stats.memory_retries += sampler.memory_retries
        if sampler.memory_retries:
            self.processes.say(
                f"sampling ran out of memory {sampler.memory_retries} times and went on with fewer rows: "
                f"lower the recipe's sampler.rows or cache_tokens"
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
        """Answer the prompts on all processes together, each its share (see `deal` for the expected tokens).

        Returns what `keep` made of each of this process's attempts, called as soon as it was graded; the work of all
        processes; and whether any of them was asked to stop, so that some prompts are unanswered. Raises GraderError,
        on every process, when the grader fails often.
        """
        expected = [None] * len(prompts) if expected_tokens is None else expected_tokens
        share = deal(prompts, expected, sampling.max_new_tokens, self.processes.world_size)[self.processes.rank]
        kept, work, verdicts = [], SamplingStats(), Counter()
        for attempt in self.stream(problems, share, sampling, work, label):
            kept.append(keep(attempt))
            verdicts[attempt.grade.verdict] += 1
        everyone = self.processes.all_gather((work, verdicts, self.asked_to_stop()), "the end of sampling")
        check_grader(sum((own for _, own, _ in everyone), Counter()), self.most_failed_share)
        return kept, total_work([own for own, _, _ in everyone]), any(stopped for _, _, stopped in everyone)

    def attempt(
        self,
        problems: Sequence[Problem],
        n: int,
        sampling: Sampling,
        label: str | None = None,
        expected_tokens: Sequence[float | None] | None = None,
    ) -> tuple[list[list[Attempt]], SamplingStats]:
        """n attempts at each problem, in the order given, the same on every process. A label shows progress.

        Expected tokens are of one response to each problem (None: unknown). Raises, on every process, Interrupted when
        the run was asked to stop, GraderError when the grader fails often.
        """
        prompts = [self.prompt(problem, n) for problem in problems]
        mine, work, stopped = self.sample(problems, prompts, sampling, label=label, expected_tokens=expected_tokens)
        if stopped:
            raise Interrupted
        groups: dict[str, list[Attempt]] = {problem.id: [] for problem in problems}
        for attempts in self.processes.all_gather(mine, "the exchange of attempts"):
            for attempt in attempts:
                groups[attempt.rollout.problem_id].append(attempt)
        for group in groups.values():
            group.sort(key=lambda attempt: attempt.rollout.index)
        return list(groups.values()), work


def deal(
    prompts: Sequence[Prompt], expected_tokens: Sequence[float | None], most_tokens: int, ranks: int
) -> list[list[Prompt]]:
    """Share out prompts so that all ranks finish together: the longest first, to the rank that has least to do.

    `expected_tokens` are of one response to each prompt, at most `most_tokens`; None, unknown, counts as the mean. The
    responses to one prompt are split only where together they would take their rank past its fair share by more than
    half a response and the prompt, which then is prefilled once more. What a response is does not depend on its rank.
    """
    if ranks == 1:
        return [list(prompts)]
    known = [tokens for tokens in expected_tokens if tokens is not None]
    typical = sum(known) / len(known) if known else most_tokens
    each = [min(typical if tokens is None else tokens, most_tokens) for tokens in expected_tokens]
    whole = [len(prompt.tokens) + prompt.n * tokens for prompt, tokens in zip(prompts, each, strict=True)]
    fair = sum(whole) / ranks
    shares: list[list[Prompt]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for i in sorted(range(len(prompts)), key=lambda i: -whole[i]):
        prompt, dealt = prompts[i], 0
        while dealt < prompt.n:
            rank, take = loads.index(min(loads)), prompt.n - dealt
            once = len(prompt.tokens)
            room = fair - loads[rank]
            if once + take * each[i] - room > once + each[i] / 2:
                take = min(take, max(1, round((room - once) / each[i])))
            limits = prompt.limits and prompt.limits[dealt : dealt + take]
            shares[rank].append(replace(prompt, n=take, first=prompt.first + dealt, limits=limits))
            loads[rank] += once + take * each[i]
            dealt += take
    return shares


def total_work(works: Sequence[SamplingStats]) -> SamplingStats:
    """The work of all processes: sums of what they made, the longest of what they took, and who waited how long."""
    longest = max(work.sample_seconds for work in works)
    return SamplingStats(
        tokens=sum(work.tokens for work in works),
        sample_seconds=longest,
        grade_seconds=max(work.grade_seconds for work in works),
        preemptions=sum(work.preemptions for work in works),
        memory_retries=sum(work.memory_retries for work in works),
        idle_shares=tuple(1 - work.sample_seconds / longest if longest else 0.0 for work in works),
    )
