"""The laptop world: sums to solve step by step, a tokenizer for them, and a raw model to start from.

    python -m lab.arithmetic OUT            # model/, sft.jsonl, train.jsonl, held-out.jsonl, beyond-window.jsonl

A problem is a sum of small numbers, perhaps behind some filler; its worked solution takes one term at a time, so that
the response grows with the number of terms:

    problem     7 + 5 - 3
    response    7 + 5 = 12 ; 12 - 3 = 9</think> \boxed{9}

The solutions that supervised fine-tuning sees are noisy: a share of the steps is wrong, and what follows goes on
from the wrong number. A model that has learned them imitates the noise as well, which is what reinforcement
learning from the answer alone can remove. Fine-tuning stops at fewer terms than the problems of RL have, so
that some of these are solved always, some sometimes and some never.

Everything is written to disk in the ordinary formats, so that nothing downstream knows of this file.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lab.problems import DataError, Problem, write_problems
from lab.recipe import World
from model import Transformer, initialise, parse_config, save

FILLER = " ."
MOST_MISSES = 10_000  # draws in a row that found no new sum

# --------------------------------------------------------------------------------------------------- problems


def make_terms(random: np.random.Generator, count: int) -> list[int]:
    """`count` summands of 1 to 9 with signs, the first positive; the running sum stays within 0 and 19."""
    terms = [int(random.integers(1, 10))]
    while len(terms) < count:
        term = int(random.integers(1, 10)) * (1 if random.random() < 0.5 else -1)
        if 0 <= sum(terms) + term <= 19:
            terms.append(term)
    return terms


def write_sum(terms: Sequence[int]) -> str:
    """[7, 5, -3] -> ' 7 + 5 - 3'."""
    first, *rest = terms
    return f" {first}" + "".join(f" {'-' if term < 0 else '+'} {abs(term)}" for term in rest)


def solve(terms: Sequence[int], random: np.random.Generator, noise: float) -> str:
    """The worked response; each step is off by 1 to 9 with probability `noise`, and later steps go on from there."""
    steps, total = [], terms[0]
    for term in terms[1:]:
        step = write_sum([total, term])
        total += term
        if random.random() < noise:
            total += int(random.integers(1, 10)) * (1 if random.random() < 0.5 else -1)
        steps.append(f"{step} = {total}")
    return " ;".join(steps) + f"</think> \\boxed{{{total}}}"


def make_problems(
    name: str,
    count: int,
    terms: tuple[int, int],
    world: World,
    taken: set[tuple[int, ...]],
    noise: float = 0.0,
    repeats: bool = False,
) -> list[Problem]:
    """`count` problems, their numbers of terms in turn, none of a sum in `taken`, which grows unless they may repeat.

    Raises DataError when there are not so many sums.
    """
    random = np.random.default_rng([world.seed, *name.encode()])
    problems: list[Problem] = []
    misses = 0
    while len(problems) < count:
        size = terms[0] + len(problems) % (terms[1] - terms[0] + 1)
        summands = make_terms(random, size)
        if tuple(summands) in taken:
            misses += 1
            if misses == MOST_MISSES:
                raise DataError(
                    f"{name}: no sum of {size} terms is left after {len(problems)} of {count} problems: "
                    "ask for fewer, or for more terms"
                )
            continue
        misses = 0
        if not repeats:
            taken.add(tuple(summands))
        filled = random.random() < world.filler_share
        filler = FILLER * int(random.integers(1, world.filler_tokens + 1)) if filled else ""
        problem = Problem(
            id=f"{name}/{len(problems)}",
            text=filler + write_sum(summands),
            answers=(str(sum(summands)),),
            type=f"{size} terms",
            solution=solve(summands, random, noise),
        )
        problems.append(problem)
    return problems


# -------------------------------------------------------------------------------------- tokenizer and raw model

SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>", "<think>", "</think>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' }}{% if message['role'] == 'assistant' %}<think>{% endif %}"
    "{{ message['content'] }}<|end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per number up to 99 and per sign, with the space before it; any other character is a token too."""
    words = [*map(str, range(100)), *"+-=;."]
    others = [chr(code) for code in range(32, 127) if chr(code) not in words]
    words = [*SPECIAL, *words, *(f" {word}" for word in words), " \\boxed{", *others, "\n", "<|unknown|>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[1-9]?[0-9]| ?[+\-=;.]| \\boxed\{|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    # as Qwen3 has them: one token each, and kept when special tokens are skipped, for the reward looks for </think>
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in ("<think>", "</think>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|end|>",
        unk_token="<|unknown|>",
        additional_special_tokens=list(SPECIAL[1:3]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,  # the space before a full stop is part of a token
    )


def make_model(world: World, vocabulary: int) -> Transformer:
    """A Qwen3-shaped model with fresh weights."""
    source = {
        "model_type": "qwen3",
        "vocab_size": vocabulary,
        "hidden_size": world.hidden_size,
        "intermediate_size": 3 * world.hidden_size,
        "num_hidden_layers": world.layers,
        "num_attention_heads": world.hidden_size // 32,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "max_position_embeddings": world.window,
        "rope_theta": 10_000.0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    model = Transformer(parse_config(source, "the laptop world's model"))
    initialise(model, world.seed)
    return model


def write_world(world: World, folder: Path) -> None:
    """Write the raw model with its tokenizer, and the four sets of problems; no sum of one set is in another."""
    folder.mkdir(parents=True)
    taken: set[tuple[int, ...]] = set()
    late = replace(world, filler_share=0.0)
    sets = {
        "held-out": make_problems("held-out", world.held_out_problems, world.train_terms, world, taken),
        "train": make_problems("train", world.train_problems, world.train_terms, world, taken),
        "beyond-window": make_problems("beyond-window", world.beyond_problems, world.beyond_terms, late, taken),
    }
    # last and with repeats: it keeps off all others, and there are fewer sums of two terms than it wants
    sets["sft"] = make_problems("sft", world.sft_problems, world.sft_terms, world, taken, world.sft_noise, repeats=True)
    low, high = world.beyond_tokens
    random = np.random.default_rng([world.seed, low, high])
    sets["beyond-window"] = [
        replace(p, text=FILLER * int(random.integers(low, high + 1)) + p.text) for p in sets["beyond-window"]
    ]
    for name, problems in sets.items():
        write_problems(problems, folder / f"{name}.jsonl")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    save(make_model(world, len(tokenizer)), folder / "model", tokenizer_from=folder / "tokenizer")


def main() -> None:
    """Write the default world."""
    parser = argparse.ArgumentParser(description="Write the laptop world: problems, tokenizer and raw model.")
    parser.add_argument("out", type=Path, help="the folder to write; it must not exist")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.out.exists():
        raise SystemExit(f"arithmetic.py: {arguments.out} exists already; give another name")
    write_world(World(seed=arguments.seed), arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
