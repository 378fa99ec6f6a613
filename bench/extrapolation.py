"""Does YaRN help beyond the trained window? The same problems at later positions of longer prompts.

    python bench/extrapolation.py runs/tiny                      # a finished run of recipes/tiny.toml
    python bench/extrapolation.py runs/tiny --window 128 --ratios 1 1.5 2
    python bench/extrapolation.py runs/tiny-*                    # several seeds: their means as well

Difficulty must not grow with length, or a floor hides the effect. So the sums stay the same (the run's world/
beyond-window set without its filler), and filler tokens are added before each until prompt and correct response end at
RATIO x the trained window. Each ratio is evaluated without scaling and with YaRN at beta_fast 32 (the default) and 2,
each alone and with its attention temperature (0.1 ln s + 1, arXiv 2309.00071); s is the ratio. Inside the window s is
1.5, to show what scaling costs there.

The scores are avg@8 with 95% intervals over problems. The figures are also written to RUN/extrapolation.json; a run
that has them is not measured again. Means over runs have Student's 95% intervals, differences are paired by run.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine import distributed  # noqa: E402
from engine.files import write_atomically  # noqa: E402
from engine.grader import Grader  # noqa: E402
from engine.rollout_worker import RolloutWorker  # noqa: E402
from engine.run import EVALUATION_DRAW  # noqa: E402
from engine.tokenizer import encode, load_tokenizer, read_chat, stop_tokens  # noqa: E402
from eval import evaluate, student_95  # noqa: E402
from lab.arithmetic import FILLER  # noqa: E402
from lab.problems import Problem, read_problems  # noqa: E402
from lab.recipe import load_recipe  # noqa: E402
from lab.scores import summarise  # noqa: E402
from model import ModelConfig, extend_window, load  # noqa: E402
from rollout import CacheLimits, Sampling  # noqa: E402

WINDOW, RATIOS = 128, (0.75, 1.0, 1.25, 1.5, 2.0)  # tokens; 0.75 ends inside the trained positions
INSIDE_FACTOR, SAMPLES, ROWS, SPARE_ROWS = 1.5, 8, 256, 64
BETAS = {f"beta_fast {beta:g}{text}": (beta, text) for beta in (32.0, 2.0) for text in ("", ", attention temperature")}
SETTINGS = ("no scaling", *BETAS)


def lengthen(problem: Problem, worker: RolloutWorker, end: int) -> Problem:
    """Return the sum after enough filler for prompt and correct response to end at token `end`, or without filler."""
    bare = replace(problem, text=problem.text.replace(FILLER, ""))
    own = len(worker.prompt(bare, 1).tokens) + len(encode(worker.chat.tokenizer, problem.solution)) + 1  # the stop
    return replace(bare, text=FILLER * max(0, end - own) + bare.text)


def scaled(config: ModelConfig, setting: str, ratio: float, window: int, longest: int) -> ModelConfig:
    """Return the config of a setting at a ratio, with a window of `longest` tokens; only rotary scaling differs."""
    if setting != SETTINGS[0]:
        factor, (beta_fast, temperature) = ratio if ratio > 1 else INSIDE_FACTOR, BETAS[setting]
        config = extend_window(config, factor, window, 0.1 * math.log(factor) + 1 if temperature else 1.0, beta_fast)
    return replace(config, max_position_embeddings=longest)


def measure(folder: Path, window: int, ratios: list[float]) -> list[dict]:
    """Return one row for each ratio and setting."""
    recipe, processes = load_recipe(folder / "recipe.toml"), distributed.start()
    trained = folder / f"stage-{len(recipe.stage) - 1}"
    held_out = folder / recipe.eval.data if recipe.eval.data.startswith("world/") else Path(recipe.eval.data)
    problems = read_problems(held_out.with_name("beyond-window.jsonl"))
    model = load(trained, processes.device, processes.compute_dtype)
    plain, chat = model.config, read_chat(load_tokenizer(trained, model), recipe.thinking)
    stops, rows = stop_tokens(chat, model, trained), []
    sampling = Sampling(1.0, recipe.eval.max_response_tokens, stops, recipe.seed, EVALUATION_DRAW)
    with Grader(1, thinking=chat.thinking) as grader:
        for ratio in ratios:
            worker = RolloutWorker(model, chat, stops, None, grader, processes, recipe.instruction)
            later = [lengthen(problem, worker, round(ratio * window)) for problem in problems]
            longest = max(len(worker.prompt(problem, 1).tokens) for problem in later) + sampling.max_new_tokens
            worker.limits = CacheLimits((ROWS + SPARE_ROWS) * longest, longest, ROWS)
            for setting in SETTINGS:
                model.config = scaled(plain, setting, ratio, window, longest)
                model.set_rope(model.config.rope)
                groups = evaluate(worker, setting, later, SAMPLES, sampling, f"{ratio:g}x, {setting}")
                found = summarise(setting, later, groups, sampling.temperature, sampling.max_new_tokens)
                row = {"ratio": ratio, "setting": setting} | {k: getattr(found, k) for k in ("avg", "low", "high")}
                rows.append(row | {"length_mean": found.length_mean, "truncated_share": found.truncated_share})
                print(f"{ratio:g}x, {setting}: {cell(rows[-1])}", flush=True)
    distributed.stop()
    return rows


def cell(row: dict) -> str:
    """Return accuracy in percent with its interval."""
    return f"{100 * row['avg']:.1f} ({100 * row['low']:.1f} to {100 * row['high']:.1f})"


def table(rows: list[dict], window: int) -> str:
    """Return a Markdown table with a row per setting and a column per length."""
    ratios = list(dict.fromkeys(row["ratio"] for row in rows))
    cells = {(row["ratio"], row["setting"]): cell(row) for row in rows}
    lines = [["avg@8, ending at", *(f"{ratio:g}x = {ratio * window:.0f} tokens" for ratio in ratios)]]
    return markdown(lines + [[name, *(cells[ratio, name] for ratio in ratios)] for name in SETTINGS])


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the half width of its 95% interval by Student's t, infinite for one value."""
    n = len(values)
    if n < 2:
        return float(np.mean(values)), math.inf
    return float(np.mean(values)), float(student_95(n - 1) * np.std(values, ddof=1) / math.sqrt(n))


