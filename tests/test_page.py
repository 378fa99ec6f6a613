"""lab/page.py on a synthetic run: three stages, a diverged step, missing keys, hostile model output, a cut last line."""

import json
import math
import random
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import jinja2
import pytest

from lab import charts, page, story, transcripts
from lab.metrics import Metrics

ROOT = Path(__file__).resolve().parent.parent

HOSTILE = "</script><img src=x onerror=alert(1)>&\"'\x00\ud800"
VOID = {"meta", "br", "hr", "link", "img", "input"}


def synthetic_rows(steps: tuple[int, int, int] = (60, 150, 150)) -> list[dict]:
    draw, rows, step = random.Random(0), [], 0

    def evaluation(accuracy: float, name: str = "held-out", final: bool = False) -> dict:
        half = 1.96 * math.sqrt(accuracy * (1 - accuracy) / 400)
        types = {"addition": 1.3, "subtraction": 1.1, "multiplication": 0.85, HOSTILE if final else "two steps": 0.7}
        return dict(kind="eval", step=step, stage=0, name=name, final=final, n=1600, problems=200, temperature=1.4,
                    avg=accuracy, low=accuracy - half, high=accuracy + half, length_mean=90.0, truncated_share=0.04,
                    no_box_share=0.02, by_type={t: min(1.0, accuracy * share) for t, share in types.items()})

    for _ in range(steps[0]):
        step += 1
        rows.append(dict(kind="sft", step=step, stage=0, lr=3e-4, tokens=16384, seconds=1.8,
                         loss=2.5 * math.exp(-step / 25) + draw.gauss(0.4, 0.03),
                         grad_norm=math.exp(draw.gauss(0, 0.3)), tokens_per_s=draw.gauss(9000, 300)))
    rows.append(evaluation(0.412))
    for stage in (1, 2):
        counts = [310, 220, 190, 170, 160, 190, 240, 380]
        rows.append(dict(kind="filter", step=step, stage=stage, label=f"before stage {stage}", rule="drop 8/8",
                         before=[*counts, 900], after=[*counts, 0], kept=1860, dropped=900))
        curve = [dict(temperature=t / 10, accuracy=0.45 / (1 + math.exp((t - 15) * 1.1)),
                      distinct4=1 / (1 + math.exp((11 - t) / 2))) for t in range(4, 19)]
        rows.append(dict(kind="temperature", step=step, stage=stage, label=f"for stage {stage}", curve=curve,
                         target_distinct4=0.62 if stage == 2 else None, chosen=1.1 + stage / 10))
        table = [["filter", "drops 900 of 2,760", "yes"], ["substitution (off)", "41% of groups lack a signal", "yes"],
                 ["rescue", "310 (290 to 330)", "no: " + HOSTILE]]
        rows.append(dict(kind="premises", step=step, stage=stage, label=f"before stage {stage}", table=table,
                         predicted={"zero_variance": [0.41, 0.4, 0.42], "rescued": [310.0, 290.0, 330.0]}))
        limit = 96 + 64 * (stage - 1)
        for i in range(steps[stage]):
            step += 1
            done = (step - steps[0]) / (steps[1] + steps[2])
            none, every = draw.randint(8, 24) - int(8 * done), draw.randint(2, 10) + int(20 * done)
            reward, skipped = 0.35 + 0.35 * done + draw.gauss(0, 0.04), int(i == 40)
            rows.append(dict(
                kind="rl", step=step, stage=stage, epoch=step // 50, problems=1860, groups=128, tokens=90_000, lr=1e-6,
                reward_mean=reward, accuracy=reward - 0.02, reward_correct=reward - 0.02, reward_steps=None,
                verdicts={"correct": int(64 * reward), "wrong": 64 - int(64 * reward)}, temperature=1.1 + stage / 10,
                response_length_mean=60 + 50 * done + draw.gauss(0, 4), response_length_max=min(limit, 110 + 60 * done),
                max_response_tokens=limit, truncated_share=abs(draw.gauss(0.05, 0.02)),
                distinct4=0.66 - 0.1 * (i / steps[stage]) + draw.gauss(0, 0.01), solve_none=none, solve_all=every,
                zero_variance=none + every, rescued=draw.randint(0, 5), substituted=none + every, skipped=skipped,
                loss=None if skipped else draw.gauss(0, 0.01), ratio_mean=1 + draw.gauss(0, 1e-5),
                grad_norm=None if skipped else math.exp(draw.gauss(-1, 0.4)),
                rescued_ratio_mean=None if i % 3 else 1 + draw.gauss(0.1, 0.05),
                logprob_diff_mean=abs(draw.gauss(2e-6, 4e-7)), logprob_diff_max=abs(draw.gauss(3e-5, 8e-6)),
                entropy=1.1 - 0.3 * done + draw.gauss(0, 0.02), peak_memory_gib=11.4,
                sample_tokens_per_s=draw.gauss(21000, 900), update_tokens_per_s=draw.gauss(14000, 500), seconds=10.7,
                seconds_sample=4.1 + draw.gauss(0, 0.2), seconds_grade=0.3, seconds_update=6.2 + draw.gauss(0, 0.2)))
            if i % 25 == 24:
                rows.append(evaluation(0.412 + 0.22 * done + draw.gauss(0, 0.01)))
        if stage == 1:  # the other is still going on
            rows.append(dict(kind="premises", step=step, stage=1, label="after stage 1",
                             predicted=rows[-1].get("predicted"), seen={"zero_variance": 0.3925, "rescued": 281.0}))
    diverged = next(row for row in rows if row["kind"] == "rl" and row["step"] == steps[0] + 100)
    diverged.update(loss=math.nan, grad_norm=math.inf)
    del diverged["entropy"], diverged["distinct4"], diverged["verdicts"]
    rows += [evaluation(0.634, final=True), evaluation(0.587, "beyond window, no YaRN", True),
             evaluation(0.641, "beyond window, YaRN " + HOSTILE, True)]
    return rows


