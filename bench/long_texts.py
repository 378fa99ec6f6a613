"""Does YaRN carry a pretrained model beyond its window? Loss by position and needles, plain and scaled.

    python bench/smollm2.py models/smollm2-135m
    python bench/long_texts.py models/smollm2-135m DATA/gsm8k/train.jsonl DATA/math/aime_1983_2023.json

Every text is 16,384 tokens of a file: the strings of consecutive rows (.jsonl, .json), or the file as it is. Facts
("The secret number of Oslo is 4819.") stand at 5 depths before each of three sections of questions, which end at 8,000,
12,000 and 16,384 tokens; a section has facts of its own, so nothing is copied from an earlier one, and begins with one
more, the control. One forward per text and arm gives the loss of every token that is neither fact nor question, and the
log-probs and greedy tokens of the answers, with teacher forcing.

An arm is "plain" or a YaRN factor, with "+" for its attention temperature (0.1 ln s + 1, arXiv 2309.00071). Finished
forwards, of two minutes on two idle cores, are appended to OUT/results.jsonl, text by text; the same command continues,
--texts 0 prints what there is. Intervals (Student's 95%) are over bands of 512 tokens and needles, so for these texts.
"""

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
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

WINDOW, LENGTH, BAND, ENDS, DEPTHS = 8_192, 16_384, 512, (8_000, 12_000, 16_384), (0.1, 0.3, 0.5, 0.7, 0.9)
ARMS = ("plain", "1.5", "1.5+", "2", "4", "2+", "4+")
CITIES = """Paris London Berlin Madrid Rome Vienna Tokyo Cairo Boston Chicago Dublin Lisbon Moscow Oslo Delhi Athens
Seoul Lima""".split()
FACT = "\n\nThe secret number of {0} is {1}.\n\n"
QUESTION = "\n\nWhat is the secret number of {0}? The secret number of {0} is {1}."
DIGITS = 4  # of a number; each is a token
COLUMNS = (0, 2048, 8192, 9216, 10240, 11264, 12288, 14336, 16384)  # of the table; multiples of BAND


def read_filler(path: Path) -> str:
    """Return a file's text; of rows (.jsonl, .json) their strings, two line breaks between rows."""
    text = path.read_text(encoding="utf-8")
    if path.suffix not in (".jsonl", ".json"):
        return text
    rows = json.loads(text) if path.suffix == ".json" else map(json.loads, text.splitlines())
    return "\n\n".join("\n".join(value for value in row.values() if isinstance(value, str)) for row in rows)


def build(
    filler: Sequence[int], ends: Sequence[int], encoded: Callable[[str], list[int]], rng: random.Random
) -> tuple[list[int], list[bool], list[dict]]:
    """Return a text of ends[-1] tokens, which are filler, and its needles: section end, depth (1: control), place."""
    cities, inserts, needles = rng.sample(CITIES, len(CITIES)), [], []
    for end in ends:
        section, own = [], []
        for depth in (1.0, *DEPTHS):
            fact = cities.pop(), f"{rng.randrange(10 ** (DIGITS - 1), 10**DIGITS)}"
            before, after = QUESTION.format(fact[0], "|").split("|")
            if depth == 1:
                section += encoded(FACT.format(*fact))
            else:
                inserts.append((round(depth * end), encoded(FACT.format(*fact))))
            section += encoded(before)
            own.append({"end": end, "depth": depth, "start": len(section)})
            section += encoded(fact[1]) + encoded(after)
        inserts.append((end - len(section), section))
        needles += [needle | {"start": needle["start"] + end - len(section)} for needle in own]
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
    parts = np.split(np.arange(len(losses)), range(band, len(losses), band))
    return [losses[part][counted[part]].mean() for part in parts]


@torch.no_grad()
def measure(model: Transformer, text: tuple[list[int], list[bool], list[dict]], arm: str) -> dict:
    """Return loss by band (nats per token) and the needles (nats per digit, digits that are right greedily)."""
    config, (tokens, is_filler, needles) = model.config, text
    if arm != ARMS[0]:
        factor = float(arm.removesuffix("+"))
        config = extend_window(config, factor, attention_factor=0.1 * math.log(factor) + 1 if "+" in arm else 1.0)
    model.set_rope(config.rope)
    row = torch.tensor(tokens)  # (T,)
    hidden = model.hidden(row, Packed([len(row)]))  # (T, C)
    logprobs = TokenLogprobs.apply(hidden[:-1], model.lm_head.weight, row[1:], torch.ones(len(row) - 1), True)
    places = torch.tensor([[needle["start"] - 1 + i for i in range(DIGITS)] for needle in needles])
    right = model.logits(hidden[places]).argmax(-1) == row[places + 1]  # (needles, DIGITS)
    losses = np.pad(-logprobs.double().numpy(), (1, 0))  # at the position of the predicted token
    scores = zip(needles, (-logprobs[places].mean(1)).tolist(), right.sum(1).tolist(), strict=True)
    needles = [needle | {"nats": nats, "right": count} for needle, nats, count in scores]
    return {"loss": band_means(losses, np.array([False, *is_filler[1:]]), BAND), "needles": needles}


def with_interval(values: Sequence[float], form: str) -> str:
    """Return a mean with Student's 95% interval over values; the mean alone for a single value."""
    mean, count = float(np.mean(values)), len(values)
    half = student_95(count - 1) * float(np.std(values, ddof=1)) / math.sqrt(count) if count > 1 else 0.0
    return f"{mean:{form}}" + (f" ({mean - half:{form}} to {mean + half:{form}})" if half else "")


