"""Sequences packed end to end, and cut into micro-batches that all processes finish together."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model import Packed, SharedPrompts, Transformer


@dataclass(frozen=True)
class TrainingSequence:
    """A prompt and a response to learn from; every response token carries the sequence's advantage."""

    tokens: np.ndarray  # int32 (P + R,)
    prompt_length: int
    advantage: float = 1.0
    old_logprobs: np.ndarray | None = None  # float32 (R,), at `temperature`; None in supervised fine-tuning
    temperature: float = 1.0
    rescued: bool = False

    @property
    def response_length(self) -> int:
        """Tokens that the loss looks at, end-of-sequence included."""
        return len(self.tokens) - self.prompt_length


@dataclass(frozen=True)
class TokenBatch:
    """The response tokens of one micro-batch, N in all; every field but `tokens` and `context` is (N,)."""

    tokens: Tensor  # int64 (T,), prompts and responses
    context: Packed
    predict: Tensor  # int64, the position whose hidden state predicts each response token
    targets: Tensor  # int64
    advantages: Tensor
    old_logprobs: Tensor
    temperature: Tensor
    rescued: Tensor  # bool
    sequence: Tensor  # int64, which of the micro-batch's sequences the token is of: 0, 1, ...


LEAST_SHARED = 0.1  # of a sequence: a shorter prompt is not worth taking sequences apart in every attention


def by_prompt(sequences: Sequence[TrainingSequence]) -> list[list[int]]:
    """Which sequences share a prompt, each list in the order given; a sequence that is nearly all response is alone."""
    alike: dict[bytes | int, list[int]] = {}
    for i, sequence in enumerate(sequences):
        shares = sequence.prompt_length >= LEAST_SHARED * len(sequence.tokens)
        alike.setdefault(sequence.tokens[: sequence.prompt_length].tobytes() if shares else i, []).append(i)
    return list(alike.values())


def pack(sequences: Sequence[TrainingSequence], device: torch.device) -> TokenBatch:
    """Lay sequences end to end, longest first, a shared prompt once, and list their response tokens."""
    sequences = sorted(sequences, key=lambda sequence: -len(sequence.tokens))
    lengths = [len(sequence.tokens) for sequence in sequences]
    starts = np.cumsum([0, *lengths])
    tokens = np.concatenate([sequence.tokens for sequence in sequences]).astype(np.int64)
    context, place = Packed(lengths, device), np.arange(len(tokens))  # of every token in the row that the model reads
    own = np.ones(len(tokens), dtype=bool)  # not a repeated prompt
    for first, *others in by_prompt(sequences):
        for i in others:
            prompt = np.arange(sequences[i].prompt_length)
            place[starts[i] + prompt], own[starts[i] + prompt] = starts[first] + prompt, False
    if not own.all():
        place = (own.cumsum() - 1)[place]
        context = SharedPrompts(lengths, torch.from_numpy(place), torch.from_numpy(np.flatnonzero(own)), device)
    # the token at position p is predicted from position p - 1
    predict = np.concatenate(
        [start + np.arange(s.prompt_length - 1, len(s.tokens) - 1) for start, s in zip(starts, sequences, strict=False)]
    )
    responses = [s.response_length for s in sequences]
    old = [np.zeros(n) if s.old_logprobs is None else s.old_logprobs for s, n in zip(sequences, responses, strict=True)]

    def per_token(values: Sequence[float], dtype: type) -> Tensor:  # (S,) -> (N,)
        return torch.from_numpy(np.repeat(values, responses).astype(dtype)).to(device)

    return TokenBatch(
        tokens=torch.from_numpy(tokens[own]).to(device),
        context=context,
        predict=torch.from_numpy(place[predict]).to(device),
        targets=torch.from_numpy(tokens[predict + 1]).to(device),
        advantages=per_token([s.advantage for s in sequences], np.float32),
        old_logprobs=torch.from_numpy(np.concatenate(old).astype(np.float32)).to(device),
        temperature=per_token([s.temperature for s in sequences], np.float32),
        rescued=per_token([s.rescued for s in sequences], np.bool_),
        sequence=per_token(range(len(sequences)), np.int64),
    )


def packed_tokens(sequences: Sequence[TrainingSequence]) -> int:
    """Tokens of a micro-batch of these, every shared prompt counted once."""
    repeated = sum(sequences[i].prompt_length for _, *others in by_prompt(sequences) for i in others)
    return sum(len(sequence.tokens) for sequence in sequences) - repeated


