"""Does YaRN carry a pretrained model beyond its window? Loss by position and needles, plain and scaled.

    python bench/smollm2.py models/smollm2-135m
    python bench/long_texts.py models/smollm2-135m DATA/gsm8k/train.jsonl DATA/math/aime_1983_2023.json

Every text is 16,384 tokens of a file: the strings of consecutive rows (.jsonl, .json), or the file as it is. Facts
("The secret number of Oslo is 4819.") stand at 5 depths before each of three sections of questions, which end at 8,000,
12,000 and 16,384 tokens; each section has facts of its own, so nothing can be copied from an earlier one. A sixth fact
stands right before its section: the control, which also shows the form. One forward per text and arm gives the loss of
every token that is neither fact nor question, and the log-probs and greedy tokens of the answers, with teacher forcing.

An arm is "plain" or a YaRN factor, with "+" for its attention temperature (0.1 ln s + 1, arXiv 2309.00071). Finished
forwards are appended to OUT/results.jsonl, text by text; the same command continues. A forward takes two minutes on two
idle cores. Tables are printed with paired differences to plain and Student's 95% intervals; OUT/long-texts.svg is the
figure, and --tables makes both from what is finished.
"""

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine.errors import UserError  # noqa: E402
from engine.files import write_atomically  # noqa: E402
from engine.tokenizer import encode, load_tokenizer  # noqa: E402
from eval import student_95  # noqa: E402
from lab import charts  # noqa: E402
from lab.console import format_eta  # noqa: E402
from model import Packed, TokenLogprobs, Transformer, extend_window, load  # noqa: E402

LENGTH, BAND, ENDS, DEPTHS = 16_384, 512, (8_000, 12_000, 16_384), (0.1, 0.3, 0.5, 0.7, 0.9)
ARMS = ("plain", "1.5", "1.5+", "2", "4", "2+", "4+")
CITIES = """Paris London Berlin Madrid Rome Vienna Tokyo Cairo Boston Chicago Dublin Lisbon Moscow Oslo Delhi Athens
Seoul Lima""".split()
FACT = "\n\nThe secret number of {0} is {1}.\n\n"
QUESTION = "\n\nWhat is the secret number of {0}? The secret number of {0} is {1}."
DIGITS = 4  # of a number; each is a token
COLUMNS = (0, 2048, 8192, 9216, 10240, 11264, 12288, 14336, 16384)  # of the table; multiples of BAND


@dataclass(frozen=True)
class Needle:
    """A question: the end of its section, the depth of its fact (1.0: the control), the place of its first digit."""

    end: int
    depth: float
    start: int


def read_filler(path: Path) -> str:
    """Return a file's text; of rows (.jsonl, .json) their strings, two line breaks between rows."""
    text = path.read_text(encoding="utf-8")
    if path.suffix not in (".jsonl", ".json"):
        return text
    rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines() if line]
    return "\n\n".join("\n".join(value for value in row.values() if isinstance(value, str)) for row in rows)


def build(
    filler: Sequence[int], ends: Sequence[int], encoded: Callable[[str], list[int]], rng: random.Random
) -> tuple[list[int], list[bool], list[Needle]]:
    """Return a text of ends[-1] tokens, which of them are filler, and its needles in the order of their questions."""
    cities, inserts, needles = rng.sample(CITIES, len(CITIES)), [], []
    for end in ends:
        numbers = {cities.pop(): f"{rng.randrange(10 ** (DIGITS - 1), 10**DIGITS)}" for _ in (1.0, *DEPTHS)}
        section, starts = encoded(FACT.format(*next(iter(numbers.items())))), []
        for city, value in numbers.items():
            before, after = QUESTION.format(city, "|").split("|")
            section += encoded(before)
            starts.append(len(section))
            section += encoded(value) + encoded(after)
        inserts.append((end - len(section), section))
        for depth, start, fact in zip((1.0, *DEPTHS), starts, numbers.items(), strict=True):
            needles.append(Needle(end, depth, end - len(section) + start))
            if depth < 1:
                inserts.append((round(depth * end), encoded(FACT.format(*fact))))
    tokens, is_filler, used = [], [], 0
    for place, insert in sorted(inserts):
        count = place - len(tokens)
        if count < 0:
            raise UserError(f"a fact or a section at token {place} of the text overlaps the one before it")
        tokens += [*filler[used : used + count], *insert]
        is_filler += [True] * count + [False] * len(insert)
        used += count
    return tokens, is_filler, needles


