"""How good is a model? avg@k with honest intervals, lengths, truncation; and the temperature that diversity asks for.

    python eval.py MODEL --data FILE [--data FILE ...] -n 8 --temperature 1.4 --top-k 20 --max-tokens 8192 --yarn 1.5

Prints one line per file and writes every response, with its verdict, to OUT/responses.jsonl as well as the figures
to OUT/results.json.
"""

import argparse
import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

import device as devices
from attempts import Attempt, Respondent, load_tokenizer, stop_tokens
from data_filter import INSTRUCTION, DataError, Problem, read_problems
from model import ModelError, extend_window, load, resolve_folder
from reward import Grader
from rollout import CacheLimits, RolloutError, Sampling, cache_bytes_per_token, distinct_ngrams

NORMAL_95 = 1.959964  # half the width of a 95% interval in standard errors


@dataclass(frozen=True)
class Evaluation:
    """Figures of n attempts at each problem of a set; shares are of all attempts."""

    name: str
    problems: int
    n: int
    temperature: float
    avg: float  # avg@n
    low: float  # 95% interval of avg, problems being the sampling unit
    high: float
    by_type: dict[str, float]
    length_mean: float  # tokens
    truncated_share: float
    no_box_share: float
    distinct4: float | None
    tokens: int
    verdicts: dict[str, int]


def interval(problem_means: Sequence[float]) -> tuple[float, float]:
    """95% interval of the mean of problems' means, clustered by problem, within [0, 1]."""
    means = np.asarray(problem_means, dtype=float)
    if len(means) < 2:
        return 0.0, 1.0  # one problem says nothing about the next
    half = NORMAL_95 * means.std(ddof=1) / math.sqrt(len(means))
    return max(0.0, float(means.mean() - half)), min(1.0, float(means.mean() + half))


def summarise(
    name: str, problems: Sequence[Problem], groups: Sequence[Sequence[Attempt]], temperature: float
) -> Evaluation:
    """The figures of graded attempts."""
    means = [float(np.mean([attempt.grade.correct for attempt in group])) for group in groups]
    by_type: dict[str, list[float]] = defaultdict(list)
    for problem, mean in zip(problems, means, strict=True):
        by_type[problem.type].append(mean)
    attempts = [attempt for group in groups for attempt in group]
    low, high = interval(means)
    return Evaluation(
        name=name,
        problems=len(problems),
        n=len(groups[0]),
        temperature=temperature,
        avg=float(np.mean(means)),
        low=low,
        high=high,
        by_type={kind: float(np.mean(values)) for kind, values in sorted(by_type.items()) if kind},
        length_mean=float(np.mean([len(attempt.rollout.tokens) for attempt in attempts])),
        truncated_share=float(np.mean([attempt.rollout.finish_reason == "length" for attempt in attempts])),
        no_box_share=float(np.mean([attempt.grade.answer is None for attempt in attempts])),
        distinct4=distinct_ngrams([[attempt.text for attempt in group] for group in groups])[0],
        tokens=sum(len(attempt.rollout.tokens) for attempt in attempts),
        verdicts=dict(Counter(attempt.grade.verdict for attempt in attempts)),
    )


def evaluate(
    respondent: Respondent, name: str, problems: Sequence[Problem], n: int, sampling: Sampling, label: str | None = None
) -> tuple[Evaluation, list[list[Attempt]]]:
    """n attempts at every problem, and their figures. Every process calls it and gets the same."""
    groups, _ = respondent.attempt(problems, n, sampling, label)
    return summarise(name, problems, groups, sampling.temperature), groups


# ------------------------------------------------------------------------------------ temperature and diversity


@dataclass(frozen=True)
class TemperaturePoint:
    """Accuracy and diversity at one temperature."""

    temperature: float
    accuracy: float
    distinct4: float | None


def measure_temperature(
    respondent: Respondent, problems: Sequence[Problem], n: int, sampling: Sampling
) -> TemperaturePoint:
    """Accuracy and distinct-4 of n attempts at each problem, at the temperature that `sampling` has."""
    found, _ = evaluate(respondent, "temperature", problems, n, sampling)
    return TemperaturePoint(sampling.temperature, found.avg, found.distinct4)


def match_diversity(
    respondent: Respondent,
    problems: Sequence[Problem],
    n: int,
    sampling: Sampling,
    target: float,
    step: float = 0.05,
    most: float = 2.0,
) -> tuple[float, list[TemperaturePoint]]:
    """Search upward from sampling.temperature for the first that restores a diversity score (RECIPE.md section 2).

    Returns it with every point measured. When none up to `most` does, the most diverse one measured is returned
    and said so.
    """
    curve: list[TemperaturePoint] = []
    above = int(math.floor((most - sampling.temperature) / step + 1e-9))
    for i in range(max(0, above) + 1):  # the first is measured even beyond `most`
        temperature = round(sampling.temperature + i * step, 6)
        point = measure_temperature(respondent, problems, n, replace(sampling, temperature=temperature))
        curve.append(point)
        if point.distinct4 is not None and point.distinct4 >= target:
            return temperature, curve
    best = max(curve, key=lambda point: point.distinct4 or 0.0)
    respondent.device.say(
        f"warning: no temperature up to {most} restores distinct-4 = {target:.3f}; "
        f"going on with {best.temperature} ({best.distinct4 or 0:.3f})"
    )
    return best.temperature, curve


