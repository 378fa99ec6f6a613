"""lab/problems.py and lab/data_files.py: every format, every fault, the hub, and real files."""

import csv
import gzip
import json
import random
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from lab import data_files
from lab.data_files import DataError
from lab.problems import Columns, INSTRUCTION, Problem, asks_otherwise, benchmark_copies, duplicated, has_chats, prompt_text, read_chats, read_problems, write_problems
from lab.recipe import load_recipe
from lab.run_data import RunData

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="shared/data is not available")


def write_rows(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def good(n):
    return {"problem": f"p{n}", "answer": str(n)}


def problem(id, text="", answers=("1",)):
    return Problem(id, text or f"What is {id}?", answers)


# ---- schemas -------------------------------------------------------------------------------------


def test_gsm8k_answer_loses_its_thousands_separators_and_the_solution_its_calculator_marks(tmp_path):
    rows = [{"question": "How much?", "answer": "He has 40*27 = <<40*27=1080>>1,080 left.\n#### 1,080"}]
    (read,) = read_problems(write_rows(tmp_path / "gsm.jsonl", rows))
    assert read.text == "How much?" and read.answers == ("1080",)
    assert read.solution == "He has 40*27 = 1,080 left.\nThe final answer is \\boxed{1080}."


@pytest.mark.parametrize(
    "end, answer", [("2, 3", "2, 3"), ("(1,200)", "(1,200)"), ("1,234,567.5", "1234567.5"), ("-1,000", "-1000"), ("5", "5")]
)
def test_only_thousands_separators_leave_an_answer_behind_its_mark(tmp_path, end, answer):
    (read,) = read_problems(write_rows(tmp_path / "s.jsonl", [{"question": "q", "answer": f"so\n#### {end}"}]))
    assert read.answers == (answer,)


def verl(content, truth, extra):
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]
    return {"prompt": prompt, "reward_model": {"ground_truth": truth}, "extra_info": extra}


def test_verl_ground_truths_may_be_strings_floats_or_lists_with_newlines(tmp_path):
    rows = [
        verl("a?", "025", {"index": 0}),
        verl("b?", 142.0, {"id": 1}),
        verl("c?", ["9.6\n", "9.6", "-1/3\n"], {"index": 2}),
        verl("d?", '["7", "8"]', {"index": 3}),
    ]
    read = read_problems(write_rows(tmp_path / "aime.jsonl", rows))
    assert [p.answers for p in read] == [("025",), ("142.0",), ("9.6", "-1/3"), ("7", "8")]
    assert [p.id for p in read] == ["aime/0", "aime/1", "aime/2", "aime/3"]
    assert [p.text for p in read] == ["a?", "b?", "c?", "d?"]


def test_verl_parquet_reads_like_json(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [verl("a?", ["1\n", "2"], {"index": 7})]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "set.parquet")
    assert read_problems(tmp_path / "set.parquet") == read_problems(write_rows(tmp_path / "set.jsonl", rows))


def test_a_conversation_with_earlier_turns_is_refused(tmp_path):
    row = verl("and b?", "1", {"index": 0})
    row["prompt"][1:1] = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "1"}]
    with pytest.raises(DataError, match="row 1 has no problem text"):
        read_problems(write_rows(tmp_path / "chat.jsonl", [row]))


def test_math_json_array_keeps_type_difficulty_and_solution(tmp_path):
    rows = [
        {"problem": "p", "answer": "[-9, 9]", "solution": "so", "difficulty": 4.5, "type": "Algebra"},
        {"problem": "q", "answer": 3, "difficulty": "3/8", "unique_id": "test/algebra/1.json"},
    ]
    path = tmp_path / "math.json"
    path.write_text(json.dumps(rows, indent=2))
    first, second = read_problems(path)
    # a closed interval is JSON too, but not a list of answers
    assert (first.answers, first.type, first.difficulty, first.solution) == (("[-9, 9]",), "Algebra", 4.5, "so")
    assert (second.answers, second.difficulty, second.id) == (("3",), 0.375, "math/test/algebra/1.json")


def test_own_file_round_trip_is_exact_and_ids_survive_a_change_of_file(tmp_path):
    problems = [
        Problem("aime24/17", "x\u2028\n$y$ ", ("1", "\\frac12"), "Algebra", 2.5, "because"),
        Problem("gsm/ä", "z", ("[0,3)",)),
    ]
    write_problems(problems, tmp_path / "new" / "filtered.jsonl")
    assert read_problems(tmp_path / "new" / "filtered.jsonl") == problems
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["filtered.jsonl"]
    with pytest.raises(DataError, match="exists already"):
        write_problems(problems[:1], tmp_path / "new" / "filtered.jsonl")


def test_json_and_json_lines_are_distinguished_by_content(tmp_path):
    lines = write_rows(tmp_path / "a.json", [{"problem": "p", "answer": "1"}, {"problem": "q", "answer": "2"}])
    array = tmp_path / "a.jsonl"
    array.write_text(json.dumps([{"problem": "p", "answer": "1"}, {"problem": "q", "answer": "2"}]))
    assert read_problems(lines) == read_problems(array)