def band_means(losses: np.ndarray, counted: np.ndarray, band: int) -> list[float]:
    """Return the mean loss of the counted tokens in each band of positions; losses and counted are (T,)."""
    edges = np.arange(0, len(losses), band)
    return (np.add.reduceat(losses * counted, edges) / np.add.reduceat(counted.astype(float), edges)).tolist()


@torch.no_grad()
def measure(model: Transformer, text: tuple[list[int], list[bool], list[Needle]], arm: str) -> dict:
    """Return loss by band (nats per token) and the needles (nats per digit, digits that are right greedily)."""
    config, (tokens, is_filler, needles) = model.config, text
    if arm != ARMS[0]:
        factor = float(arm.removesuffix("+"))
        config = extend_window(config, factor, attention_factor=0.1 * math.log(factor) + 1 if "+" in arm else 1.0)
    model.set_rope(config.rope)
    row = torch.tensor(tokens)  # (T,)
    hidden = model.hidden(row, Packed([len(row)]))  # (T, C)
    ones = torch.ones(len(row) - 1)
    logprobs = TokenLogprobs.apply(hidden[:-1], model.lm_head.weight, row[1:], ones, True)  # (T - 1,)
    places = torch.tensor([range(needle.start - 1, needle.start - 1 + DIGITS) for needle in needles])
    right = model.logits(hidden[places]).argmax(-1) == row[places + 1]  # (needles, DIGITS)
    losses = np.pad(-logprobs.double().numpy(), (1, 0))  # at the position of the predicted token
    digits = -logprobs[places].mean(1)
    return {
        "loss": band_means(losses, np.array([False, *is_filler[1:]]), BAND),
        "needles": [
            vars(needle) | {"nats": nats, "right": count}
            for needle, nats, count in zip(needles, digits.tolist(), right.sum(1).tolist(), strict=True)
        ],
    }


