"""The laptop world: sums to solve step by step, their tokenizer, and an untrained model.

    python -m lab.arithmetic OUT            # model/, sft.jsonl, train.jsonl, held-out.jsonl, beyond-window.jsonl

A problem is a sum of small numbers, sometimes after filler; its worked solution adds one term at a time, so that the
response grows with the number of terms:

    problem     7 + 5 - 3
    response    7 + 5 = 12 ; 12 - 3 = 9</think> \boxed{9}

The solutions for supervised fine-tuning are careless with long sums: a share of their steps is wrong, and later steps
continue from the wrong number. The model learns the noise too, and reinforcement learning from the answer alone can
remove it. Most problems of RL are short and some have more terms than fine-tuning, so that many are solved always, some
sometimes and some never: a J. All files have the usual formats, so that no other file depends on this one.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from engine.terminal import prepare_terminal
from lab.data_files import DataError
from lab.problems import Problem, write_problems
from lab.recipe import World
from model import Transformer, initialise, parse_config, save

FILLER = " ."
TOKENS_PER_TERM = 8  # 2 of the problem and 6 of its solution; the template adds what the first term saves
MAX_MISSES = 10_000  # consecutive draws without a new sum

# --------------------------------------------------------------------------------------------------- problems


def make_terms(random: np.random.Generator, count: int) -> list[int]:
    """Draw `count` signed summands of 1 to 9, the first positive; the running sum stays within 0 and 19."""
    terms = [int(random.integers(1, 10))]
    while len(terms) < count:
        term = int(random.integers(1, 10)) * (1 if random.random() < 0.5 else -1)
        if 0 <= sum(terms) + term <= 19:
            terms.append(term)
    return terms


def write_sum(terms: Sequence[int]) -> str:
    """Write [7, 5, -3] as ' 7 + 5 - 3'."""
    first, *rest = terms
    return f" {first}" + "".join(f" {'-' if term < 0 else '+'} {abs(term)}" for term in rest)


def solve(terms: Sequence[int], random: np.random.Generator, noise: float) -> str:
    """Write the worked response; each step is off by 1 to 9 with probability `noise`; later steps continue from it."""
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
    terms: Sequence[int],
    world: World,
    taken: set[tuple[int, ...]],
    noise: Sequence[float] = (0.0,),
    repeats: bool = False,
) -> list[Problem]:
    """Draw `count` problems that cycle through the numbers of terms, none with a sum in `taken`.

    Unless sums may repeat, `taken` grows by them. Raises DataError when too few sums are left.
    """
    random = np.random.default_rng([world.seed, *name.encode()])
    problems: list[Problem] = []
    misses = 0
    while len(problems) < count:
        size = terms[len(problems) % len(terms)]
        summands = make_terms(random, size)
        if tuple(summands) in taken:
            misses += 1
            if misses == MAX_MISSES:
                raise DataError(
                    f"{name}: no sum of {size} terms is left after {len(problems)} of {count} problems: "
                    "request fewer problems, or more terms"
                )
            continue
        misses = 0
        if not repeats:
            taken.add(tuple(summands))
        filled = random.random() < world.filler_share
        room = max(1, world.trained_tokens - TOKENS_PER_TERM * size - 1)
        filler = FILLER * int(random.integers(1, room + 1)) if filled else ""
        problem = Problem(
            id=f"{name}/{len(problems)}",
            text=filler + write_sum(summands),
            answers=(str(sum(summands)),),
            type=f"{size} terms",
            solution=solve(summands, random, noise[min(max(size - 2, 0), len(noise) - 1)]),
        )
        problems.append(problem)
    return problems


# -------------------------------------------------------------------------------------- tokenizer and model

SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>", "<think>", "</think>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' }}{% if message['role'] == 'assistant' %}<think>{% endif %}"
    "{% if message['role'] == 'user' and message['content'][:1] != ' ' %}{{ ' ' }}{% endif %}"  # numbers have one
    "{{ message['content'] }}<|end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with a token per number up to 99 and per sign, with its space, and per other character."""
    words = [*map(str, range(100)), *"+-=;."]
    others = [chr(code) for code in range(32, 127) if chr(code) not in words]
    words = [*SPECIAL, *words, *(f" {word}" for word in words), " \\boxed{", *others, "\n", "<|unknown|>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[1-9]?[0-9]| ?[+\-=;.]| \\boxed\{|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    # as in Qwen3: one token each, not special, so that decoding keeps </think> for the reward
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in ("<think>", "</think>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|end|>",
        unk_token="<|unknown|>",
        additional_special_tokens=list(SPECIAL[1:3]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,  # a token may contain the space before a full stop
    )


def make_model(world: World, vocabulary: int) -> Transformer:
    """Make a Qwen3-shaped model with freshly initialised weights."""
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
    """Write the untrained model with its tokenizer, and four sets of problems that share no sum."""
    folder.mkdir(parents=True)
    taken: set[tuple[int, ...]] = set()
    late = replace(world, filler_share=0.0)
    sets = {
        "held-out": make_problems("held-out", world.held_out_problems, world.held_out_terms, world, taken),
        "train": make_problems("train", world.train_problems, world.train_terms, world, taken),
        "beyond-window": make_problems("beyond-window", world.beyond_problems, world.beyond_terms, late, taken),
    }
    # last, to avoid the sums of all other sets; with repeats, since there are too few sums of two terms
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
    parser = argparse.ArgumentParser(
        "python -m lab.arithmetic", description="Write the laptop world: problems, tokenizer and model."
    )
    parser.add_argument("out", type=Path, help="the folder to write; it must not exist")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.out.exists():
        raise SystemExit(f"lab.arithmetic: {arguments.out} exists already; give another name")
    write_world(World(seed=arguments.seed), arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    prepare_terminal()
    main()
