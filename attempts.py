"""Problems in, graded attempts out: the one way in which training, filtering and evaluation sample.

Each process answers its share of the problems, grades every response while the next are being decoded, and the
attempts are exchanged, so that every process sees all of them in the same order.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from data_filter import DataError, Problem, prompt_text
from device import Device, Interrupted, StopRequest
from model import ModelError, Transformer, gathered
from report import format_eta
from reward import Grade, Grader
from rollout import CacheLimits, Prompt, Rollout, SamplerStats, Sampling, generate

SECONDS_BETWEEN_LINES = 10.0


@dataclass
class Attempt:
    """One response to one problem."""

    rollout: Rollout
    text: str  # what the grader read
    grade: Grade


@dataclass
class AttemptStats:
    """What making them took, over all processes; the seconds are the slowest process's."""

    tokens: int
    sample_seconds: float
    grade_seconds: float  # waited for after sampling had ended; most grading hides behind it
    preemptions: int


def load_tokenizer(folder: Path, model: Transformer) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, checked against the model."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: the tokenizer cannot be loaded ({str(error).splitlines()[0]})") from None
    if len(tokenizer) > model.config.vocab_size:
        raise ModelError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model only {model.config.vocab_size}"
        )
    if not tokenizer.chat_template:
        raise ModelError(f"{folder}: the tokenizer has no chat template; add a chat_template.jinja to the folder")
    return tokenizer


def stop_tokens(tokenizer: PreTrainedTokenizerBase, model: Transformer, folder: Path) -> tuple[int, ...]:
    """Every token that ends a response: the tokenizer's, the config's and the generation config's."""
    found = {tokenizer.eos_token_id}
    sources = [model.config.source]
    generation = folder / "generation_config.json"
    if generation.exists():
        sources.append(json.loads(generation.read_text()))
    for source in sources:
        ends = source.get("eos_token_id")
        found |= set(ends) if isinstance(ends, list) else {ends}
    found.discard(None)
    if not found:
        raise ModelError(f"{folder}: neither tokenizer nor config names an end-of-sequence token")
    return tuple(sorted(found))


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Text to tokens, with nothing added: the chat template has written what belongs there."""
    return tokenizer(text, add_special_tokens=False).input_ids


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict]) -> list[int]:
    """A chat up to the place where the assistant is to reply."""
    return encode(tokenizer, tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


@dataclass
class Respondent:
    """A model that can be asked: its weights, tokenizer, cache and grader, on all processes together."""

    model: Transformer
    tokenizer: PreTrainedTokenizerBase
    stop_tokens: tuple[int, ...]
    limits: CacheLimits
    grader: Grader
    device: Device
    instruction: str
    stop: StopRequest | None = None  # where given, sampling is abandoned when it asks for it

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

    def attempt(
        self, problems: Sequence[Problem], n: int, sampling: Sampling, label: str | None = None
    ) -> tuple[list[list[Attempt]], AttemptStats]:
        """n attempts at each problem, in the order given, the same on every process. A label shows progress.

        Raises Interrupted, on every process, when the run was asked to stop.
        """
        share = problems[self.device.rank :: self.device.ranks]
        by_id = {problem.id: problem for problem in share}
        prompts = [self.prompt(problem, n) for problem in share]
        stats, waiting = SamplerStats(), []
        started = last_line = time.perf_counter()
        with gathered(self.model):
            for rollout in generate(self.model, prompts, sampling, self.limits, stats, self.asked_to_stop):
                text = self.tokenizer.decode(rollout.tokens, skip_special_tokens=True)
                ticket = self.grader.submit(text, by_id[rollout.problem_id].answers)
                waiting.append((rollout, text, ticket))
                now = time.perf_counter()
                if label and now - last_line > SECONDS_BETWEEN_LINES:
                    last_line, total = now, len(share) * n
                    left = (now - started) / len(waiting) * (total - len(waiting))
                    speed = stats.decoded_tokens / (now - started)
                    self.device.say(
                        f"{label}: {len(waiting)}/{total} responses  {speed:,.0f} tok/s  ETA {format_eta(left)}"
                    )
        sampled = time.perf_counter()
        if self.device.device.type == "cuda":
            torch.cuda.empty_cache()  # the cache's memory is the update's now
        grades = self.grader.collect([ticket for *_, ticket in waiting])
        graded = time.perf_counter()
        mine = [Attempt(rollout, text, grade) for (rollout, text, _), grade in zip(waiting, grades, strict=True)]
        work = AttemptStats(stats.decoded_tokens, sampled - started, graded - sampled, stats.preemptions)

        if any(self.device.gather(self.asked_to_stop())):
            raise Interrupted
        groups: dict[str, list[Attempt]] = {problem.id: [] for problem in problems}
        everyone = self.device.gather((mine, work))
        for attempts, _ in everyone:
            for attempt in attempts:
                groups[attempt.rollout.problem_id].append(attempt)
        for group in groups.values():
            group.sort(key=lambda attempt: attempt.rollout.index)
        works = [work for _, work in everyone]
        total = AttemptStats(
            tokens=sum(work.tokens for work in works),
            sample_seconds=max(work.sample_seconds for work in works),
            grade_seconds=max(work.grade_seconds for work in works),
            preemptions=sum(work.preemptions for work in works),
        )
        return list(groups.values()), total
