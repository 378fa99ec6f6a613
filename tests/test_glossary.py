"""lab/glossary.py: complete, and equal to the table in README.md."""

from dataclasses import fields
from pathlib import Path

from grpo import RatioStats
from lab import page
from lab.glossary import DETERMINISTIC, GLOSSARY, markdown_table
from lab.scores import Evaluation

README = Path(__file__).resolve().parent.parent / "README.md"
ROWS_OF = {key: entry.rows.split() for entry in GLOSSARY for key in entry.keys.split()}


def test_the_readme_has_this_table():
    section = README.read_text().split("## Every metric\n")[1].split("\n## ")[0]
    assert section[section.index("| key |") :].rstrip() == markdown_table()


def test_every_key_is_explained_once():
    keys = [key for entry in GLOSSARY for key in entry.keys.split()]
    assert len(set(keys)) == len(keys)
    kinds = {"sft", "rl", "eval", "filter", "temperature", "premises", "guard"}
    assert {row for rows in ROWS_OF.values() for row in rows} == kinds


def test_every_field_of_an_evaluation_and_of_an_update_is_explained():
    assert all("eval" in ROWS_OF[field.name] for field in fields(Evaluation))
    assert all("rl" in ROWS_OF[field.name] for field in fields(RatioStats))


def test_every_key_that_the_page_shows_is_explained():
    of = {"steps": {"sft", "rl"}, "sft": {"sft"}, "rl": {"rl"}, "eval": {"eval"}}
    assert all(set(ROWS_OF[key]) & of[chart.of] for part in page.CHARTS.values() for chart in part for key in chart.metrics)
    assert all("rl" in ROWS_OF[key] for _, key, _ in page.STAGE_COLUMNS)
    assert all("eval" in ROWS_OF[key] for _, key, _ in page.FINAL_COLUMNS)


def test_times_rates_and_memory_are_not_deterministic():
    words = ("seconds", "per_s", "memory", "preempt", "micro_batch")
    assert not [key for key in DETERMINISTIC if any(word in key for word in words)]
