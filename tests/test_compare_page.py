"""lab/compare_page.py: what a page says of runs with known metrics."""

import json
import re

import pytest
from test_page import charts_of, parse

from lab.compare_page import write_comparison

TOML = 'name = "{}"\nseed = {}\neval = {{ data = "d" }}\n[[stage]]\nkind = "rl"\ntemperature = {}\n'


def write_run(folder, seed=0, temperature=1.0, solved=(0.0, 1.0), code="a.py 1", tokens=100, data="1"):
    folder.mkdir()
    held_out = dict(kind="eval", stage=0, name="held-out", low=0.0, high=1.0, tokens=10**9)
    rows = [held_out | dict(step=0, problems=2, avg=0.25)]
    rows += [dict(kind="filter", step=0, stage=0, tokens=1000), dict(kind="temperature", step=0, stage=0, tokens=None)]
    for step in range(1, 5):
        rows.append(dict(kind="rl", step=step, stage=0, tokens=tokens, reward_mean=seed + step / 10))
        rows.append(held_out | dict(step=step, problems=1, avg=step / 10))
    by_problem = [["p1", solved[0]], ["p2", solved[1]]]
    rows.append(held_out | dict(step=4, problems=2, avg=sum(solved) / 2, by_problem=by_problem))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.toml").write_text(TOML.format(folder.name, seed, temperature))
    made_with = {"recipe": "", "after_step": 0, "code": f"{code}, torch 2, commit f", "data d": data}
    (folder / "fingerprints.json").write_text(json.dumps([made_with]))
    return folder


def table_rows(page):
    """Return the cells of all table rows, in order."""
    return [re.findall(r"<t[hd][^>]*>([^<]*)", row.split("</tr>")[0]) for row in page.split("<tr>")[1:]]


def test_the_page_has_what_differs_and_what_is_paired(tmp_path):
    a = write_run(tmp_path / "a")
    b = write_run(tmp_path / "b<i>", temperature=1.2, solved=(0.5, 1.0), code="a.py 2", tokens=200)
    path, table = write_comparison({"a": [a], "b<i>": [b]})
    assert path == tmp_path / "compare.html"
    assert table[1:] == [
        ["a", "0", "4", "1,400", "25.0", "50.0", "0.0 to 100.0"],
        ["b<i>", "0", "4", "1,800", "25.0", "75.0", "0.0 to 100.0"],
    ]
    page = path.read_text()
    parse(page)
    assert "<i>" not in page and "b&lt;i&gt;, beyond the recipe: code changed since commit f: a.py." in page
    rows = table_rows(page)
    assert ["stage.0.temperature", "1.0", "1.2"] in rows and not any(row[0] in ("name", "seed") for row in rows)
    paired = next(row for row in rows if row[0] == "held-out")
    assert paired[:5] == ["held-out", "b&lt;i&gt;", "50.0", "75.0", "+25.0"] and paired[-4:] == ["1", "0", "1", "0"]
    titles = list(charts_of(page))
    assert "Accuracy: held-out, 1 problems" in titles and "Accuracy: held-out, 2 problems" in titles


def test_other_problems_under_the_same_ids_are_not_paired(tmp_path):
    """Regression: worlds of two seeds were compared sum by sum, though they have no sum in common."""
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=1, solved=(0.5, 1.0), data="2")
    path, _ = write_comparison({"a": [a], "b": [b]})
    assert next(row for row in table_rows(path.read_text()) if row[0] == "held-out")[2:] == ["–"] * 8


def test_seeds_are_one_line_with_the_interval_of_their_mean(tmp_path):
    runs = [write_run(tmp_path / f"s{seed}", seed, solved=(seed / 2, 1.0)) for seed in (0, 1)]
    other = write_run(tmp_path / "other", temperature=1.2)
    path, table = write_comparison({"seeds": runs, "other": [other]})
    assert table[1][:6] == ["seeds", "0, 1", "4", "1,400", "25.0", "62.5"]
    # 0.5 and 0.75: their mean +- t(1) * 0.125, cut to a share
    assert table[1][6] == "0.0 to 100.0" and 12.7062 * 0.125 > 0.625
    rows = table_rows(path.read_text())
    assert ["seed", "0, 1", "0"] in rows
    assert next(row for row in rows if row[0] == "held-out")[2:5] == ["62.5", "50.0", "-12.5"]


def test_runs_of_an_older_version_and_runs_that_have_just_begun_are_shown(tmp_path):
    a = write_run(tmp_path / "a")
    text = (a / "metrics.jsonl").read_text().splitlines(keepends=True)
    (a / "metrics.jsonl").write_text("".join(line for line in text if "by_problem" not in line))
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "metrics.jsonl").touch()
    path, table = write_comparison({"a": [a], "begun": [begun]})
    assert table[2] == ["begun", "–", "0", "0", "–", "–", "–"]
    assert ["held-out", "begun", *"–" * 8] in table_rows(path.read_text())


def test_an_unfinished_run_is_shown_by_its_evaluations_of_all_problems(tmp_path):
    a = write_run(tmp_path / "a")
    lines = (a / "metrics.jsonl").read_text().splitlines(keepends=True)
    (a / "metrics.jsonl").write_text("".join(lines[:-1]))  # it ends with an evaluation of one problem of two
    assert write_comparison({"a": [a]})[1][1][4:] == ["25.0", "25.0", "0.0 to 100.0"]


@pytest.mark.parametrize("x", ["step", "tokens of training"])
def test_curves_lie_over_each_other(tmp_path, x):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", tokens=300)
    page = write_comparison({"a": [a], "b": [b]})[0].read_text()
    part = page.split("<h2>Against ")[1 if x == "step" else 2]
    chart = charts_of(part)["Mean reward in training"]
    text = "".join(chart.itertext())
    assert "a 0.4" in text and "b 0.4" in text and x in text