def with_interval(values: Sequence[float], form: str) -> str:
    """Return a mean with Student's 95% interval over values; the mean alone for a single value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:{form}}"
    half = student_95(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return f"{mean:{form}} ({mean - half:{form}} to {mean + half:{form}})"


def lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows]) + "\n"


def tables(rows: list[dict]) -> str:
    """Return the tables: loss by band, its differences to plain over texts, and the needles by section."""
    found = {(row["text"], row["arm"]): row for row in rows}
    texts, arms = (list(dict.fromkeys(row[key] for row in rows)) for key in ("text", "arm"))
    spans = list(zip(COLUMNS, COLUMNS[1:], strict=False))
    head = [f"{len(texts)} texts", *(f"{start:,} to {end:,}" for start, end in spans)]

    def losses(arm: str, start: int, end: int) -> dict[str, float]:
        return {
            t: float(np.mean(found[t, arm]["loss"][start // BAND : end // BAND])) for t in texts if (t, arm) in found
        }

    def differences(arm: str, other: str, start: int, end: int) -> list[float]:
        base, own = losses(other, start, end), losses(arm, start, end)
        return [own[text] - base[text] for text in own if text in base]

    def needles(arm: str, key: str, end: int) -> list[float]:
        own = [n for t in texts if (t, arm) in found for n in found[t, arm]["needles"]]
        return [needle[key] for needle in own if needle["end"] == end and needle["depth"] < 1]

    loss = [[arm, *(f"{np.mean(list(losses(arm, *span).values())):.3f}" for span in spans)] for arm in arms]
    pairs = [(arm, ARMS[0]) for arm in arms[1:]] + [(arm, arm[:-1]) for arm in arms if arm.endswith("+")]
    gain = [
        [f"{arm} minus {other}", *(with_interval(differences(arm, other, *span), "+.3f") for span in spans)]
        for arm, other in pairs
    ]
    cells = []
    for arm in arms:
        hits = [np.mean([right == DIGITS for right in needles(arm, "right", end)]) for end in ENDS]
        cells.append(
            [arm, *(with_interval(needles(arm, "nats", end), ".2f") for end in ENDS), *(f"{h:.0%}" for h in hits)]
        )
    asked = ["needle", *(f"nats a digit at {e:,}" for e in ENDS), *(f"all digits right at {e:,}" for e in ENDS)]
    return "\n".join([lines(head, loss), lines(["differences", *head[1:]], gain), lines(asked, cells)])


def draw(rows: list[dict], path: Path) -> None:
    """Draw loss by position and needles by section: means over the texts that every arm has."""
    arms = [arm for arm in ARMS if any(row["arm"] == arm for row in rows)]
    whole = {t for t in {row["text"] for row in rows} if sum(row["text"] == t for row in rows) == len(arms)}
    loss, needle = {}, {}
    for arm in arms:
        own = [row for row in rows if row["arm"] == arm and row["text"] in whole]
        label = arm if arm == ARMS[0] else f"YaRN {arm.replace('+', ', temperature')}"
        means = np.mean([row["loss"] for row in own], axis=0)
        loss[label] = [(BAND * (i + 0.5), float(mean)) for i, mean in enumerate(means)]
        asked = [n for row in own for n in row["needles"] if n["depth"] < 1]
        needle[label] = [(end, float(np.mean([n["nats"] for n in asked if n["end"] == end]))) for end in ENDS]
    options = {"kind": "level", "rules": [(8192, "trained window")], "smooth": False, "x_label": "position, tokens"}
    title = "SmolLM2-135M beyond its window of 8,192 tokens"
    parts = [{"title": "loss, nats a token", "series": loss} | options]
    parts.append({"title": "needle, nats a digit (guessing: 2.30)", "series": needle} | options)
    text = charts.svg(charts.panels(title, parts, len(parts)))
    write_atomically(path, [text.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1).encode()])


def main() -> None:
    """Measure what is not finished, then print the tables and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a model folder")
    parser.add_argument(
        "files", type=Path, nargs="+", help="rows or texts; text i of each file before text i + 1 of any"
    )
    parser.add_argument("--texts", type=int, default=2, help="texts of each file")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--out", type=Path, default=Path("runs/long-texts"))
    parser.add_argument("--tables", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    results = arguments.out / "results.jsonl"
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in results.open()] if results.exists() else []
    jobs = [(f"{path.stem}-{i}", path, i) for i in range(arguments.texts) for path in arguments.files]
    done = {(row["text"], row["arm"]) for row in rows}
    todo = [(*job, arm) for job in jobs for arm in arguments.arms if (job[0], arm) not in done]
    if todo and not arguments.tables:
        model = load(arguments.model).requires_grad_(False)
        tokenizer, fillers, begun = load_tokenizer(arguments.model, model), {}, time.perf_counter()
        for count, (name, path, i, arm) in enumerate(todo):
            if path not in fillers:
                fillers[path] = encode(tokenizer, read_filler(path))
            filler = fillers[path][i * LENGTH : (i + 1) * LENGTH]
            if len(filler) < LENGTH:
                raise UserError(f"{path} has {len(fillers[path]):,} tokens, too few for text {i}: give fewer --texts")
            text = build(filler, ENDS, lambda part: encode(tokenizer, part), random.Random(name))
            rows.append({"text": name, "arm": arm} | measure(model, text, arm))
            with results.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            left = (time.perf_counter() - begun) / (count + 1) * (len(todo) - count - 1)
            late = np.mean(rows[-1]["loss"][-4:])
            print(
                f"{count + 1}/{len(todo)} {name} {arm}: loss {late:.3f} at the end  ETA {format_eta(left)}", flush=True
            )
    print(tables(rows))
    draw(rows, arguments.out / "long-texts.svg")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"long_texts.py: {error}")
