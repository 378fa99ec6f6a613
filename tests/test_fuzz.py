"""Feed generated junk to every reader and the recipe parser: each returns a right result or raises its own error class
with one sentence. `bench/fuzz.py` runs the same targets with many more examples.
"""

import contextlib
import io
import json
import math
import time
import tomllib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from data_filter import History, Visit
from lab.arithmetic import World
from lab.metrics import Metrics, MetricsError, read_metrics
from lab.data_files import DataError
from lab.problems import has_chats, read_chats, read_problems, write_problems
from lab.recipe import Recipe, RecipeError, RlStage, SftStage, load_recipe, to_toml
from lab.responses import read_responses
from lab.scores import Response

EXAMPLES = 150  # per target, in the test suite
MAX_SECONDS = 5.0  # per example: more is a hang
STAND_INS = {'"@digits"': "9" * 5000, '"@hex"': "0x" + "f" * 5000, '"@deep"': "[" * 20_000 + "]" * 20_000}


@dataclass(frozen=True)
class Target:
    """A reader under test. `read` takes a folder and an example, and asserts that the result is right."""

    name: str
    examples: st.SearchStrategy
    read: Callable[[Path, object], None]
    error: type[Exception] | tuple[()]  # (): no example may be refused

    def attempt(self, folder: Path, example: object) -> str:
        """Return "read" or "refused" (with one sentence)."""
        begun = time.process_time()
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                self.read(folder, example)
            got = "read"
        except self.error as error:
            said = str(error)
            said.encode()  # it can be printed
            assert said.strip() and "\n" not in said and len(said) < 2000, said
            got = "refused"
        assert time.process_time() - begun < MAX_SECONDS
        return got


# ------------------------------------------------------------------------------------------ junk and how it is written

any_text = st.text(st.characters(exclude_categories=()), max_size=12)  # with lone surrogates
plain_text = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(str.strip)
stand_in = st.sampled_from(["@digits", "@deep"])
number = st.integers() | st.floats() | st.sampled_from([2**63, 10**30, -(10**400), 1e308, math.nan, math.inf])
scalar = st.none() | st.booleans() | number | any_text | stand_in
junk = st.recursive(scalar, lambda x: st.lists(x, max_size=3) | st.dictionaries(any_text, x, max_size=3), max_leaves=5)


def mostly(good: st.SearchStrategy, odd: st.SearchStrategy = junk) -> st.SearchStrategy:
    """Draw a valid value nine times in ten, so that a whole file may be valid."""
    return st.integers(0, 9).flatmap(lambda i: odd if i == 9 else good)


def as_json(value: object) -> str:
    """Write JSON, not always valid: NaN, lone surrogates, thousands of digits or brackets."""
    text = json.dumps(value)
    for stand_in, thing in STAND_INS.items():
        text = text.replace(stand_in, thing)
    return text


@st.composite
def damaged(draw, whole: st.SearchStrategy[bytes]) -> bytes:
    """Damage a file as a disk, an editor or a killed process may; mostly leave it whole."""
    data = draw(whole)
    kind = draw(st.sampled_from(["whole"] * 3 + ["cut", "changed", "grown"]))
    if kind == "whole" or not data:
        return data
    place = draw(st.integers(0, len(data) - 1))
    if kind == "cut":
        return data[:place]
    return data[:place] + draw(st.binary(min_size=1, max_size=3)) + data[place + (kind == "changed") :]


def lines(row: st.SearchStrategy) -> st.SearchStrategy[bytes]:
    """JSON lines, some of them not objects."""
    rows = st.lists(mostly(row), min_size=1, max_size=4)
    return damaged(rows.map(lambda rows: "".join(as_json(row) + "\n" for row in rows).encode()))


# ------------------------------------------------------------------------------------------------------- problems