# ------------------------------------------------------------------------------------ micro-batches and their balance


def even_length(model: Transformer) -> float:
    """The length, in tokens, of a sequence whose attention costs as much as all the rest of a forward.

    A token costs 2 FLOPs a parameter, and in causal attention 2 x layers x heads x head_dim a token of its sequence.
    """
    config = model.config
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return parameters / (config.num_hidden_layers * config.num_attention_heads * config.head_dim)


def work_of(sequences: Sequence[TrainingSequence], even_at: float) -> float:
    """The cost of a micro-batch, in tokens without attention; `even_at` is `even_length`'s, infinite: tokens alone."""
    return packed_tokens(sequences) + sum(len(sequence.tokens) ** 2 for sequence in sequences) / even_at


def micro_batches(
    sequences: Sequence[TrainingSequence], most_tokens: int, ranks: int, even_at: float = math.inf
) -> list[list[TrainingSequence]]:
    """Cut a batch as `cut_into_micro_batches` does, with the responses to one prompt together as far as they fit.

    Over several ranks groups are also cut to half of a rank's fair share where that ends the step sooner, although a
    prompt is then computed more than once.
    """
    ways = [_cut_groups(sequences, most_tokens, ranks, even_at, most_tokens)]
    if ranks > 1:
        half_share = math.ceil(packed_tokens(sequences) / ranks / 2)
        ways.append(_cut_groups(sequences, most_tokens, ranks, even_at, min(half_share, most_tokens)))
    return min(ways, key=lambda batches: slowest([work_of(batch, even_at) for batch in batches], ranks))


def _cut_groups(
    sequences: Sequence[TrainingSequence], most_tokens: int, ranks: int, even_at: float, most_together: int
) -> list[list[TrainingSequence]]:
    units: list[list[TrainingSequence]] = []  # groups, or parts of one, of at most most_together tokens
    for alike in by_prompt(sequences):
        size = math.inf
        for sequence in (sequences[i] for i in alike):
            if size + sequence.response_length > most_together:
                units.append([])
                size = sequence.prompt_length
            units[-1].append(sequence)
            size += sequence.response_length
    sizes, work = [packed_tokens(unit) for unit in units], [work_of(unit, even_at) for unit in units]
    batches = cut_into_micro_batches(sizes, most_tokens, ranks, work)
    return [[sequence for unit in batch for sequence in units[unit]] for batch in batches]


def cut_into_micro_batches(
    lengths: Sequence[int], most_tokens: int, ranks: int = 1, work: Sequence[float] | None = None
) -> list[list[int]]:
    """Deal sequences into equally many micro-batches per rank, of at most `most_tokens` and alike in work.

    Work is the length unless given. Returns ranks x k lists of indices, micro-batch i for rank i % ranks; those that
    ranks do at the same time, in which they wait for each other, are neighbours in work. A sequence longer than
    most_tokens gets a micro-batch of its own; some may be empty when there are few sequences.
    """
    work = lengths if work is None else work
    order = sorted(range(len(lengths)), key=lambda i: (-work[i], i))
    per_rank = max(1, math.ceil(sum(lengths) / (most_tokens * ranks)))
    while True:
        batches: list[list[int]] = [[] for _ in range(per_rank * ranks)]
        tokens, loads = [0] * len(batches), [0.0] * len(batches)
        for i in order:  # the longest first, each to the one with least to do that has room
            open_to = [b for b, batch in enumerate(batches) if not batch or tokens[b] + lengths[i] <= most_tokens]
            if not open_to:
                break
            least = min(open_to, key=loads.__getitem__)
            batches[least].append(i)
            tokens[least] += lengths[i]
            loads[least] += work[i]
        else:
            heaviest_first = sorted(range(len(batches)), key=lambda b: -loads[b]) if ranks > 1 else range(len(batches))
            return [batches[b] for b in heaviest_first]
        per_rank += 1


def slowest(loads: Sequence[float], ranks: int) -> float:
    """The work of the slowest rank of each round of micro-batches, for which the others wait, in all."""
    return sum(max(loads[i : i + ranks]) for i in range(0, len(loads), ranks))


def idle_share(loads: Sequence[float], ranks: int) -> float:
    """The share of all ranks' time in which they wait for the slowest of each round of micro-batches, by their work."""
    longest = ranks * slowest(loads, ranks)
    return 1 - sum(loads) / longest if longest else 0.0
