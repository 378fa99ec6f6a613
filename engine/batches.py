"""Pack sequences end to end, and cut a batch into micro-batches that all ranks finish together."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.attention import SharedLayout
from model import Packed, SharedPrompts, Transformer


@dataclass(frozen=True)
class TrainingSequence:
    """A prompt and a response to learn from; all response tokens have the sequence's advantage."""

    tokens: np.ndarray  # int32 (P + R,)
    prompt_length: int
    advantage: float = 1.0
    old_logprobs: np.ndarray | None = None  # float32 (R,), at `temperature`; None in supervised fine-tuning
    temperature: float = 1.0
    rescued: bool = False

    @property
    def response_length(self) -> int:
        """Number of tokens in the loss, including end-of-sequence."""
        return len(self.tokens) - self.prompt_length


@dataclass(frozen=True)
class TokenBatch:
    """The N response tokens of one micro-batch; every field except `tokens` and `context` is (N,)."""

    tokens: Tensor  # int64 (T,), prompts and responses
    context: Packed
    predict: Tensor  # int64, position of the hidden state that predicts each response token
    targets: Tensor  # int64
    advantages: Tensor
    old_logprobs: Tensor
    temperature: Tensor
    rescued: Tensor  # bool
    sequence: Tensor  # int64, index of the token's sequence in the micro-batch


MIN_SHARED = 0.1  # of a sequence: sharing a shorter prompt does not pay for splitting sequences in every attention


def group_by_prompt(sequences: Sequence[TrainingSequence]) -> list[list[int]]:
    """Return lists of indices of sequences with the same prompt; a sequence with a very short prompt is alone."""
    groups: dict[bytes | int, list[int]] = {}
    for i, sequence in enumerate(sequences):
        shares = sequence.prompt_length >= MIN_SHARED * len(sequence.tokens)
        groups.setdefault(sequence.tokens[: sequence.prompt_length].tobytes() if shares else i, []).append(i)
    return list(groups.values())


def pack(sequences: Sequence[TrainingSequence], device: torch.device) -> TokenBatch:
    """Lay sequences end to end, longest first, with each shared prompt once, and list their response tokens."""
    sequences = sorted(sequences, key=lambda sequence: -len(sequence.tokens))
    lengths = [len(sequence.tokens) for sequence in sequences]
    starts = np.cumsum([0, *lengths])
    tokens = np.concatenate([sequence.tokens for sequence in sequences]).astype(np.int64)
    # each token's position in the row that the model reads, and False for the copies of a shared prompt
    place, first_copy = np.arange(len(tokens)), np.ones(len(tokens), dtype=bool)
    for first, *others in group_by_prompt(sequences):
        for i in others:
            prompt = np.arange(sequences[i].prompt_length)
            place[starts[i] + prompt], first_copy[starts[i] + prompt] = starts[first] + prompt, False
    if first_copy.all():
        context = Packed(lengths, device)
    else:
        place = (first_copy.cumsum() - 1)[place]
        share, prompts = np.flatnonzero(first_copy), [sequence.prompt_length for sequence in sequences]
        layout = SharedLayout(lengths, prompts, torch.from_numpy(place), torch.from_numpy(share), device)
        context = SharedPrompts(layout)
    response = np.flatnonzero(np.concatenate([np.arange(len(s.tokens)) >= s.prompt_length for s in sequences]))
    responses = [s.response_length for s in sequences]
    old = [np.zeros(s.response_length) if s.old_logprobs is None else s.old_logprobs for s in sequences]

    def per_token(values: Sequence[float], dtype: type) -> Tensor:  # (S,) -> (N,)
        return torch.from_numpy(np.repeat(values, responses).astype(dtype)).to(device)

    return TokenBatch(
        tokens=torch.from_numpy(tokens[first_copy]).to(device),
        context=context,
        predict=torch.from_numpy(place[response - 1]).to(device),
        targets=torch.from_numpy(tokens[response]).to(device),
        advantages=per_token([s.advantage for s in sequences], np.float32),
        old_logprobs=torch.from_numpy(np.concatenate(old).astype(np.float32)).to(device),
        temperature=per_token([s.temperature for s in sequences], np.float32),
        rescued=per_token([s.rescued for s in sequences], np.bool_),
        sequence=per_token(range(len(sequences)), np.int64),
    )


