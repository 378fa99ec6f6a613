"""One GRPO step (sample, grade, update) of train.py and of TRL's GRPOTrainer, on the same weights and prompts.

    pip install -r bench/requirements.txt
    python bench/step.py --model SMOLLM2              # both cases; SMOLLM2: the folder that bench/smollm2.py wrote
    python bench/step.py --case wide128               # needs no download: the 128-wide model with random weights

Cases: `smollm2` (4 prompts x 8 rollouts of at most 64 tokens), `wide128` (32 x 8, at most 64 tokens, 47 on average, of
a 4-layer Qwen3 with 64 tokens of vocabulary). Ours is train.rl_stage, with log-probs, and the figures are from its
metrics. Both: float32 on a CPU, temperature 1, no top-k or top-p, clip 0.2 and 0.28, the mean over all
tokens, advantages divided by the group's std, AdamW, gradients clipped to 1, no KL term, no gradient checkpointing.
TRL generates with transformers' `generate`; `--batch`, repeated, tries other micro-batches and takes the fastest.

These models solve nothing in 64 tokens, and a batch without a signal would skip our update. So the reward of both is
the parity of the response's bytes; ours also has the grader judge every response, which TRL does not.

Each side runs in a separate process, for its peak memory. They alternate: one warm-up step, then the rounds, of which
the best counts. On a shared machine only ratios are meaningful; the CPU seconds show whether a side was slowed down.
"""

import argparse
import importlib.util
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lab.benchmarks import text_table  # noqa: E402
from lab.problems import Problem, prompt_text, write_problems  # noqa: E402

GROUP, MOST_TOKENS, LEARNING_RATE, MANY_STEPS = 8, 64, 1e-6, 100_000
PHASES = ("sample", "grade", "update")  # of ours; grading is the time it adds to sampling
SUMS = {"smollm2": [
    "A baker sells 24 rolls in the morning and twice as many in the afternoon. How many rolls does he sell that day?",
    "Lena has 3 boxes of 12 pencils. She gives 9 pencils to her brother and 4 to a friend. How many are left?",
    "A train travels 180 miles in 3 hours. At the same speed, how many miles does it travel in 7 hours?",
    "A shirt costs $40. It is reduced by 15% and then by another $5. What is its price now, in dollars?",
]}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """The settings of a case, other than model and prompts."""

    problems: int
    rows: int  # decoded at once by ours; TRL decodes all
    micro_batch_tokens: int  # ours
    trl_batch: int  # TRL's sequences per micro-batch


CASES = {"smollm2": Case(4, 64, 4096, 8), "wide128": Case(32, 256, 16_384, 64)}


def make_problems(case: str) -> list[Problem]:
    """Return the case's problems, from a fixed seed."""
    draw = random.Random(0)
    texts = SUMS.get(case) or [
        " + ".join(str(draw.randint(1, 99)) for _ in range(draw.randint(4, 12))) for _ in range(CASES[case].problems)
    ]
    return [Problem(id=f"{case}/{i}", text=text, answers=("1",)) for i, text in enumerate(texts)]


def reward(text: str) -> float:
    """Return a reward that any model gets about half of the time."""
    return float(sum(text.encode()) % 2)


def take_turns(row: dict) -> None:
    """Report a step (or that setup is done) to the parent, then wait for its next request; exit if there is none."""
    row |= {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}  # ru_maxrss is in KiB
    row |= {"cpu_seconds": time.process_time()}  # so far, all threads; a paused process spends none
    print(json.dumps({"turn": row}), flush=True)
    if not sys.stdin.readline():
        os._exit(0)  # skip saving the run


# ------------------------------------------------------------------------------------------------- the two sides