# ---- ids and duplicates --------------------------------------------------------------------------


def test_a_hash_replaces_an_id_that_several_problems_share(tmp_path):
    rows = [{"id": 1, **good(1)}, {"id": 1, **good(2)}, {"id": 2, **good(3)}]
    read = read_problems(write_rows(tmp_path / "s.jsonl", rows))
    again = read_problems(write_rows(tmp_path / "s.jsonl", rows[::-1]))[::-1]
    assert read == again  # a hash does not depend on the position in the file
    assert len({p.id for p in read}) == 3 and read[2].id == "s/2" and "s/1" not in {p.id for p in read}


def test_duplicates_are_dropped_and_counted(tmp_path, capsys):
    texts = ["What is $x + 1$?", "What is  $x+1$?\n", "r"]
    rows = [{"problem": text, "answer": "1"} for text in texts]
    read = read_problems(write_rows(tmp_path / "s.jsonl", rows))
    said = capsys.readouterr().err
    assert [p.text for p in read] == ["What is $x + 1$?", "r"]
    assert "left out 1 duplicate rows" in said and read[0].id in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "id_of", [lambda n: {}, lambda n: {"id": n}, lambda n: {"id": n % 7}, lambda n: {"id": "same"}]
)
def test_ids_do_not_depend_on_the_order_of_the_rows_or_on_a_filter(tmp_path, id_of):
    rows = [id_of(n) | good(n) for n in range(40)]
    read = {p.text: p.id for p in read_problems(write_rows(tmp_path / "s.jsonl", rows))}
    assert len(set(read.values())) == 40
    for seed in range(3):
        shuffled = random.Random(seed).sample(rows, len(rows))
        again = read_problems(write_rows(tmp_path / "s.jsonl", shuffled))
        assert {p.text: p.id for p in again} == read
        left = random.Random(seed).sample(again, 11)  # filtered, written to another file, shuffled there, read again
        write_problems(left, tmp_path / f"left-{seed}.jsonl")
        assert {p.text: p.id for p in read_problems(tmp_path / f"left-{seed}.jsonl")} == {
            p.text: read[p.text] for p in left
        }


def test_one_text_under_two_ids_is_found_within_and_across_files():
    first = [problem("a/0", "Find $x$."), problem("a/1", "Find $y$."), problem("a/2", "find x .", ("2",))]
    later = [problem("b/0", f"FIND $y$. {INSTRUCTION}"), problem("a/0", "Find $x$."), problem("b/1", "Find $z$.")]
    seen = {}
    assert duplicated(first, seen) == [(first[2], first[0])]
    assert duplicated(later, seen) == [(later[0], first[1])]  # the same id again is the same problem
    assert duplicated(later) == []


def test_fine_tuning_keeps_every_solution_of_a_problem_and_needs_no_answer(tmp_path):
    solutions = ["We add: \\boxed{4}.", "Two pairs.\nSo it is 4.", "2 + 2 = 4", "Count up.", "Count up."]
    rows = [{"problem": "2 + 2?", "solution": solution} for solution in solutions]
    for kind in ({}, {"id": 7}):
        read = read_problems(write_rows(tmp_path / "s.jsonl", [kind | row for row in rows]), solved=True)
        assert [p.solution for p in read] == solutions[:4] and len({p.id for p in read}) == 4
        assert [p.answers for p in read] == [("4",), (), (), ()]
    short = write_rows(tmp_path / "short.jsonl", [rows[2], {"problem": "q", "solution": " "}])
    assert [p.solution for p in read_problems(short, "skip", solved=True)] == ["2 + 2 = 4"]
    with pytest.raises(DataError, match="row 2 has no worked solution"):
        read_problems(short, solved=True)
    generated = write_rows(tmp_path / "g.jsonl", [{"problem": "p", "generated_solution": "So."}])
    assert [p.solution for p in read_problems(generated, solved=True)] == ["So."]