def with_interval(values: Sequence[float], signed: bool = False) -> str:
    """Format the mean of shares in percent with its t interval."""
    mean, half = t_interval(values)
    sign = "+" if signed else ""
    if half == math.inf:
        return f"{100 * mean:{sign}.1f}"
    return f"{100 * mean:{sign}.1f} ({100 * (mean - half):{sign}.1f} to {100 * (mean + half):{sign}.1f})"


def markdown(rows: list[list[str]]) -> str:
    """Return rows of cells, the first a header, as Markdown."""
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def means(runs: Sequence[dict[tuple[str, float], float]], window: int) -> str:
    """Return a table of means over runs, each avg@8 by setting and ratio, and of paired differences."""
    ratios = sorted({ratio for row in runs for _, ratio in row})
    lines = [[f"avg@8, {len(runs)} seeds, ending at", *(f"{r:g}x = {r * window:.0f}" for r in ratios)]]
    for name in SETTINGS:
        lines.append([name, *(with_interval([row[name, r] for row in runs]) for r in ratios)])
    pairs = [(name, SETTINGS[0], "none") for name in SETTINGS[1:]] + [(SETTINGS[4], SETTINGS[3], SETTINGS[3])]
    for name, other, words in pairs:
        gains = ([row[name, r] - row[other, r] for row in runs] for r in ratios)
        lines.append([f"{name}, minus {words}", *(with_interval(gain, signed=True) for gain in gains)])
    return markdown(lines)


def main() -> None:
    """Measure the runs, and print a table and one line of JSON for each, then the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="the folders of finished runs in the laptop world")
    parser.add_argument("--window", type=int, default=WINDOW, help="the trained window, in tokens")
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS))
    arguments = parser.parse_args()
    found = {}
    for run in arguments.runs:
        path = run / "extrapolation.json"
        if not path.exists():
            rows = measure(run, arguments.window, arguments.ratios)
            text = json.dumps({"run": run.name, "window": arguments.window, "rows": rows})
            write_atomically(path, [text.encode()])
        text = path.read_text()
        rows = json.loads(text)["rows"]
        found[run] = {(row["setting"], row["ratio"]): row["avg"] for row in rows}
        print(f"{run.name}\n{table(rows, arguments.window)}\n{text}\n")
    if len(found) > 1:
        print(means(list(found.values()), arguments.window))


if __name__ == "__main__":
    main()