def group(step: int, stage: int, kind: str = "training", problem: str = "sum-9", fate: str = "", text: str = "") -> dict:
    text = text or f"<think>{HOSTILE} at step {step}</think> It is \\boxed{{7}}, not 8."
    responses = [dict(sample=i, tokens=90, finish_reason="stop", verdict="right" if i < 3 else "wrong", answer="7", text=text)
                 for i in range(8)]
    row = dict(step=step, stage=stage, kind=kind, problem_id=problem, prompt="What is 3 + 4? " + HOSTILE, answers=["7"],
               temperature=1.2, fate=fate, responses=responses)
    return row | ({"replaced": 2, "replacement": "an earlier response"} if fate else {})


def synthetic_run(folder: Path, steps: tuple[int, int, int] = (60, 150, 150)) -> list[dict]:
    rows = synthetic_rows(steps)
    metrics = Metrics(folder)
    for row in rows:
        metrics.write(row)
        if row["kind"] == "rl":
            metrics.write_rollouts([group(row["step"], row["stage"], fate=fate) for fate in ("rescued", "substituted")])
        if row["kind"] == "eval":
            metrics.write_rollouts([group(row["step"], row["stage"], "held-out", f"sum-{i}") for i in range(2)])
    metrics.close()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "rl", "step": 99999, "rew')
    (folder / "recipe.toml").write_text(
        'name = "arithmetic <b>tiny</b>"\n[[stage]]\nname = "worked solutions"\n'
        '[[stage]]\nname = "short"\n[[stage]]\nname = "long"\n')
    return rows


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[list[dict], str, str]:
    folder = tmp_path_factory.mktemp("run")
    rows = synthetic_run(folder)
    path = page.write_report(folder)
    assert path == folder / "report.html" and not list(folder.glob("*.tmp"))
    return rows, path.read_text(), (folder / "curves.svg").read_text()