# ----------------------------------------------------------------------------------------------- command line


def print_evaluation(found: Evaluation) -> None:
    """One line, and one per type where there are several."""
    print(
        f"{found.name}: avg@{found.n} {100 * found.avg:.1f} (95% {100 * found.low:.1f} to {100 * found.high:.1f}) over "
        f"{found.problems} problems, mean length {found.length_mean:,.0f}, truncated {found.truncated_share:.1%}, "
        f"no box {found.no_box_share:.1%}, {found.verdicts}"
    )
    if len(found.by_type) > 1:
        print("  " + ", ".join(f"{kind} {100 * accuracy:.1f}" for kind, accuracy in found.by_type.items()))


def main() -> None:
    """Evaluate a model on files of problems."""
    parser = argparse.ArgumentParser(description="avg@k of a model on any file of problems that the reader knows.")
    parser.add_argument("model", help="a model folder or hub id")
    parser.add_argument("--data", action="append", required=True, help="a file of problems or a hub data set")
    parser.add_argument("-n", type=int, default=8, help="responses per problem")
    parser.add_argument("--temperature", type=float, default=1.4)
    parser.add_argument("--top-k", type=int, default=20, help="0 is off")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--max-tokens", type=int, default=8192, help="of a response")
    parser.add_argument("--yarn", type=float, metavar="FACTOR", help="lengthen the model's window by this factor")
    parser.add_argument("--original-window", type=int, help="the window that YaRN lengthens (the config's)")
    parser.add_argument("--no-thinking", action="store_true", help="the model does not think: the box alone counts")
    parser.add_argument("--instruction", default=INSTRUCTION, help="appended to problems that do not carry it")
    parser.add_argument("--rows", type=int, default=64, help="sequences decoded at once")
    parser.add_argument("--cache-tokens", type=int, help="of all sequences together (default: every row full)")
    parser.add_argument("--limit", type=int, help="only the first so many problems of each file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/eval"), help="a new folder for the results")
    arguments = parser.parse_args()
    if min(arguments.n, 1 if arguments.limit is None else arguments.limit) < 1:
        parser.error("-n and --limit must be at least 1")
    out = None
    try:
        sets = {source: read_problems(source)[: arguments.limit] for source in arguments.data}
        here = devices.start()
        folder = resolve_folder(arguments.model)
        model = load(folder, here.device, here.compute_dtype)
        if arguments.yarn is not None:
            model.config = extend_window(model.config, arguments.yarn, arguments.original_window)
            model.set_rope(model.config.rope)
        tokenizer = load_tokenizer(folder, model)
        window = min(model.config.max_position_embeddings, arguments.max_tokens + 4096)
        page = 256 if here.device.type == "cuda" else window
        fits = (arguments.rows + 2) * window  # every row full
        if here.device.type == "cuda":  # or what two thirds of the free memory hold; rows that do not fit wait
            free, _ = torch.cuda.mem_get_info()
            fits = min(fits, int(free * 2 / 3) // cache_bytes_per_token(model.config, here.compute_dtype))
        limits = CacheLimits(arguments.cache_tokens or fits, page, arguments.rows)
        sampling = Sampling(
            arguments.temperature, arguments.max_tokens, stop_tokens(tokenizer, model, folder), arguments.seed,
            top_k=arguments.top_k, top_p=arguments.top_p,
        )  # fmt: skip
        with Grader(thinking=not arguments.no_thinking) as grader:
            respondent = Respondent(model, tokenizer, sampling.stop_tokens, limits, grader, here, arguments.instruction)
            if here.is_main:
                arguments.out.mkdir(parents=True, exist_ok=False)
                out = arguments.out
            results = []
            for source, problems in sets.items():
                found, groups = evaluate(respondent, source, problems, arguments.n, sampling, label=source)
                results.append(asdict(found))
                if here.is_main:
                    print_evaluation(found)
                    write_responses(out / "responses.jsonl", source, groups)
        if here.is_main:
            (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
            print(f"results in {out}")
    except FileExistsError:
        sys.exit(f"eval.py: {arguments.out} exists already; give another --out")
    except (ModelError, DataError, RolloutError) as error:
        if out is not None and not any(out.iterdir()):
            out.rmdir()  # the next try may have the name
        sys.exit(f"eval.py: {error}")
    finally:
        devices.stop()


def write_responses(path: Path, source: str, groups: Sequence[Sequence[Attempt]]) -> None:
    """Append every response with its verdict, for people to read."""
    with path.open("a") as file:
        for attempt in (attempt for group in groups for attempt in group):
            rollout, grade = attempt.rollout, attempt.grade
            row = {
                "data": source,
                "problem_id": rollout.problem_id,
                "sample": rollout.index,
                "tokens": len(rollout.tokens),
                "finish_reason": rollout.finish_reason,
                "verdict": grade.verdict,
                "answer": grade.answer,
                "response": attempt.text,
            }
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