def run_ours(case: str, model: Path, scratch: Path, _: int) -> None:
    """Run train.py on a recipe of one stage."""
    import train
    from engine import distributed
    from engine.rollout_worker import RolloutWorker
    from engine.start import start_run
    from lab.metrics import Metrics
    from lab.recipe import Recipe, RlStage, SamplerSettings, to_toml

    @dataclass
    class ParityWorker(RolloutWorker):
        """Grade as usual, then replace the reward by the parity."""

        def attempt(self, *arguments, **options):
            groups, work = super().attempt(*arguments, **options)
            for attempt in chain.from_iterable(groups):
                attempt.grade = replace(attempt.grade, correct=reward(attempt.text))
            return groups, work

    class PacedMetrics(Metrics):
        """Hand over to the other side after each step."""

        def write(self, row: dict) -> None:
            super().write(row)
            assert not row["skipped"], "a step without an update is no measurement"
            names = ("seconds", "seconds_sample", "seconds_grade", "seconds_update", "tokens")
            take_turns({name: row[name] for name in names})

    settings = CASES[case]
    problems = make_problems(case)
    write_problems(problems, scratch / "problems.jsonl")
    stage = RlStage(
        data=str(scratch / "problems.jsonl"), steps=MANY_STEPS, batch_problems=settings.problems, group_size=GROUP,
        temperature=1.0, max_prompt_tokens=192, max_response_tokens=MOST_TOKENS, learning_rate=LEARNING_RATE,
    )  # fmt: skip
    recipe = Recipe(
        "step", str(model), (stage,), thinking=False, micro_batch_tokens=settings.micro_batch_tokens,
        recompute_activations=False, sampler=SamplerSettings(settings.rows, 256, 2 * settings.rows * 256),
    )  # fmt: skip
    (scratch / "recipe.toml").write_text(to_toml(recipe))
    launch = argparse.Namespace(recipe=scratch / "recipe.toml", set=[], out=scratch, resume=None)
    run = start_run(launch, distributed.start(), distributed.StopRequest())
    run.worker, run.metrics = ParityWorker(**vars(run.worker)), PacedMetrics(run.folder)
    # the filter and the temperature before the first step are not measured
    run.state.prepared, run.state.temperature, run.state.problem_ids = True, 1.0, [problem.id for problem in problems]
    take_turns({})
    train.rl_stage(run, 0, stage)


def run_trl(case: str, model: Path, scratch: Path, batch: int) -> None:
    """Run GRPOTrainer with the same settings."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from lab.recipe import Recipe

    tokens: list[int] = []

    def parity(completions: list, completion_ids: list[list[int]], **_: object) -> list[float]:
        tokens.append(sum(map(len, completion_ids)))
        return [reward(completion[0]["content"]) for completion in completions]

    class Paced(TrainerCallback):
        """Make a step, including its generation, then hand over to the other side."""

        def on_step_begin(self, *_: object, **__: object) -> None:
            self.begun = time.perf_counter()

        def on_step_end(self, *_: object, **__: object) -> None:
            seconds = time.perf_counter() - self.begun
            take_turns({"seconds": seconds, "tokens": tokens.pop()})

    sequences = CASES[case].problems * GROUP
    instruction = Recipe.instruction
    prompts = [[{"role": "user", "content": prompt_text(p, instruction)}] for p in make_problems(case)]
    settings = GRPOConfig(
        output_dir=str(scratch), use_cpu=True, bf16=False, fp16=False, gradient_checkpointing=False,
        max_steps=MANY_STEPS,
        per_device_train_batch_size=batch, gradient_accumulation_steps=sequences // batch, num_generations=GROUP,
        max_completion_length=MOST_TOKENS, temperature=1.0, top_p=1.0, top_k=0, beta=0.0, num_iterations=1,
        loss_type="dapo", scale_rewards="group", epsilon=0.2, epsilon_high=0.28, learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant", adam_beta2=0.999, weight_decay=0.01, max_grad_norm=1.0, save_strategy="no",
        logging_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), parity, settings,
        Dataset.from_dict({"prompt": prompts}), processing_class=AutoTokenizer.from_pretrained(model),
        callbacks=[Paced()],
    )  # fmt: skip
    take_turns({})
    trainer.train()


# ------------------------------------------------------------------------------------------------- the comparison


class Side:
    """One of the two sides, in a separate process."""

    def __init__(self, name: str, case: str, model: Path, threads: int, batch: int = 0):
        self.name, self.rows = name, []
        self.scratch = tempfile.TemporaryDirectory()
        self.errors = open(Path(self.scratch.name, "errors.txt"), "w+")
        command = [sys.executable, __file__, "--side", name, "--case", case, "--model", model, "--batch", batch]
        # hide GPUs: TRL has `use_cpu`, train.py would use one
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [*map(str, command), "--scratch", self.scratch.name], env=environment, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self.errors,
        )  # fmt: skip
        self.cpu_seconds = self._answer()["cpu_seconds"]

    def _answer(self) -> dict:
        for line in self.process.stdout:
            if line.startswith('{"turn": '):
                return json.loads(line)["turn"]
        self.errors.seek(0)
        sys.exit(f"step.py: {self.name} ended early:\n{self.errors.read()[-3000:]}")

    def step(self) -> dict:
        """Make one step; return its measurements."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        row = self._answer()
        self.cpu_seconds, row["cpu_seconds"] = row["cpu_seconds"], row["cpu_seconds"] - self.cpu_seconds
        self.rows.append(row)
        return row

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()
        self.errors.close()
        self.scratch.cleanup()

    def best(self) -> dict:
        """Return the fastest step after the warm-up, with the mean number of tokens of all of them."""
        counted = self.rows[1:]
        tokens = sum(row["tokens"] for row in counted) / len(counted)
        return min(counted, key=lambda row: row["seconds"]) | {"tokens": tokens}