answer = mostly(st.one_of(plain_text, st.integers(), st.lists(plain_text, min_size=1, max_size=2)))
turn = st.fixed_dictionaries(
    {"role": mostly(st.sampled_from(["user", "user", "system"])), "content": mostly(plain_text)}
)
columns = {
    "id": mostly(st.integers() | plain_text), "problem": mostly(plain_text), "question": mostly(plain_text),
    "answer": answer, "answers": answer, "final_answer": answer, "solution": mostly(plain_text),
    "prompt": mostly(st.lists(turn, min_size=1, max_size=2)), "difficulty": junk | plain_text,
    "reward_model": mostly(st.fixed_dictionaries({"ground_truth": answer})),
    "extra_info": mostly(st.fixed_dictionaries({"index": junk})), "level": st.sampled_from(["Level 3", "9/0", "1/3"]),
}  # fmt: skip
SCHEMAS = (("problem", "answers"), ("prompt", "reward_model"), ("problem", "answer"), ("question", "final_answer"),
           ("question", "answer"), ("odd",))  # fmt: skip


@st.composite
def problem_file(draw) -> tuple[str, bytes, str]:
    """(suffix, content, on_bad_row) of a file whose rows have the columns of one schema, and others."""
    needed = draw(st.sampled_from(SCHEMAS))
    optional = {name: column for name, column in columns.items() if name not in needed}
    row = st.fixed_dictionaries({name: columns.get(name, junk) for name in needed}, optional=optional)
    rule = draw(st.sampled_from(["stop", "skip", "keep"]))
    if draw(st.booleans()):
        return ".jsonl", draw(lines(row)), rule
    rows = mostly(st.lists(row, min_size=1, max_size=3))
    return ".json", draw(damaged(rows.map(lambda rows: as_json(rows).encode()))), rule


of_user = st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": plain_text}), min_size=1, max_size=1)
arrow_columns = {"prompt": of_user, "reward_model": st.fixed_dictionaries({"ground_truth": plain_text}),
                 "extra_info": st.fixed_dictionaries({"index": st.integers(0, 3)})}  # fmt: skip
arrow_odd = [
    st.integers(-9, 9), st.floats(), st.booleans(), st.binary(max_size=4), st.dates(), st.datetimes(),
    st.decimals(-99, 99, places=2), st.lists(plain_text, max_size=2), st.fixed_dictionaries({"index": st.floats()}),
]  # fmt: skip


@st.composite
def parquet_file(draw) -> tuple[str, bytes, str]:
    """The same as parquet: every column has one type, with nulls."""
    needed = draw(st.sampled_from(SCHEMAS))
    names = [*needed, *draw(st.lists(st.sampled_from(sorted(columns)), max_size=3, unique=True))]
    good = {name: st.just(arrow_columns.get(name, plain_text)) for name in names}
    row = st.fixed_dictionaries({name: draw(mostly(good[name], st.sampled_from(arrow_odd))) for name in names})
    try:
        table = pyarrow.Table.from_pylist(draw(mostly(st.lists(row, min_size=1, max_size=3), st.just([]))))
        pyarrow.parquet.write_table(table, sink := io.BytesIO())
    except (pyarrow.ArrowException, OverflowError):
        assume(False)
    rule = draw(st.sampled_from(["stop", "skip", "keep"]))
    return ".parquet", draw(damaged(st.just(sink.getvalue()))), rule


def read_a_problem_file(folder: Path, example: tuple[str, bytes, str]) -> None:
    suffix, content, rule = example
    path = folder / f"set{suffix}"
    path.write_bytes(content)
    found = read_problems(path, rule)
    assert found and len({p.id for p in found}) == len(found)
    for p in found:
        assert p.text.strip() and all(type(a) is str and a.strip() for a in p.answers) and (p.answers or rule == "keep")
        assert not {"nan", "inf", "-inf"} & set(p.answers) or b"nan" in content.lower() or b"inf" in content.lower()
        assert p.difficulty is None or math.isfinite(p.difficulty)
        assert all(type(text) is str for text in (p.id, p.text, p.type, p.solution))
    # written and read again, the problems are the same
    (copy := folder / "copy.jsonl").unlink(missing_ok=True)
    write_problems(found, copy)
    again = read_problems(copy, rule)
    assert [(p.text, p.answers, p.type, p.difficulty) for p in again] == [
        (p.text, p.answers, p.type, p.difficulty) for p in found
    ]