class Balanced(HTMLParser):
    """Fails on a tag that closes another one; collects tags and text."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def parse(text: str) -> Balanced:
    parser = Balanced()
    parser.feed(text)
    parser.close()
    assert not parser.open
    return parser


def charts_of(text: str) -> dict[str, ElementTree.Element]:
    trees = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.S)]
    return {tree.find("title").text: tree for tree in trees}


def faint(chart: ElementTree.Element) -> str:
    """The path of the first series, with every step."""
    return next(node.get("d") for node in chart.iter("path") if "opacity: 0.3" in node.get("style", ""))


def test_the_page_is_well_formed_and_has_every_section(run):
    _, text, _ = run
    texts, drawn = parse(text).texts, charts_of(text)
    for section in ("What happened", "Final evaluation", "Stages", "Curves", *page.CHARTS, "Rollouts", "Recipe", "Glossary"):
        assert section in texts
    titles = {chart.title for part in page.CHARTS.values() for chart in part}
    assert titles | {"Difficulty before stage 1", "Temperature for stage 2"} <= drawn.keys() and "Not drawn" not in text
    assert all("nan" not in value and "inf" not in value for tree in drawn.values() for node in tree.iter()
               for key, value in node.attrib.items() if key in ("d", "points", "x", "y"))


def test_curves_svg_is_self_contained(run):
    _, _, svg = run
    root = ElementTree.fromstring(svg)
    texts = {node.text for node in root.iter("{http://www.w3.org/2000/svg}text")}
    assert set(page.PANELS) | {"arithmetic <b>tiny</b>", "RL 1"} <= texts and len(page.PANELS) == 6
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and svg.count("http") == 1 and "<script" not in svg


def test_model_output_is_escaped_and_nothing_is_fetched(run):
    _, text, svg = run
    tags = parse(text).tags
    assert not {tag for tag, _ in tags} & {"script", "img", "link", "iframe", "object", "form"}
    assert not [name for _, attributes in tags for name in attributes if name.startswith("on")]
    assert "&lt;/script&gt;&lt;img" in text and "<b>tiny" not in text + svg and "\x00" not in text
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert "default-src 'none'; style-src 'unsafe-inline'" in text and "href" not in text.replace(' href="#', "")


def test_tables_and_cards_show_the_metrics(run):
    rows, text, _ = run
    cells = re.findall(r"<td[^>]*>(.*?)</td>", text)
    for row in (row for row in rows if row["kind"] == "eval" and row["final"]):
        assert {f"{100 * row[key]:.1f}%" for key in ("avg", "low", "high")} <= set(cells)
    for stage in (1, 2):
        part = [row for row in rows if row["kind"] == "rl" and row["stage"] == stage]
        ends = [sum(row["reward_mean"] for row in some) / 10 for some in (part[:10], part[-10:])]
        assert f"{ends[0]:.3g} → {ends[1]:.3g}" in cells
        assert f"{sum(row['rescued'] for row in part):.3g}" in cells
        assert f"{part[0]['step']:,}–{part[-1]['step']:,}" in cells
    assert "RL 1: short" in {unescape(cell) for cell in cells}
    assert "from 41.2% (36.4 to 46.0) before RL to 63.4% (58.7 to 68.1) at step 360: +22.2 points" in text
    titles = re.findall(r'<td data-title="(.*?)">', text)  # what a narrow page shows beside a cell
    assert len(titles) == len(cells) and {"Evaluation", "Accuracy", "Limit"} <= set(titles)


def test_premises_stand_beside_what_their_stage_showed(run):
    _, text, _ = run
    part = text[text.index("<h2>What can matter</h2>") : text.index("<h2>Curves</h2>")]
    rows = [[unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)] for row in part.split("<tr>")[2:]]
    assert rows[0] == ["RL 1", "filter", "drops 900 of 2,760", "yes", "–"]
    off = ["substitution (off)", "41% of groups lack a signal", "yes"]
    assert rows[1] == ["RL 1", *off, "39.2% lack a signal"] and rows[4] == ["RL 2", *off, "–"]
    assert rows[2][-1] == "281 rescues" and len(rows) == 6


def test_a_page_without_premises_has_no_table_of_them(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "rl", "step": 1, "stage": 0}\n')
    assert "What can matter" not in page.write_report(tmp_path).read_text()


def test_a_diverged_step_is_reported_and_left_as_a_gap(run):
    _, text, _ = run
    assert "2 values are not finite and left as gaps: loss at step 160, grad_norm at step 160." in text
    assert faint(charts_of(text)["RL loss"]).count("M") == 4  # the two skipped steps and the diverged one


def test_charts_draw_the_metrics_of_their_rows(run):
    rows, _, _ = run
    rl, held = [row for row in rows if row["kind"] == "rl"], story.held_out(rows)
    chart = {chart.title: chart for part in page.CHARTS.values() for chart in part}
    series = page._curve(chart["Entropy (nats per token)"], rl, [])["series"]
    assert series == {"entropy": [(row["step"], row.get("entropy")) for row in rl]}
    shares = page._curve(chart["Groups (share of the batch)"], rl, [])["series"]["all right"]
    assert shares == [(row["step"], row["solve_all"] / row["groups"]) for row in rl]
    by_type = chart["Held-out accuracy by type"]
    added = page._curve(by_type, held, [])["series"]["addition"]
    assert added == [(row["step"], row["by_type"]["addition"]) for row in held]
    many = [{"step": 1, "by_type": {f"type {i}": 0.5 for i in range(15)}}]
    assert len(page._curve(by_type, many, [])["series"]) == 12
    band = page._curve(chart["Held-out accuracy"], held, [])["band"]
    assert band == {"200 problems": [(row["step"], row["low"], row["high"]) for row in held]}


def test_evaluations_of_fewer_problems_are_another_line():
    rows = [dict(step=step, problems=problems, avg=step / 10, low=0, high=1, by_type={"sums": step / 10})
            for step, problems in ((1, 240), (2, 120), (3, 240), (4, 120))]
    accuracy, by_type = (page._curve(chart, rows, []) for chart in page.CHARTS["Learning"][:2])
    assert accuracy["series"] == {"240 problems": [(1, 0.1), (3, 0.3)], "120 problems": [(2, 0.2), (4, 0.4)]}
    assert list(accuracy["band"]) == ["240 problems", "120 problems"]
    assert by_type["series"] == {"sums": [(1, 0.1), (3, 0.3)]}


def test_a_long_run_is_thinned_without_losing_its_spikes(tmp_path):
    rows = synthetic_rows((10, 5000, 5000))
    next(row for row in rows if row["step"] == 1777 and row["kind"] == "rl")["truncated_share"] = 0.97
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = page.write_report(tmp_path).read_text()
    chart = charts_of(text)["Truncated share"]
    heights = [float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", faint(chart))]
    box = next(node.get("d") for node in list(chart.iter("path"))[1:])  # the first is the background
    floor, top = (pick(float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", box)) for pick in (max, min))
    assert len(text) < 1_000_000 and 100 < len(heights) <= 2 * charts.BINS + 1
    assert min(heights) < 0.1 * floor + 0.9 * top  # 0.97 of an axis that ends at 100%


@pytest.mark.parametrize("rows", [
    [], [dict(kind="rl", step=1, stage=0)], [dict(kind="sft", step=1, stage=0, loss=None)],
    [dict(kind="eval", step=0, stage=0)],
    [dict(kind="eval", step=0, stage=0, name="a"), dict(kind="rl", step=1, stage=1, verdicts={}),
     dict(kind="eval", step=1, stage=1, name="a", final=True)],
    [dict(kind="filter", step=0, stage=0, before=[0] * 9),
     dict(kind="temperature", step=0, stage=0, curve=[{"temperature": None}])]])
def test_a_page_names_the_charts_that_it_does_not_draw(tmp_path, rows):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = page.write_report(tmp_path).read_text()
    parse(text)
    ElementTree.fromstring((tmp_path / "curves.svg").read_text())
    assert "Not drawn, with fewer than two values: Held-out accuracy, " in text


def reading(folder: Path, rows: list[dict]) -> str:
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 10, "resp')
    (folder / "metrics.jsonl").write_text("".join(json.dumps(dict(kind="rl", step=9 + k, stage=k)) + "\n" for k in (1, 2)))
    return page.write_report(folder).read_text()


def test_a_problem_is_shown_first_and_last_in_each_stage(tmp_path):
    rows = [group(step, 1 + (step > 5), "held-out", f"sum-{i}") for step in range(10) for i in range(6)]
    text = reading(tmp_path, rows)
    shown = re.findall(r'class="panel group (.*?)"><b>(RL \d, step \d)</b>: 3 of 8 right', text)
    assert shown == 4 * [("stage-1 ends", "RL 1, step 0"), ("stage-1 ", "RL 1, step 5"), ("stage-2 ", "RL 2, step 6"),
                         ("stage-2 ends", "RL 2, step 9")]
    assert text.count('<div class="response ') == 4 * 4 * 8 and "2 more problems are in rollouts.jsonl" in text


def test_rollouts_are_filtered_without_a_script(tmp_path):
    """Each filter's selector hides what lacks its mark; the first problem's first and last groups are shown."""
    text = reading(tmp_path, [group(1, 1, "held-out", "a"), group(3, 1, fate="rescued"), group(2, 2, "held-out", "a")])
    tags = parse(text).tags
    radios = [(own["name"], own.get("id"), "checked" in own) for tag, own in tags if tag == "input"]
    assert radios == [
        ("topic", "topic-1", True), ("topic", "topic-2", False), ("topic", None, False),
        ("stage", "stage-ends", True), ("stage", "stage-1", False), ("stage", "stage-2", False), ("stage", None, False),
        ("verdict", None, True), ("verdict", "verdict-1", False), ("verdict", "verdict-2", False)]
    selectors = re.findall(r"body:has\(#(\S+):checked\) \.(\w+):not\(\.(\S+)\)", text)
    assert [mark for mark, _, _ in selectors] == [
        "topic-1", "topic-2", "stage-1", "stage-2", "verdict-1", "verdict-2", "stage-ends"]
    marks = [own["class"].split() for tag, own in tags if "class" in own]
    for mark, kind, needed in selectors:
        assert any(needed in own for own in marks if kind in own), (mark, "would show nothing")
    assert "Rescue put this earlier response into the place of number 3:" in text


def test_long_and_hostile_responses_are_cut_and_escaped(tmp_path):
    text = "<think>" + "x" * 160_000 + "</think> So " + "y" * 10_000 + r" it is \boxed{7}, " + "z" * 10_000 + "end"
    shown = reading(tmp_path, [group(1, 1, "held-out", "a", text=text), group(2, 1, "held-out", "b" + HOSTILE)])
    assert "154,007 more characters, not shown" in shown and len(shown) < 400_000
    assert shown.count(r"<mark>\boxed{7}</mark>") == 16 and shown.count("zend</pre>") == 8
    assert "160,007 characters</summary>" in shown and "img" not in {tag for tag, _ in parse(shown).tags}


@pytest.mark.parametrize(("text", "answer", "parts"), [
    (r"<think>\boxed{1}</think>It is \boxed{7}.", "7", (r"<think>\boxed{1}", "It is ", r"\boxed{7}", ".")),
    (r"first \boxed{7}, no: \fbox {7}", "7", ("", r"first \boxed{7}, no: ", r"\fbox {7}", "")),
    (r"\boxed{\frac{1}{2}} of", r"\frac{1}{2}", ("", "", r"\boxed{\frac{1}{2}}", " of")),
    ("cut off while", None, ("cut off while", "", "", "")),
    ("<think>a</think> no box", None, ("<think>a", "no box", "", ""))])
def test_a_response_is_split_into_thinking_and_box(text, answer, parts):
    found = transcripts.transcript(dict(text=text, answer=answer, verdict="right", tokens=1))
    assert tuple(found[part] for part in ("thinking", "before", "box", "after")) == parts


def rendered(call: str, **values) -> str:
    return page.TEMPLATES.from_string(
        '{% from "parts.html" import figures, folded, table %}{{ ' + call + " }}").render(values)


def test_folded_text_is_escaped_and_complete():
    text = "<i>" + "x" * 50_000
    whole = rendered("folded(summary, text)", summary=HOSTILE, text=text)
    assert [data for data in parse(whole).texts if len(data) > 40_000] == [text]
    assert {tag for tag, _ in parse(whole).tags} == {"details", "summary", "pre"}


def test_template_macros_escape_their_arguments():
    figure = charts.line_chart(HOSTILE, {HOSTILE: [(0, 1.0), (1, 2.0)]})
    body = rendered("table([text], [[text], [3]])", text=HOSTILE)
    body += rendered("figures(all)", all=[(HOSTILE, figure, HOSTILE), (HOSTILE, None, "")])
    assert "img" not in {tag for tag, _ in parse(body).tags} and body.count("<svg") == 1 and "\ud800" not in body
    assert "Not drawn, with fewer than two values: &lt;/script&gt;" in body and body.count("<figcaption>") == 1
    assert "two values: this part" in rendered("figures([])")
    assert "Not drawn" not in rendered("figures(all)", all=[("a", figure, "")])


def test_a_missing_template_value_is_an_error_and_text_is_never_marked_safe():
    with pytest.raises(jinja2.UndefinedError):
        rendered("table(heads, [])")
    assert "<b>" not in rendered("table(['<b>'], [[text]])", text="<b>")


def test_the_same_run_gives_the_same_page(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        synthetic_run(tmp_path / name, (5, 60, 60))
        page.write_report(tmp_path / name)
    for name in ("report.html", "curves.svg"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_command_rejects_a_folder_that_is_not_a_run(tmp_path):
    done = subprocess.run([sys.executable, "-m", "lab.page", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.endswith("is not a run: it has no metrics.jsonl; give a folder that train.py has made\n")