def write_wide128(folder: Path) -> Path:
    """Write bench/sampler.py's 128-wide Qwen3 with a tokenizer of 64 tokens, all but five single characters."""
    from sampler import WIDE128
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from lab.arithmetic import CHAT_TEMPLATE, SPECIAL
    from model import Transformer, initialise, parse_config, save

    words = [*SPECIAL, "<|unknown|>", *"abcdefghijklmnopqrstuvwxyzL'\\{}()[]0123456789 +-*/=.,;:?!_"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"), decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIAL[0], pad_token=SPECIAL[0], unk_token="<|unknown|>",
        additional_special_tokens=list(SPECIAL[1:]), chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder / "tokenizer")  # fmt: skip
    assert len(words) == WIDE128["vocab_size"], len(words)
    config = WIDE128 | {"model_type": "qwen3", "rope_theta": 10_000.0, "rms_norm_eps": 1e-6}
    model = Transformer(parse_config(config | {"eos_token_id": 0, "pad_token_id": 0}, "wide128"))
    initialise(model, seed=0)
    # a token with a larger embedding tends to repeat, so responses get longer: 47 tokens on average
    model.lm_head.weight.data.mul_(1.65)
    save(model, folder / "model", tokenizer_from=folder / "tokenizer")
    return folder / "model"


def compare(case: str, model: Path, rounds: int, threads: int, batches: list[int]) -> dict:
    """Measure both sides alternately; of TRL's batch sizes the fastest counts."""
    sides = [Side("ours", case, model, threads)]
    try:
        sides += [Side("trl", case, model, threads, batch) for batch in batches]
        for turn in range(rounds + 1):
            for side, batch in zip(sides, [0, *batches], strict=True):
                row = side.step()
                label = (
                    f"{case}, {f'round {turn}' if turn else 'warm-up'}: {side.name}{f', batch {batch}' * bool(batch)}"
                )
                parts = "".join(f", {p} {row[f'seconds_{p}']:.2f}" for p in PHASES if side.name == "ours")
                took = f"{row['seconds']:.2f} s ({row['cpu_seconds']:.2f} of CPU){parts}"
                print(f"{label}: {took}, {row['tokens']:,} tokens", flush=True)
    finally:
        for side in sides:
            side.close()
    theirs, batch = min(((s.best(), b) for s, b in zip(sides[1:], batches, strict=True)), key=lambda x: x[0]["seconds"])
    ours = sides[0].best()
    return {"ours": ours, "trl": theirs | {"batch": batch}, "ratio": theirs["seconds"] / ours["seconds"]}


def main() -> None:
    """Run the cases and print the table, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model folder, for the case smollm2")
    parser.add_argument("--case", action="append", choices=list(CASES), help="default: all")
    parser.add_argument("--rounds", type=int, default=3, help="measured steps of each side")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--batch", type=int, action="append", help="TRL's sequences per micro-batch; repeat it to use the fastest"
    )
    for hidden in ("--side", "--scratch"):  # used to start a side's process
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        side = {"ours": run_ours, "trl": run_trl}[arguments.side]
        return side(arguments.case[0], arguments.model, Path(arguments.scratch), arguments.batch[0])
    names = arguments.case or (list(CASES) if arguments.model else ["wide128"])
    if "smollm2" in names and arguments.model is None:
        parser.error("the case smollm2 needs --model")
    if any(batch < 1 or CASES[name].problems * GROUP % batch for name in names for batch in arguments.batch or []):
        parser.error("--batch must divide the sequences of a step: 32 of smollm2, 256 of wide128")
    if importlib.util.find_spec("trl") is None:
        sys.exit("step.py: the package trl is not installed: pip install -r bench/requirements.txt")
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            model = write_wide128(Path(scratch)) if name == "wide128" else arguments.model.resolve()
            batches = arguments.batch or [CASES[name].trl_batch]
            results[name] = compare(name, model, arguments.rounds, arguments.threads, batches)
    rows = [["case", "ours s", *PHASES, "TRL s", "ratio", "tokens, TRL's", "GiB, TRL's"]]
    for name, found in results.items():
        ours, trl = found["ours"], found["trl"]
        rows.append([
            name, f"{ours['seconds']:.2f}", *(f"{ours[f'seconds_{phase}']:.2f}" for phase in PHASES),
            f"{trl['seconds']:.2f}", f"{found['ratio']:.2f}", f"{ours['tokens']:,.0f}, {trl['tokens']:,.0f}",
            f"{ours['peak_gib']:.2f}, {trl['peak_gib']:.2f}",
        ])  # fmt: skip
    print(text_table(rows))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
