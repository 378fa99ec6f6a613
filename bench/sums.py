"""Write sums that SmolLM2-135M-Instruct sometimes solves, and two recipes: fine-tune it to box, then reinforce it.

    python bench/smollm2.py models/smollm2-135m
    python bench/sums.py sums --model models/smollm2-135m     # three files of problems, sft.toml and rl.toml
    python train.py sums/sft.toml --out sums                  # 10 minutes on one core
    python train.py sums/rl.toml --out sums                   # 45 minutes

The model can add, but does not put its answer into a box: a few steps of fine-tuning on correct solutions teach the
format, and reinforcement learning improves the answers.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lab.data_files import DataError  # noqa: E402
from lab.problems import Problem, write_problems  # noqa: E402

SIZES = {"held-out": 96, "train": 256, "sft": 320}  # the sets share no problem
COMMON = """# {title}: written by bench/sums.py, every number a choice for two CPU cores.
name = "{name}"
seed = 0
model = "{model}"
thinking = false
instruction = "Put the final answer within \\\\boxed{{}}."
micro_batch_tokens = 4096
recompute_activations = false

[sampler]
rows = 64
page_tokens = 128
cache_tokens = 16384

[reward]
workers = 1

[eval]
data = "{folder}/held-out.jsonl"
samples = 4
temperature = 1.0
max_response_tokens = 48
every_steps = 20

[run]
checkpoint_every_steps = 10

[[stage]]
"""
SFT = """kind = "sft"
data = "{folder}/sft.jsonl"
steps = 40
batch_sequences = 16
learning_rate = 1e-4
warmup_steps = 4
decay_share = 0.3
"""
RL = """kind = "rl"
data = "{folder}/train.jsonl"
steps = 60
batch_problems = 16
temperature = 1.0
max_prompt_tokens = 96
max_response_tokens = 48
substitute = false                 # groups without a signal are left out instead: half the time of a step
variant.drop_zero_variance = true
informative_share = 0.0
learning_rate = 1e-5
warmup_steps = 2
"""


def make_problem(random: np.random.Generator, number: int) -> tuple[str, str, int, str]:
    """Return question, kind, answer and a worked solution; the kinds alternate."""

    def draw(low: int, high: int) -> int:
        return int(random.integers(low, high + 1))

    a, b, c = draw(12, 99), draw(12, 99), draw(2, 9)
    match number % 4:
        case 0:
            return f"What is {a} + {b}?", "two terms", a + b, f"{a} + {b} = {a + b}."
        case 1:
            a, b = max(a, b) + 1, min(a, b)
            return f"What is {a} - {b}?", "difference", a - b, f"{a} - {b} = {a - b}."
        case 2:
            a = draw(3, 60)  # room for all three files
            return f"What is {a} * {c}?", "product", a * c, f"{a} * {c} = {a * c}."
    a, b = draw(21, 60), draw(2, 19)
    left = a - b - c
    question = f"Tom has {a} apples. He gives {b} to Ann and {c} to Ben. How many are left?"
    return question, "story", left, f"{a} - {b} = {a - b}. {a - b} - {c} = {left}."


def main() -> None:
    """Write the three files and the recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--model", type=Path, required=True, help="what bench/smollm2.py wrote")
    arguments = parser.parse_args()
    out, random, taken = arguments.out.resolve(), np.random.default_rng(0), set()
    try:
        for name, size in SIZES.items():
            problems = []
            while len(problems) < size:
                text, kind, answer, steps = make_problem(random, len(problems))
                if text in taken:
                    continue
                taken.add(text)
                solution = f"{steps} The answer is \\boxed{{{answer}}}."
                problems.append(Problem(f"{name}/{len(problems)}", text, (str(answer),), kind, None, solution))
            write_problems(problems, out / f"{name}.jsonl")
    except DataError as error:
        sys.exit(f"sums.py: {error}")
    for name, title, model, stage in (
        ("sft", "SmolLM2-135M-Instruct learns the box", arguments.model.resolve(), SFT),
        ("rl", "SmolLM2-135M-Instruct learns small sums from their answers", out / "sft" / "stage-0", RL),
    ):
        words = {"title": title, "name": name, "model": model, "folder": out}
        (out / f"{name}.toml").write_text((COMMON + stage).format(**words))
    print(f"wrote {out}; go on with: python train.py {out}/sft.toml --out {out}, then the same with rl.toml")


if __name__ == "__main__":
    main()