def packed_tokens(sequences: Sequence[TrainingSequence]) -> int:
    """Return the number of tokens of these sequences in one micro-batch, each shared prompt counted once."""
    repeated = sum(sequences[i].prompt_length for _, *others in group_by_prompt(sequences) for i in others)
    return sum(len(sequence.tokens) for sequence in sequences) - repeated


# ------------------------------------------------------------------------------------ micro-batches and their balance


def break_even_length(model: Transformer) -> float:
    """Return the sequence length, in tokens, at which attention costs as much as the rest of a forward.

    Per token: 2 FLOPs a parameter, and for causal attention 2 x layers x heads x head_dim x sequence length.
    """
    config = model.config
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return parameters / (config.num_hidden_layers * config.num_attention_heads * config.head_dim)


def cost(sequences: Sequence[TrainingSequence], break_even: float) -> float:
    """Estimate the cost of a micro-batch, in tokens without attention; an infinite `break_even` ignores attention."""
    return packed_tokens(sequences) + sum(len(sequence.tokens) ** 2 for sequence in sequences) / break_even


def micro_batches(
    sequences: Sequence[TrainingSequence], max_tokens: int, ranks: int, break_even: float = math.inf
) -> list[list[TrainingSequence]]:
    """Cut a batch with `balance`, keeping the responses to one prompt together where they fit.

    On several ranks, also try to split groups at half a rank's fair share: computing a prompt twice can end the step
    sooner.
    """
    limits = [max_tokens]
    if ranks > 1:
        limits.append(min(max_tokens, math.ceil(packed_tokens(sequences) / ranks / 2)))
    cuts = []
    for limit in limits:
        parts: list[list[TrainingSequence]] = []  # groups, or pieces of one, of at most `limit` tokens
        for group in group_by_prompt(sequences):
            size = math.inf
            for sequence in (sequences[i] for i in group):
                if size + sequence.response_length > limit:
                    parts.append([])
                    size = sequence.prompt_length
                parts[-1].append(sequence)
                size += sequence.response_length
        costs = [cost(part, break_even) for part in parts]
        batches = balance([packed_tokens(part) for part in parts], costs, max_tokens, ranks)
        cuts.append([[sequence for part in batch for sequence in parts[part]] for batch in batches])
    return min(cuts, key=lambda batches: makespan([cost(batch, break_even) for batch in batches], ranks))


def balance(lengths: Sequence[int], costs: Sequence[float], max_tokens: int, ranks: int) -> list[list[int]]:
    """Distribute items of these lengths over ranks x k micro-batches of at most `max_tokens` and similar cost.

    Return lists of indices, micro-batch i for rank i % ranks. The ranks wait for each other in every round, so the
    micro-batches of a round have neighbouring costs. An item longer than `max_tokens` gets its own micro-batch;
    with few items some micro-batches are empty.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-costs[i], i))
    per_rank = max(1, math.ceil(sum(lengths) / (max_tokens * ranks)))
    while True:
        batches: list[list[int]] = [[] for _ in range(per_rank * ranks)]
        tokens, loads = [0] * len(batches), [0.0] * len(batches)
        for i in order:  # the most expensive first, each to the micro-batch with the least load that has room
            open_to = [b for b, batch in enumerate(batches) if not batch or tokens[b] + lengths[i] <= max_tokens]
            if not open_to:
                break
            lightest = min(open_to, key=loads.__getitem__)
            batches[lightest].append(i)
            tokens[lightest] += lengths[i]
            loads[lightest] += costs[i]
        else:
            heaviest_first = sorted(range(len(batches)), key=lambda b: -loads[b]) if ranks > 1 else range(len(batches))
            return [batches[b] for b in heaviest_first]
        per_rank += 1


def makespan(loads: Sequence[float], ranks: int) -> float:
    """Return the total load of the slowest rank of each round of micro-batches."""
    return sum(max(loads[i : i + ranks]) for i in range(0, len(loads), ranks))


def idle_share(loads: Sequence[float], ranks: int) -> float:
    """Estimate the share of all ranks' time spent waiting for the slowest rank of each round of micro-batches."""
    longest = ranks * makespan(loads, ranks)
    return 1 - sum(loads) / longest if longest else 0.0