def test_only_an_sft_stage_reads_worked_solutions_without_answers(tmp_path):
    path = write_rows(tmp_path / "s.jsonl", [{"problem": "2 + 2?", "solution": s} for s in ("5", "4")])
    stage = f"[[stage]]\nkind = '%s'\ndata = '{path}'\nsteps = 1\n"
    (tmp_path / "r.toml").write_text("name = 'r'\nmodel = 'm'\n" + stage % "sft" + stage % "rl")
    recipe = load_recipe(tmp_path / "r.toml")
    data = RunData(recipe, tmp_path)
    assert [reply for _, _, reply in data.worked_examples(recipe.stage[0])] == ["5", "4"]
    with pytest.raises(DataError, match="different answers"):
        data.training_problems("rl", str(path))
    alone = replace(recipe, stage=recipe.stage[:1])
    assert len(RunData(alone, tmp_path).problems(str(path))) == 2


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row, message",
    [
        ('{"problem": "p", ', "row 2 is malformed JSON"),
        ("[1, 2]", "row 2 is not a JSON object"),
        ('"p"', "row 2 is not a JSON object"),
        ({"problem": "  ", "answer": "1"}, "row 2 has no problem text"),
        ({"problem": "p", "answer": None}, "row 2 has no answer"),
        ({"problem": "p", "answer": " \n"}, "row 2 has no answer"),
        ({"problem": "p", "answer": float("nan")}, "row 2 has no answer"),
        ({"problem": "p"}, "row 2 has no answer"),
        ({"problem": "p", "answer": float("inf")}, "row 2 has no answer"),
        ({"problem": "p", "answer": {"value": 1}}, "row 2 has no answer"),
        ({"problem": "p", "answer": [["1"]]}, "row 2 has no answer"),
        ({"problem": "p\ud800", "answer": "1"}, "row 2 holds half of a surrogate pair"),
        ('{"problem": "p", "answer": %s}' % ("9" * 5000), "row 2 holds a number of too many digits"),
        (
            '{"problem": "p", "answer": %s}' % ("[" * 99_999),
            "row 2 holds a number of too many digits, or too deep a nesting",
        ),
    ],
)
def test_a_bad_row_is_named_or_skipped_and_counted(tmp_path, capsys, row, message):
    path = write_rows(tmp_path / "s.jsonl", [good(1), row, good(3)])
    with pytest.raises(DataError, match=message) as raised:
        read_problems(path)
    assert str(path) in str(raised.value) and "skip" in str(raised.value)
    assert [p.text for p in read_problems(path, on_bad_row="skip")] == ["p1", "p3"]
    said = capsys.readouterr().err
    assert "left out 1 unusable rows" in said and message in said


def test_a_difficulty_with_an_exponent_survives_writing_and_reading(tmp_path):
    for difficulty in (1e16, 1e-7, 0.3, 5.0):
        write_problems([Problem("a/1", "p", ("1",), difficulty=difficulty)], tmp_path / f"{difficulty}.jsonl")
        assert read_problems(tmp_path / f"{difficulty}.jsonl")[0].difficulty == difficulty
    for none in (float("nan"), float("inf"), 10**400, "9" * 400 + "/" + "9" * 400, True, {"a": 1}):
        (read,) = read_problems(write_rows(tmp_path / "s.jsonl", [good(1) | {"difficulty": none}]))
        assert read.difficulty is None


def test_a_prompt_that_is_not_a_list_has_no_problem_text(tmp_path):
    row = {"prompt": 5, "reward_model": {"ground_truth": "1"}}
    with pytest.raises(DataError, match="row 1 has no problem text"):
        read_problems(write_rows(tmp_path / "s.jsonl", [row]))


def test_gsm8k_row_without_its_mark_has_no_answer(tmp_path):
    rows = [{"question": "q", "answer": "a long way to 72"}, {"question": "r", "answer": "so\n#### 72"}]
    with pytest.raises(DataError, match="row 1 has no answer"):
        read_problems(write_rows(tmp_path / "s.jsonl", rows))


def test_minerva_olympiad_and_math_rows_are_read(tmp_path):
    minerva = write_rows(tmp_path / "minerva.jsonl", [{"question": "q", "answer": r"\frac{1}{2}"}])
    assert read_problems(minerva)[0].answers == (r"\frac{1}{2}",)
    olympiad = write_rows(tmp_path / "olympiad.jsonl", [{"question": "q", "final_answer": ["2", "3"], "answer": "x"}])
    assert read_problems(olympiad)[0].answers == ("2", "3")
    math = write_rows(tmp_path / "math.jsonl", [good(1) | {"level": "Level 5", "subject": "Algebra"}])
    (problem,) = read_problems(math)
    assert (problem.difficulty, problem.type) == (5.0, "Algebra")


def test_a_problem_without_an_answer_is_kept_only_on_request(tmp_path, capsys):
    rows = [good(1), {"problem": "p2", "answer": ""}, {"problem": "p3", "answer": None}, good(4)]
    path = write_rows(tmp_path / "s.jsonl", rows)
    assert [p.answers for p in read_problems(path, on_bad_row="keep")] == [("1",), (), (), ("4",)]
    assert "kept, as problems that nothing can solve, 2 unusable rows (row 2 has no answer, row 3" in (
        capsys.readouterr().err
    )
    rows[1]["problem"] = " "
    with pytest.raises(DataError, match="row 2 has no problem text"):
        read_problems(write_rows(tmp_path / "t.jsonl", rows), on_bad_row="keep")


