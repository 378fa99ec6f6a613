"""Packed attention equals a masked softmax, and padded runs keep every token once."""

import random

import pytest
import torch
from test_model import difference

from engine.attention import PackedLayout, packed_attention, padded_runs


def naive_attention(q, k, v, lengths):
    """Compute masked softmax attention, one sequence and one head at a time."""
    outputs, group = [], q.shape[1] // k.shape[1]
    for q_s, k_s, v_s in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        heads = []
        for h in range(q.shape[1]):
            scores = q_s[:, h] @ k_s[:, h // group].T / q.shape[2] ** 0.5
            mask = torch.ones_like(scores).tril() == 0
            heads.append(scores.masked_fill(mask, float("-inf")).softmax(1) @ v_s[:, h // group])
        outputs.append(torch.stack(heads, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("heads, key_heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("lengths", [[1], [5, 9, 1, 30, 2, 31], [40, 40, 39], [1] * 7])
def test_packed_attention_equals_a_naive_masked_softmax(lengths, heads, key_heads):
    generator = torch.Generator().manual_seed(sum(lengths))
    shapes = [(sum(lengths), n, 8) for n in (heads, key_heads, key_heads)]
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    assert difference(packed_attention(q, k, v, PackedLayout(lengths, "cpu")), naive_attention(q, k, v, lengths)) < 1e-5


@pytest.mark.parametrize("most_padding", [0.0, 0.25, 0.6])
def test_padded_runs_keep_every_token_once_and_bound_the_padding(most_padding):
    generator = random.Random(7)
    for _ in range(100):
        lengths = [generator.choice([1, 2, 3, generator.randint(1, 50)]) for _ in range(generator.randint(1, 20))]
        kept = []
        for run in padded_runs(lengths, "cpu", most_padding):
            longest = len(run.gather) // run.rows
            assert len(run.keep) >= (1 - most_padding) * len(run.gather)
            row_of_cell = run.keep // longest
            for row in range(run.rows):  # a row is one complete sequence, then padding
                tokens = run.gather[run.keep[row_of_cell == row]].tolist()
                start = sum(lengths[: sequences_done(kept, lengths)])
                assert tokens == list(range(start, start + len(tokens)))
                kept.extend(tokens)
                assert run.keep[row_of_cell == row].tolist() == [row * longest + i for i in range(len(tokens))]
        assert kept == list(range(sum(lengths)))


def sequences_done(kept: list[int], lengths: list[int]) -> int:
    """Count the complete sequences in the kept tokens."""
    done, tokens = 0, len(kept)
    while tokens:
        tokens -= lengths[done]
        done += 1
    return done