def asked(rows: list[dict], end: int, key: str = "nats") -> np.ndarray:
    """Return a figure of the needles of the sections that end at `end`, without the controls."""
    return np.array([n[key] for row in rows for n in row["needles"] if n["end"] == end and n["depth"] < 1])


def tables(rows: list[dict], columns: Sequence[int] = COLUMNS, ends: Sequence[int] = ENDS) -> str:
    """Return a table of losses and one of needles: each arm, minus plain, and minus itself without temperature."""
    found = {(row["arm"], row["text"]): row for row in rows}
    spans = [slice(start // BAND, end // BAND) for start, end in pairwise(columns)]
    head = ["texts", *(f"{start:,} to {end:,}" for start, end in pairwise(columns))]
    loss = [["nats a token", *head], ["---"] * (len(head) + 1)]
    head = [*(f"nats a digit at {end:,}" for end in ends), *(f"right at {end:,}: numbers; digits" for end in ends)]
    needle = [["needle", *head], ["---"] * (len(head) + 1)]
    pairs = [(arm, None) for arm in ARMS] + [(arm, ARMS[0]) for arm in ARMS[1:]]
    for arm, base in pairs + [(arm, arm[:-1]) for arm in ARMS if arm.endswith("+")]:
        texts = [text for a, text in found if a == arm and (base is None or (base, text) in found)]
        if not texts:
            continue
        own, other = [found[arm, text] for text in texts], [found[base, text] for text in texts if base]
        losses = np.array([row["loss"] for row in own]) - (np.array([row["loss"] for row in other]) if base else 0)
        nats = [asked(own, end) - (asked(other, end) if base else 0) for end in ends]
        name, form = (f"{arm} minus {base}", "+.3f") if base else (arm, ".3f")
        cells = [losses[:, span].ravel() for span in spans]
        loss.append([name, str(len(texts)), *(with_interval(c, form) if base else f"{c.mean():.3f}" for c in cells)])
        hits = [asked(own, end, "right") for end in ends if not base]
        right = [f"{(hit == DIGITS).sum()} of {len(hit)}; {hit.sum()} of {hit.size * DIGITS}" for hit in hits]
        needle.append([name, *(with_interval(n, form.replace("3", "2")) for n in nats), *(right or [""] * len(ends))])
    return "\n\n".join("\n".join(f"| {' | '.join(line)} |" for line in part) for part in (loss, needle))


def figure(rows: list[dict], ends: Sequence[int] = ENDS) -> str:
    """Return the SVG of loss by position and needles by section: means over the texts that every arm has."""
    arms = {arm: [row for row in rows if row["arm"] == arm] for arm in ARMS if any(r["arm"] == arm for r in rows)}
    texts = set.intersection(*({row["text"] for row in own} for own in arms.values()))
    loss, needle = {}, {}
    for arm, own in arms.items():
        own = [row for row in own if row["text"] in texts]
        label = arm if arm == ARMS[0] else f"YaRN {arm.replace('+', ', temperature')}"
        loss[label] = [(BAND * (i + 0.5), x) for i, x in enumerate(np.mean([row["loss"] for row in own], axis=0))]
        needle[label] = [(end, asked(own, end).mean()) for end in ends]
    shared = {"kind": "level", "rules": [(WINDOW, "trained window")], "smooth": False, "x_label": "position, tokens"}
    parts = {"loss, nats a token": loss, "needle, nats a digit (guessing: 2.30)": needle}
    parts = [{"title": title, "series": series} | shared for title, series in parts.items()]
    drawn = charts.panels(f"SmolLM2-135M beyond its window of {WINDOW:,} tokens", parts, 2)
    return charts.svg(drawn).replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)


def main() -> None:
    """Measure what is not finished, print the tables and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a model folder")
    parser.add_argument("files", type=Path, nargs="+", help="rows (.jsonl, .json) or texts")
    parser.add_argument("--texts", type=int, default=2, help="from each file; 0: measure nothing")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--out", type=Path, default=Path("runs/long-texts"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    results, fillers, begun = arguments.out / "results.jsonl", {}, time.perf_counter()
    rows = [json.loads(line) for line in results.open()] if results.exists() else []
    jobs = [(path, i, arm) for i in range(arguments.texts) for path in arguments.files for arm in arguments.arms]
    todo = [job for job in jobs if not any(r["arm"] == job[2] and r["text"] == f"{job[0].stem}-{job[1]}" for r in rows)]
    if todo:
        model = load(arguments.model).requires_grad_(False)
        tokenizer = load_tokenizer(arguments.model, model)
    for left, (path, i, arm) in zip(range(len(todo))[::-1], todo, strict=True):
        fillers[path] = fillers.get(path) or encode(tokenizer, read_filler(path))
        filler, name = fillers[path][i * LENGTH : (i + 1) * LENGTH], f"{path.stem}-{i}"
        if len(filler) < LENGTH:
            raise UserError(f"{path} has {len(fillers[path]):,} tokens, too few for text {i}: give fewer --texts")
        text = build(filler, ENDS, partial(encode, tokenizer), random.Random(name))
        rows.append({"text": name, "arm": arm} | measure(model, text, arm))
        with results.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        eta = format_eta((time.perf_counter() - begun) / (len(todo) - left) * left)
        print(f"{name}, {arm}: loss {np.mean(rows[-1]['loss'][-4:]):.3f} at the end  ETA {eta}", flush=True)
    print(tables(rows))
    write_atomically(arguments.out / "long-texts.svg", [figure(rows).encode()])


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"long_texts.py: {error}")