def test_a_missing_file_is_reported_with_the_nearest_name(tmp_path):
    write_rows(tmp_path / "train.jsonl", [good(1)])
    write_rows(tmp_path / "other.jsonl", [good(1)])
    with pytest.raises(DataError, match=r"trian\.jsonl does not exist; did you mean .*train\.jsonl"):
        read_problems(tmp_path / "trian.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="is a folder; .*holds no .parquet"):
        read_problems(tmp_path / "empty")
    with pytest.raises(DataError, match="the folder .*nowhere does not exist"):
        read_problems(tmp_path / "nowhere" / "train.jsonl")


def test_unknown_columns_are_shown(tmp_path):
    with pytest.raises(DataError, match="has the columns prob, ans, which is no known schema"):
        read_problems(write_rows(tmp_path / "s.jsonl", [{"prob": "p", "ans": "1"}]), on_bad_row="skip")


def test_unreadable_files_are_reported(tmp_path):
    (tmp_path / "a.json").write_text('[{"problem": "p",\n oops]')
    with pytest.raises(DataError, match=r"a\.json, line 2 is malformed JSON"):
        read_problems(tmp_path / "a.json")
    (tmp_path / "e.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no rows"):
        read_problems(tmp_path / "e.jsonl")
    (tmp_path / "b.jsonl").write_text("nonsense\n")
    with pytest.raises(DataError, match="no usable row: row 1 is malformed"):
        read_problems(tmp_path / "b.jsonl", on_bad_row="skip")
    (tmp_path / "l.jsonl").write_bytes(b'{"problem": "\xe9"}')
    with pytest.raises(DataError, match="is not UTF-8"):
        read_problems(tmp_path / "l.jsonl")
    (tmp_path / "t.xls").write_text("a,b")
    with pytest.raises(DataError, match="is not one of .parquet"):
        read_problems(tmp_path / "t.xls")
    with pytest.raises(DataError, match="on_bad_row is 'ignore'"):
        read_problems(tmp_path / "e.jsonl", on_bad_row="ignore")
    pytest.importorskip("pyarrow")
    (tmp_path / "p.parquet").write_text("not parquet at all")
    with pytest.raises(DataError, match="is not a readable parquet file"):
        read_problems(tmp_path / "p.parquet")


# ---- the hub -------------------------------------------------------------------------------------


CHAT = [{"role": "user", "content": "3+4?"}, {"role": "assistant", "content": "7"}]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Replace the hub with local files; returns the list of requested file names."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    files = {
        "README.md": [],
        "data/train-00000-of-00002.jsonl": [{**good(1), "id": "a"}, {**good(2), "id": "b"}],
        "data/train-00001-of-00002.jsonl": [{**good(3), "id": "b"}],
        "data/test-00000-of-00001.jsonl": [{**good(4), "id": "t"}],
        "data/turns-00000-of-00001.jsonl": [{"messages": CHAT}],
        "data/verify-00000-of-00001.jsonl": [{"messages": CHAT[:1], "ground_truth": "7"}],
    }
    requested = []

    def hf_hub_download(repo_id, filename, *, repo_type):
        assert repo_type == "dataset"
        requested.append(filename)
        return str(write_rows(tmp_path / filename.replace("/", "-"), files[filename]))

    def list_repo_files(self, repo_id, *, repo_type):
        return ["README.md", "data/test-00000-of-00001.jsonl"] if repo_id == "owner/tests" else list(files)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", list_repo_files)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    return requested


def test_hub_dataset_reads_all_shards_of_its_split(hub):
    read = read_problems("owner/set")
    assert hub == ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"]
    assert [p.text for p in read] == ["p1", "p2", "p3"]
    # "b" names one problem in each shard
    assert read[0].id == "set/a" and read[1].id != read[2].id and all(p.id.startswith("set/") for p in read)
    assert [p.id for p in read_problems("owner/set:test")] == ["set/t"]
    with pytest.raises(DataError, match="no data file for dev; it has: data/test-"):
        read_problems("owner/set:dev")


def test_hub_dataset_without_a_train_split_is_read_whole(hub):
    assert [p.text for p in read_problems("owner/tests")] == ["p4"]


