"""Texts with needles of bench/long_texts.py, and what is made of their losses: against hand-made oracles."""

import random
import sys
import xml.dom.minidom
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import long_texts as bench  # noqa: E402


def test_every_answer_stands_once_before_its_section_and_once_in_it():
    def encoded(part: str) -> list[int]:  # a token per character
        return [ord(character) for character in part]

    text, is_filler, needles = bench.build([ord("_")] * 12_000, (8000, 12_000), encoded, random.Random(0))
    whole = "".join(map(chr, text))
    assert len(whole) == 12_000 and "".join(np.array(list(whole))[is_filler]).strip("_") == ""
    assert [(needle["end"], needle["depth"]) for needle in needles] == [
        (end, depth) for end in (8000, 12_000) for depth in (1.0, 0.1, 0.3, 0.5, 0.7, 0.9)
    ]
    for needle in needles:
        number = whole[needle["start"] : needle["start"] + 4]
        assert whole.count(number) == 2 and needle["start"] < needle["end"]
        if needle["depth"] < 1:
            fact = whole.index(f" is {number}.")
            assert 0 <= fact - needle["depth"] * needle["end"] < 60
            city = whole[:fact].rsplit("of ", 1)[1]
            assert whole[: needle["start"]].endswith(f"? The secret number of {city} is ")


def test_band_means_count_only_filler():
    losses, counted = np.array([9.0, 1.0, 3.0, 8.0, 5.0]), np.array([False, True, True, False, True])
    assert bench.band_means(losses, counted, 3) == [2.0, 5.0]


def test_tables_pair_arms_over_the_texts_that_both_have():
    def row(text: str, arm: str, loss: list[float], nats: float) -> dict:
        asked = [{"end": 8, "depth": depth, "nats": nats, "right": 4} for depth in (1.0, 0.1)]
        return {"text": text, "arm": arm, "loss": loss, "needles": asked}

    rows = [row("a", "plain", [2.0, 5.0], 1.0), row("b", "plain", [9.0, 9.0], 1.0), row("a", "2", [2.5, 1.0], 0.5)]
    found = bench.tables(rows, (0, bench.BAND, 2 * bench.BAND), (8,))
    assert "| 2 minus plain | 1 | +0.500 | -4.000 |" in found and "| plain | 2 | 5.500 | 7.000 |" in found
    assert "| 2 minus plain | -0.50 |  |" in found and "| 2 | 0.50 | 1 of 1; 4 of 4 |" in found
    drawn = bench.figure(rows, (8,))
    assert "YaRN 2 1<" in drawn and "plain 5<" in drawn  # text a alone: both arms have it
    assert xml.dom.minidom.parseString(drawn).documentElement.tagName == "svg"
