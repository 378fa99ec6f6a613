"""engine/batches.py: packing with shared prompts, and micro-batches that all ranks finish together."""

import math

import numpy as np
import pytest
import torch
from test_grpo import grouped_sequences
from test_traps import tiny_model

import model as models
from engine import batches as batching
from engine.batches import TrainingSequence


def each_once(batches, sequences):
    """Whether the micro-batches hold each of these sequence objects exactly once."""
    return sorted(id(sequence) for batch in batches for sequence in batch) == sorted(map(id, sequences))


def test_a_shared_prompt_is_packed_once_if_it_is_long_enough():
    cpu, sequences = torch.device("cpu"), grouped_sequences()
    batch = batching.pack(sequences, cpu)
    prompts = {tuple(s.tokens[: s.prompt_length].tolist()) for s in sequences}
    responses = sum(s.response_length for s in sequences)
    assert isinstance(batch.context, models.SharedPrompts)
    assert len(batch.tokens) == sum(map(len, prompts)) + responses == batching.packed_tokens(sequences)
    assert batch.targets.tolist() == [
        int(t) for s in sorted(sequences, key=lambda s: -len(s.tokens)) for t in s.tokens[s.prompt_length :]
    ]
    long = [TrainingSequence(np.arange(20, dtype=np.int32), 1, 1.0, np.zeros(19, np.float32)) for _ in range(2)]
    batch = batching.pack(long, cpu)  # a prompt of one token in twenty is repeated
    assert type(batch.context) is models.Packed and len(batch.tokens) == 40


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("max_tokens", [1, 12, 25, 60, 10_000])
def test_micro_batches_keep_a_group_together_if_it_fits(max_tokens, ranks):
    sequences = grouped_sequences()
    batches = batching.micro_batches(sequences, max_tokens, ranks)
    assert each_once(batches, sequences) and len(batches) % ranks == 0
    assert all(len(batch) <= 1 or batching.packed_tokens(batch) <= max_tokens for batch in batches)
    if max_tokens == 60 and ranks == 1:
        groups = [{id(sequences[i]) for i in group} for group in batching.group_by_prompt(sequences)]
        assert all(any(group <= set(map(id, batch)) for batch in batches) for group in groups)


def test_balance_holds_every_sequence_once_and_respects_the_limit():
    random = np.random.default_rng(0)
    for _ in range(200):
        lengths = random.integers(1, 100, random.integers(1, 40)).tolist()
        most, ranks = int(random.integers(1, 300)), int(random.integers(1, 5))
        batches = batching.balance(lengths, lengths, most, ranks)
        assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
        assert len(batches) % ranks == 0
        assert all(len(batch) <= 1 or sum(lengths[i] for i in batch) <= most for batch in batches)


def test_the_micro_batches_of_a_round_have_similar_costs():
    # 5 long sequences and 150 short ones on 4 ranks: by tokens alone, one rank would do twice the attention
    lengths, break_even = [40] * 5 + [4] * 150, 10
    mixed = [TrainingSequence(np.arange(n, dtype=np.int32) + 100 * i, 1) for i, n in enumerate(lengths)]
    work = []
    for max_tokens, length in ((250, break_even), (250, math.inf), (90, break_even)):
        batches = batching.micro_batches(mixed, max_tokens, 4, length)
        assert each_once(batches, mixed) and len(batches) % 4 == 0
        sizes = [[len(sequence.tokens) for sequence in batch] for batch in batches]
        assert all(sum(batch) <= max_tokens for batch in sizes)
        work.append([sum(n + n**2 / break_even for n in batch) for batch in sizes])
    assert max(work[0]) < 1.02 * 460 and max(work[1]) > 1.2 * 460  # a quarter of 5 x (40 + 160) + 150 x (4 + 1.6)
    assert len(work[2]) == 12 and work[2] == sorted(work[2], reverse=True)
    # in each round all 4 ranks wait for the slowest
    assert batching.idle_share(work[0], 4) < 0.02 and batching.idle_share(work[1], 4) > 0.18
    assert batching.idle_share([3.0, 1.0, 1.0, 1.0], 2) == pytest.approx(1 - 6 / (2 * 4))
    assert batching.idle_share([3.0, 1.0], 1) == 0.0 and batching.idle_share([0.0, 0.0], 2) == 0.0


def test_a_group_is_split_if_its_rank_would_otherwise_be_the_slowest():
    """Guards: 6 groups of the tiny world on 4 ranks were split 2, 2, 1 and 1, and a quarter of all time was waiting."""

    def shares(groups, prompt, ranks):
        sequences = [
            TrainingSequence(np.array([g, *[0] * (prompt - 1), *range(20)], dtype=np.int32), prompt)
            for g in range(groups)
            for _ in range(8)
        ]
        batches = batching.micro_batches(sequences, 10_000, ranks)
        assert each_once(batches, sequences)
        pieces = sum(len({s.tokens[0] for s in batch}) for batch in batches)  # how often prompts are computed
        loads = [batching.cost(batch, math.inf) for batch in batches]
        return pieces, batching.idle_share(loads, ranks)

    pieces, idle = shares(6, 10, 4)
    assert pieces > 6 and idle < 0.1
    assert shares(8, 10, 4) == (8, 0.0)  # nothing to gain
    assert shares(6, 1000, 4)[0] == 6  # a prompt that costs more than its group's responses is computed once


def test_attention_costs_as_much_as_the_rest_at_the_break_even_length():
    model = tiny_model()
    config = model.config
    heads = config.num_attention_heads * config.head_dim
    length = batching.break_even_length(model)
    # scores and values, 2 FLOPs each per element of a head; a token sees half of its sequence on average
    attention = config.num_hidden_layers * 2 * (2 * heads) * length / 2
    assert attention == pytest.approx(2 * sum(p.numel() for p in model.parameters()))