def test_hub_errors_become_one_sentence(hub, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import HTTPError

    for error in (HTTPError("no such host"), ConnectionError("offline\nsecond line"), ValueError("bad id")):

        def fails(self, repo_id, *, repo_type, error=error):
            raise error

        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", fails)
        with pytest.raises(DataError, match=f"owner/set is not a local file.*{str(error)[:7]}") as raised:
            read_problems("owner/set")
        assert "\n" not in str(raised.value)


def test_a_path_is_never_looked_up_on_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for source in ("data/train", "nowhere/train.jsonl"):
        with pytest.raises(DataError, match="data holds no .parquet, .jsonl, .json, .csv, .*file|folder nowhere does not exist"):
            read_problems(source)
    assert hub == []


# ---- prompts and contamination -------------------------------------------------------------------


def test_instruction_is_appended_once():
    bare = Problem("a", "What is 1+1?\n", ("2",))
    assert prompt_text(bare) == f"What is 1+1? {INSTRUCTION}"
    carries = Problem("a", f"What is 1+1? {INSTRUCTION}", ("2",))
    assert prompt_text(carries) == carries.text


def test_contamination_ignores_instruction_case_and_spacing():
    train = [problem("a", "Find $x+1$."), problem("b", "Find $x-1$.")]
    copy = problem("c", f"find $ x + 1 $. {INSTRUCTION}")
    assert benchmark_copies(train, [copy]) == [(train[0], copy)]
    assert benchmark_copies(train, [problem("c", "Find $x+12$.")]) == []
    copy = problem("c", "find x+1.")
    assert benchmark_copies(train, [problem("d"), copy, problem("e", "find x+1.")]) == [(train[0], copy)]
    assert benchmark_copies(train, train) == list(zip(train, train, strict=True))  # training data that is the benchmark


def test_chats_of_the_hub_are_read_like_those_of_a_file(hub):
    assert has_chats("owner/set:turns") and read_chats("owner/set:turns") == [CHAT]
    assert not has_chats("owner/set:test")
    assert not has_chats("owner/set:verify") and read_problems("owner/set:verify")[0].answers == ("7",)


def test_a_parquet_file_without_messages_holds_no_chats(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for rows, chats in ([{"problem": "p"}], False), ([{"problem": "p", "answer": "1"}], False), ([{"messages": CHAT}], True):
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "s.parquet")
        assert has_chats(tmp_path / "s.parquet") == chats


# ---- real files, real sizes ----------------------------------------------------------------------

REAL = [  # rows, rows without an answer, duplicates
    ("benchmarks/aime24.parquet", 30, 0, 0),
    ("benchmarks/aime25.parquet", 30, 0, 0),
    ("benchmarks/amc23.parquet", 83, 0, 0),
    ("benchmarks/minerva.parquet", 272, 0, 0),
    ("benchmarks/olympiad.parquet", 675, 0, 0),
    ("gsm8k/train.jsonl", 7473, 0, 0),
    ("gsm8k/test.jsonl", 1319, 0, 0),
    ("math/math_train.json", 7474, 4, 3),
    ("math/math500.json", 500, 0, 0),
    ("math/aime_1983_2023.json", 975, 0, 0),
]


@needs_data
@pytest.mark.parametrize("name, rows, unanswered, repeated", REAL)
def test_a_real_file_is_read_completely(name, rows, unanswered, repeated, capsys):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    read = read_problems(DATA / name, on_bad_row="skip" if unanswered else "stop")
    assert len(read) == rows - unanswered - repeated
    assert len({p.id for p in read}) == len(read)
    assert all(a == a.strip() and a and "####" not in a for p in read for a in p.answers)
    assert all(prompt_text(p).count(INSTRUCTION) == 1 and prompt_text(p).endswith(" " + INSTRUCTION) for p in read)
    said = capsys.readouterr().err
    assert ("unusable" in said) == bool(unanswered) and ("duplicate" in said) == bool(repeated)
    if name.startswith("gsm8k"):
        assert all(p.solution.endswith(f"\\boxed{{{p.answers[0]}}}.") and "<<" not in p.solution for p in read)
        assert all(p.answers[0].lstrip("-").isdigit() for p in read)


@needs_data
def test_real_minerva_answers_lose_their_newlines_and_repeats():
    pytest.importorskip("pyarrow")
    read = read_problems(DATA / "benchmarks" / "minerva.parquet")
    assert Counter(len(p.answers) for p in read) == {1: 232, 2: 38, 3: 2}
    assert read[0].answers == ("9.6",) and read[0].id == "minerva/0"


def test_53_000_problems_are_read_in_seconds(tmp_path):
    text = "Let $x_{%d}$ be the number of ways to tile a board. " * 6
    row = json.dumps(verl(text + "Find it.", "%d", {"index": "%d"}))
    path = tmp_path / "polaris.jsonl"
    path.write_text("\n".join(row % ((n,) * 8) for n in range(53_000)))
    start = time.process_time()
    assert len(read_problems(path)) == 53_000
    assert time.process_time() - start < 5


def test_53_000_problems_are_compared_in_seconds():
    text = "Let $x_{%d}$ be the number of ways to tile a board. " * 6
    train = [problem(f"train/{n}", text % ((n % 50_000,) * 6)) for n in range(53_000)]
    benchmark = [problem(f"test/{n}", (text % ((49_000 + n,) * 6)).upper()) for n in range(2_000)]
    start = time.process_time()
    repeated, leaked = duplicated(train), benchmark_copies(train, benchmark)
    assert time.process_time() - start < 5
    assert [p.id for p, _ in repeated] == [f"train/{n}" for n in range(50_000, 53_000)]
    assert [p.id for p, _ in leaked] == [f"train/{n}" for n in range(49_000, 50_000)]


def test_heavy_libraries_are_imported_only_where_they_are_used():
    source = Path(data_files.__file__).read_text()
    assert not {"import pyarrow", "import huggingface_hub"} & set(source.splitlines())
    assert "\nfrom huggingface_hub" not in source


def test_a_small_file_that_unpacks_to_a_huge_one_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(data_files, "MOST_BYTES", 1 << 20)
    monkeypatch.setattr(data_files, "MOST_ROWS", 5000)

    def repeated(text, times):
        return pa.DictionaryArray.from_arrays(pa.array([0] * times, pa.int32()), pa.array([text]))

    words, ones = repeated("x" * 100_000, 1100), repeated("1", 1100)
    message = pa.StructArray.from_arrays([repeated("user", 1100), words], ["role", "content"])
    prompts = pa.ListArray.from_arrays(pa.array(range(1101), pa.int32()), message)
    truths = pa.StructArray.from_arrays([ones], ["ground_truth"])
    bombs = {
        "text": pa.table({"problem": words, "answer": ones}),
        "nested": pa.table({"prompt": prompts, "reward_model": truths}),
        "large": pa.table({"prompt": prompts.cast(pa.large_list(message.type)), "reward_model": truths}),
        "rows": pa.table({"problem": repeated("1+1", 5001), "answer": repeated("2", 5001)}),
        "list": pa.table({"problem": ["1+1"], "answers": [["2"] * 5001]}),
    }
    for name, table in bombs.items():
        path = tmp_path / f"{name}.parquet"
        parquet.write_table(table, path, store_schema=name == "large", compression="zstd")
        assert path.stat().st_size < 10_000
        usual = pa.default_memory_pool()
        pool = pa.proxy_memory_pool(usual)
        pa.set_memory_pool(pool)
        try:
            with pytest.raises(DataError, match=f"{name}.parquet holds more than 5,000 rows"):
                read_problems(path)
        finally:
            pa.set_memory_pool(usual)
        assert pool.max_memory() < 20e6  # bytes; the texts alone are 110e6
    write_rows(tmp_path / "rows.jsonl", [good(0)] * 5001)
    write_rows(tmp_path / "long.jsonl", [{"problem": "x" * (1 << 20), "answer": "1"}])
    for name in ("rows", "long"):
        with pytest.raises(DataError, match=f"{name}.jsonl holds more than 5,000 rows"):
            read_problems(tmp_path / f"{name}.jsonl")


def test_bytes_that_are_no_utf8_are_counted_from_the_start_of_the_file(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"problem": "a", "answer": "1"}\n{"problem": "' + "ü".encode("latin-1") + b'"}\n')
    with pytest.raises(DataError, match="not UTF-8 text .at byte 45"):
        read_problems(path)
    table = tmp_path / "latin.csv"
    table.write_bytes(b"problem,answer\np1,1\np" + "ü".encode("latin-1") + b",2\n")
    with pytest.raises(DataError, match="not UTF-8 text .at byte 21"):
        read_problems(table)
    table.write_bytes(b"\xef\xbb\xbfproblem,answer\np1,1\n")
    assert [p.text for p in read_problems(table)] == ["p1"]


def test_nested_texts_in_several_row_groups_are_read(tmp_path):
    """Regression: the size check could not read DAPO's and POLARIS's messages in files of several row groups."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [
        {"prompt": [{"role": "user", "content": f"{i} + 1?"}], "reward_model": {"ground_truth": str(i + 1)}}
        for i in range(40)
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet", row_group_size=10)
    assert [problem.answers for problem in read_problems(tmp_path / "d.parquet")] == [(str(i + 1),) for i in range(40)]


# ---- shapes of popular data sets -----------------------------------------------------------------

USER = [{"role": "user", "content": "p?"}]
SHAPES = {  # one row, and the answers to "p?"
    "numina_cot": ({"source": "cn", "problem": "p?", "solution": r"So $\boxed{6}$, no: $\boxed{\frac{7}{2}}$.",
                    "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
                   (r"\frac{7}{2}",)),
    "math_lighteval": ({"problem": "p?", "level": "Level 2", "type": "Algebra", "solution": r"It is $\boxed{7}$."}, ("7",)),
    "numina15": ({"problem": "p?", "solution": r"\boxed{8}", "answer": "7", "question_type": "proof"}, ("7",)),
    "capitals": ({"ID": "I-1", "Problem": "p?", "Solution": "s", "Answer": 204}, ("204",)),
    "spaced": ({"Problem Number": 3, "Question": "p?", "Final Answer": "7"}, ("7",)),
    "trl": ({"prompt": USER, "solution": "7"}, ("7",)),
    "pa": ({"prompt": "p?", "answer": "7"}, ("7",)),
    "unsloth": ({"prompt": [{"role": "system", "content": "Reason."}, *USER], "answer": "7"}, ("7",)),
    "omr": ({"problem": "p?", "expected_answer": "7", "generated_solution": "s"}, ("7",)),
    "rlvr": ({"messages": USER, "ground_truth": "7", "dataset": "math"}, ("7",)),
    "dapo_processed": ({"prompt": "p?", "solution": "34", "source_prompt": [{"role": "user", "content": "x"}],
                        "reward_model": {"ground_truth": "34"}}, ("34",)),
    "prompt_json": ({"prompt": json.dumps(USER), "reward_model": json.dumps({"ground_truth": "7"})}, ("7",)),
    "prompt_python": ({"prompt": str(USER), "answer": "7"}, ("7",)),
    "spaced_list": (verl("p?", '[ "7" ]', {"index": 1}), ("7",)),
    "number_list": (verl("p?", "[7]", {"index": 1}), ("7",)),
    "python_list": (verl("p?", "['7', '8']", {"index": 1}), ("7", "8")),
    "latex_list": (verl("p?", r"['\frac{1}{2}']", {"index": 1}), (r"\frac{1}{2}",)),
    "escaped_list": (verl("p?", json.dumps([r"\frac{1}{2}"]), {"index": 1}), (r"\frac{1}{2}",)),
    "interval": (verl("p?", "[1, 2]", {"index": 1}), ("[1, 2]",)),
    "numpy_list": (verl("p?", "['7' '8']", {"index": 1}), ("['7' '8']",)),
    "sentence": ({"problem": "p?", "answer": r"The answer is $\boxed{12}$."}, ("12",)),
    "gsm8k_problem": ({"problem": "p?", "answer": "3+4=7\n#### 1,007"}, ("1007",)),
    "gsm8k_trl": ({"prompt": USER, "solution": "3+4=7\n#### 7"}, ("7",)),
    "boxed_list": ({"prompt": "p?", "solutions": [r"\boxed{7}"]}, ("7",)),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_a_popular_shape_is_read_as_it_is(tmp_path, name):
    row, answers = SHAPES[name]
    (read,) = read_problems(write_rows(tmp_path / "s.jsonl", [row]))
    assert (read.text, read.answers) == ("p?", answers)


def test_proof_and_notfound_are_no_answers(tmp_path, capsys):
    rows = [{"problem": f"p{n}", "solution": r"\boxed{1}", "answer": a} for n, a in enumerate(["7", "proof", "notfound"])]
    path = write_rows(tmp_path / "s.jsonl", rows)
    assert [p.answers for p in read_problems(path, "skip")] == [("7",)]
    assert "left out 2 unusable rows (row 2 has no answer (proof), row 3 has no answer (notfound))" in capsys.readouterr().err


def test_a_worked_solution_without_a_box_has_no_answer(tmp_path):
    rows = [{"problem": f"p{n}", "solution": s} for n, s in enumerate([r"It is $\boxed{7}$.", "It is 8."])]
    with pytest.raises(DataError, match="row 2 has no answer"):
        read_problems(write_rows(tmp_path / "s.jsonl", rows))
    with pytest.raises(DataError, match="row 1 has no answer"):
        read_problems(write_rows(tmp_path / "l.jsonl", [{"problem": "p", "solution": "We add.\nIt is 8."}]))


def test_other_columns_are_named(tmp_path):
    rows = [{"Q": "p?", "meta": {"gold": r"so \boxed{7}"}, "n": 3}]
    path = write_rows(tmp_path / "s.jsonl", rows)
    with pytest.raises(DataError, match=r"has the columns Q, meta, n.*columns = \{ problem.*--columns problem="):
        read_problems(path)
    (read,) = read_problems(path, columns=Columns(problem="Q", answer="meta.gold", difficulty="n"))
    assert (read.text, read.answers, read.difficulty) == ("p?", ("7",), 3.0)
    with pytest.raises(DataError, match="has the columns Q, meta, n.*no R"):
        read_problems(path, columns=Columns(problem="R", answer="n"))


def test_choices_beside_a_question_are_not_dropped_silently(tmp_path, capsys):
    path = write_rows(tmp_path / "c.jsonl", [{"question": "3+4?", "Options": ["6", "7"], "answer": "B"}])
    assert read_problems(path)[0].answers == ("B",)
    assert "the model is not shown Options; where a problem needs it" in capsys.readouterr().err


def test_different_answers_are_no_duplicates(tmp_path, capsys):
    rows = [{"problem": "p", "answer": "7"}, {"problem": "p ", "answer": "8"}, {"problem": "q", "answer": r"\frac12"},
            {"problem": "q", "answer": r"\frac{1}{2}"}, {"id": 4, "problem": "r", "answer": "1"},
            {"id": 5, "problem": "r", "answer": "2"}]  # fmt: skip
    path = write_rows(tmp_path / "s.jsonl", rows)
    assert [p.text for p in read_problems(path)] == ["q"]
    said = capsys.readouterr().err
    assert "left out 2 problems with different answers" in said and "has 7 and" in said and "s/5 has 2" in said
    assert "left out 1 duplicate rows" in said
    assert [(p.text, p.answers) for p in read_problems(path, "keep")] == [("p", ()), ("q", (r"\frac12",)), ("r", ())]


def test_answers_that_only_mathematics_can_compare_are_not_called_different(tmp_path, capsys):
    rows = [{"problem": "p", "answer": a} for a in (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}")]
    (read,) = read_problems(write_rows(tmp_path / "s.jsonl", rows))
    assert read.answers == (r"\frac{\sqrt{2}}{2}",)
    said = capsys.readouterr().err
    assert "left out 1 duplicate rows" in said and "different answers" not in said


def test_problems_that_differ_in_lines_or_letter_case_are_different(tmp_path, capsys):
    texts = ["Grid:\n1 2\n3 4", "Grid:\n1 2 3 4", "Grid:\n1 2\n34", "Count the letters S.", "Count the letters s."]
    rows = [{"problem": text, "answer": str(n)} for n, text in enumerate(texts)]
    read = read_problems(write_rows(tmp_path / "s.jsonl", rows))
    assert [p.text for p in read] == texts and len({p.id for p in read}) == 5 and not capsys.readouterr().err
    assert read_problems(write_rows(tmp_path / "s.jsonl", rows[::-1]))[::-1] == read
    copies = [{"problem": text, "answer": "1"} for text in ("Find x. ", "find  X.", "Find x.", "Find x.\n")]
    assert [p.text for p in read_problems(write_rows(tmp_path / "c.jsonl", copies))] == ["Find x. "]


def test_gzip_csv_and_wrapped_files_are_read(tmp_path):
    line = json.dumps({"problem": "p?", "answer": "7"})
    with gzip.open(tmp_path / "x.jsonl.gz", "wt") as file:
        file.write(line)
    with gzip.open(tmp_path / "x.json.gz", "wt") as file:
        file.write(f"[{line}]")
    with (tmp_path / "x.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["ID", "Question", "Answer"], ["1", "p?", "7"]])
    (tmp_path / "x.json").write_text(json.dumps({"version": 1, "data": [json.loads(line)]}, indent=2))
    (tmp_path / "y.json").write_text(json.dumps({"data": [json.loads(line)]}))
    for name in ("x.jsonl.gz", "x.json.gz", "x.csv", "x.json", "y.json"):
        (read,) = read_problems(tmp_path / name)
        assert (read.text, read.answers, read.id[:2]) == ("p?", ("7",), f"{name[0]}/")
    (tmp_path / "cut.jsonl.gz").write_bytes((tmp_path / "x.jsonl.gz").read_bytes()[:-9])
    with pytest.raises(DataError, match="cut.jsonl.gz is not a complete gzip file"):
        read_problems(tmp_path / "cut.jsonl.gz")
    (tmp_path / "bad.csv").write_text("problem,answer\np,7,8\n")
    with pytest.raises(DataError, match="row 1 has more fields than the first line"):
        read_problems(tmp_path / "bad.csv")


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", ["tests", "generations", "options"])
def test_a_list_of_objects_within_a_problem_holds_no_rows(tmp_path, name, count):
    rows = [good(n) | {name: [{"input": "1", "output": "2"}]} for n in range(count)]
    assert [p.text for p in read_problems(write_rows(tmp_path / "s.jsonl", rows))] == ["p0", "p1"][:count]
    named = [{"Q": f"p{n}", "A": "1", name: [{"input": "1"}]} for n in range(2)]
    read = read_problems(write_rows(tmp_path / "t.jsonl", named), columns=Columns(problem="Q", answer="A"))
    assert [p.text for p in read] == ["p0", "p1"]


@pytest.mark.parametrize("indent", [None, 2])
def test_wrapped_problems_may_have_a_type(tmp_path, indent):
    (tmp_path / "s.json").write_text(json.dumps({"data": [good(1) | {"type": "Algebra"}]}, indent=indent))
    assert [(p.text, p.type) for p in read_problems(tmp_path / "s.json")] == [("p1", "Algebra")]


def test_a_packed_file_that_unpacks_to_a_huge_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(data_files, "MOST_BYTES", 1 << 20)
    with gzip.open(tmp_path / "x.jsonl.gz", "wt") as file:
        file.write(json.dumps({"problem": "x" * (1 << 20), "answer": "1"}))
    with pytest.raises(DataError, match="holds more than"):
        read_problems(tmp_path / "x.jsonl.gz")


def test_a_cloned_folder_is_read_by_its_split(tmp_path, capsys):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "repo" / "data").mkdir(parents=True)
    for n, name in enumerate(["train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"]):
        parquet.write_table(pyarrow.Table.from_pylist([good(n)]), tmp_path / "repo" / "data" / f"{name}.parquet")
    (tmp_path / "repo" / "dataset_infos.json").write_text("{}")
    assert [p.text for p in read_problems(tmp_path / "repo")] == ["p0", "p1"]
    assert "reads its split train" in capsys.readouterr().err
    assert [p.text for p in read_problems(f"{tmp_path / 'repo'}:test")] == ["p2"]
    assert [p.text for p in read_problems(tmp_path / "repo" / "data")] == ["p0", "p1"]


def test_an_instruction_that_asks_for_another_form_is_found():
    theirs = problem("a", 'Solve it. Put your answer after "Answer:".')
    assert asks_otherwise(theirs) and not asks_otherwise(theirs, "") and not asks_otherwise(problem("b", "What is 1+1?"))