@st.composite
def right_rows(draw) -> tuple[list[tuple[str, str]], str, bool]:
    """Texts with answers, the schema to write them in, and whether to write one array."""
    texts = st.lists(st.tuples(plain_text, plain_text), min_size=1, max_size=4, unique_by=lambda pair: "".join(
        pair[0].replace("$", "").lower().split()))  # fmt: skip
    return draw(texts), draw(st.sampled_from(["own", "math", "questions", "verl", "olympiad"])), draw(st.booleans())


def read_right_rows(folder: Path, example: tuple[list[tuple[str, str]], str, bool]) -> None:
    """Compare with what was written."""
    pairs, schema, array = example
    # these answers have another meaning
    assume(not any(a.strip()[:1] in ("[", "{") or "####" in a or "box" in a for _, a in pairs))
    assume(not {a.strip().lower() for _, a in pairs} & {"proof", "notfound"})
    assume(not any(t.lstrip().startswith("[{") for t, _ in pairs))
    spell = {
        "own": lambda t, a: {"problem": t, "answers": [a]},
        "math": lambda t, a: {"problem": t, "answer": a},
        "questions": lambda t, a: {"question": t, "answer": a},
        "verl": lambda t, a: {"prompt": [{"role": "user", "content": t}], "reward_model": {"ground_truth": a}},
        "olympiad": lambda t, a: {"question": t, "final_answer": [a]},
    }[schema]
    rows = [spell(text, answer) for text, answer in pairs]
    path = folder / "right.jsonl"
    path.write_text(json.dumps(rows) if array else "".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    assert [(p.text, p.answers) for p in read_problems(path)] == [(text, (a.strip(),)) for text, a in pairs]


# ----------------------------------------------------------------------------------- chats, history, responses, metrics

reply = st.fixed_dictionaries({"role": mostly(st.just("assistant")), "content": mostly(plain_text)})
chat = st.lists(st.tuples(turn, reply), min_size=1, max_size=2).map(lambda pairs: [m for pair in pairs for m in pair])
chat_row = st.fixed_dictionaries({"messages": mostly(chat)}, optional={"id": junk})
visit_row = st.fixed_dictionaries({
    "problem_id": mostly(plain_text), "stage": mostly(st.sampled_from([-0.5, 0, 1])),
    "step": mostly(st.integers(0, 9)),
    "rewards": mostly(st.lists(mostly(st.sampled_from([0.0, 1.0, 0.5, 0, 1])), min_size=1, max_size=3)),
    "tokens": mostly(st.integers(0, 9999)),
}, optional={"odd": junk})  # fmt: skip
whole_number, name = mostly(st.integers(0, 9)), mostly(plain_text)
response_row = st.fixed_dictionaries({
    "data": name, "problem_id": name, "sample": whole_number, "tokens": whole_number, "finish_reason": name,
    "verdict": name, "answer": mostly(st.none() | plain_text), "text": name,
}, optional={"cuts": mostly(st.none() | st.dictionaries(plain_text, st.integers(0, 9), max_size=2))})  # fmt: skip
metrics_row = st.fixed_dictionaries(
    {"step": whole_number, "kind": mostly(st.sampled_from(["rl", "sft", "eval"])), "stage": st.just(0)},
    optional={"loss": junk, "verdicts": junk},
)


def read_a_chat_file(folder: Path, content: bytes) -> None:
    path = folder / "chats.jsonl"
    path.write_bytes(content)
    has_chats(path)
    for chat in read_chats(path):
        assert chat and chat[-1]["role"] == "assistant"
        for message in chat:
            (message["role"] + message["content"]).encode()


def read_a_history(folder: Path, content: bytes) -> None:
    path = folder / "history.jsonl"
    path.write_bytes(content)
    history = History.load(path)
    for visit in history.log:
        assert type(visit) is Visit and type(visit.problem_id) is str and type(visit.step) is int
        assert type(visit.tokens) is int and visit.tokens >= 0
        assert visit.rewards and all(type(r) in (int, float) and 0 <= r <= 1 for r in visit.rewards)
        assert 0 <= history.estimate(visit.problem_id) <= 1
    (copy := folder / "history-copy.jsonl").unlink(missing_ok=True)
    history.save(copy)
    assert History.load(copy).log == history.log


def read_a_response_file(folder: Path, content: bytes) -> None:
    path = folder / "responses.jsonl"
    path.write_bytes(content)
    for r in read_responses(path):
        assert type(r) is Response and type(r.sample) is type(r.tokens) is int
        assert all(type(text) is str for text in (r.data, r.problem_id, r.finish_reason, r.verdict, r.text))
        assert r.answer is None or type(r.answer) is str
        assert r.cuts is None or all(type(k) is str and type(v) is int for k, v in r.cuts.items())


def read_a_metrics_file(folder: Path, content: bytes) -> None:
    (folder / "metrics.jsonl").write_bytes(content)
    rows = read_metrics(folder)
    assert all(type(row["step"]) is int and type(row.get("kind", "")) is str for row in rows)
    Metrics(folder).close()  # as a resumed run opens it; complete lines stay
    assert repr(read_metrics(folder)) == repr(rows)


# --------------------------------------------------------------------------------------------------------- recipes

KINDS = {"": Recipe, "stage.0.": SftStage, "stage.1.": RlStage, "stage.2.": RlStage}
KINDS |= {f"{f.name}.": f.default_factory for f in fields(Recipe) if is_dataclass(f.default_factory)}
KEYS = {f"{where}{f.name}": f.default for where, kind in KINDS.items() for f in fields(kind)}
KEYS |= {f"world.{f.name}": f.default for f in fields(World)}
SMALL = {
    "name": "small", "model": "some/model", "stage": [
        {"kind": "sft", "data": "a.jsonl", "steps": 1},
        {"kind": "rl", "data": "b.jsonl", "steps": 1, "temperature": 1.0},
        {"kind": "rl", "steps": 1, "temperature": "match"},
    ],
}  # fmt: skip
value = st.recursive(
    st.booleans() | number | any_text | st.sampled_from(["@digits", "@hex", "@deep", "match", "report", "sft", ""])
    | st.dates() | st.datetimes() | st.floats(0, 2) | st.integers(0, 100),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(any_text, x, max_size=2),
    max_leaves=4,
)  # fmt: skip


def toml(value: object) -> str:
    """Write a TOML value, not always valid."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        text = json.dumps(value, ensure_ascii=False)
        return STAND_INS.get(text, text)
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml(k)} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, int | float):
        return repr(value)
    return value.isoformat()


def of_its_type(default: object) -> st.SearchStrategy:
    """Values of the default's type, sensible or not."""
    if isinstance(default, str):
        return st.sampled_from(["match", "exclude", "all", "sft", "a.jsonl"])
    kinds = {bool: st.booleans(), int: st.integers(-1, 64), float: st.floats(-0.5, 2) | st.integers(0, 2)}
    return kinds.get(type(default), st.lists(st.integers(-1, 9), min_size=2, max_size=2))


path = st.lists(
    st.sampled_from(["stage", "0", "9", "-1", "²", "", "eval", "world", "seed", "data"]) | any_text, max_size=4
).map(".".join)
pair = st.sampled_from(sorted(KEYS)).flatmap(lambda key: st.tuples(st.just(key), mostly(of_its_type(KEYS[key]), value)))
override = mostly(pair, st.tuples(path, value)).map(lambda pair: f"{pair[0]}={toml(pair[1])}")
near_recipe = st.tuples(st.just(SMALL), st.lists(mostly(override, any_text), min_size=1, max_size=3))
written = st.lists(pair, max_size=3).map(lambda pairs: {key: v for key, v in pairs if "." not in key})
written |= st.dictionaries(st.sampled_from(["name", "eval", "guard", "world", "stage", "odd"]), value, max_size=2)
recipe_text = st.one_of(
    written.map(lambda table: "".join(f"{key} = {toml(v)}\n" for key, v in ({**SMALL, **table}).items())),
    written.map(lambda table: "".join(f"{key} = {toml(v)}\n" for key, v in ({**SMALL, **table}).items())),
    st.text(max_size=40),
).map(lambda text: text.encode("utf-8", "surrogatepass"))


def is_sound(settings_: object) -> None:
    """Assert that every value of a recipe has its type and every number is finite."""
    for f in fields(settings_):
        v = getattr(settings_, f.name)
        if is_dataclass(v):
            is_sound(v)
        for x in v if isinstance(v, tuple) else (v,):
            if is_dataclass(x):
                is_sound(x)
            elif isinstance(x, float):
                assert math.isfinite(x), f.name
            elif isinstance(x, int):
                assert abs(x) < 2**63
            elif isinstance(x, str):
                x.encode()
                assert "\0" not in x
            else:
                assert x is None and f.name == "world", f.name


def read_a_recipe(folder: Path, content: bytes, overrides: list[str] = ()) -> None:
    (folder / "r.toml").write_bytes(content)
    recipe = load_recipe(folder / "r.toml", overrides)
    is_sound(recipe)
    for stage in recipe.stage:
        assert stage.steps >= 1 and 0 <= stage.learning_rate and 0 <= stage.adam_beta2 < 1 and stage.max_grad_norm > 0
        if isinstance(stage, RlStage):
            assert stage.temperature in ("match-previous", "match-first") or stage.temperature > 0
            assert stage.group_size >= 2 and 0 <= stage.clip_low <= 1 and 0 <= stage.informative_share <= 1
    assert recipe.search.step > 0 and recipe.name not in ("", ".", "..") and "/" not in recipe.name
    tomllib.loads(to_toml(recipe))
    (folder / "again.toml").write_text(to_toml(recipe), encoding="utf-8")
    assert load_recipe(folder / "again.toml") == recipe


def set_values(folder: Path, example: tuple[dict, list[str]]) -> None:
    table, overrides = example
    read_a_recipe(folder, "".join(f"{key} = {toml(v)}\n" for key, v in table.items()).encode(), overrides)


shipped = [file.read_bytes() for file in sorted(Path(__file__).resolve().parents[1].glob("recipes/*.toml"))]

TARGETS = [
    Target("problems, json and jsonl", problem_file(), read_a_problem_file, DataError),
    Target("problems, parquet", parquet_file(), read_a_problem_file, DataError),
    Target("problems, as written", right_rows(), read_right_rows, ()),
    Target("chats", lines(chat_row), read_a_chat_file, DataError),
    Target("history of pass rates", lines(visit_row), read_a_history, DataError),
    Target("responses", lines(response_row), read_a_response_file, DataError),
    Target("metrics", lines(metrics_row), read_a_metrics_file, MetricsError),
    Target("recipe, --set", near_recipe, set_values, RecipeError),
    Target("recipe, written", recipe_text, read_a_recipe, RecipeError),
    Target("recipe, shipped and damaged", damaged(st.sampled_from(shipped)), read_a_recipe, RecipeError),
]


def fuzz(target: Target, folder: Path, examples: int, seed: int | None = None) -> Counter:
    """Count what the target read and refused; raise any other result with the smallest example."""
    got: Counter = Counter()

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=seed is None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(target.examples)
    def attempt(example):
        got[target.attempt(folder, example)] += 1

    (attempt if seed is None else seeded(seed)(attempt))()
    return got


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_junk_is_refused_with_a_sentence_and_valid_input_is_read(target, tmp_path):
    got = fuzz(target, tmp_path, EXAMPLES)
    assert got["read"] > 0 and (got["refused"] > 0 or not target.error), got
