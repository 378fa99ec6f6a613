"""Reading problems, their history, the filter, the drop and the order of training."""

import json
import math
import time
from collections import Counter
from pathlib import Path

import pytest

import data_filter
from data_filter import (
    INSTRUCTION,
    DataError,
    DataOrder,
    History,
    Problem,
    Visit,
    contaminated,
    draw_histogram,
    drop_easy,
    filter_mirrored_j,
    histogram,
    prompt_text,
    read_problems,
    require_batch,
    verdict,
    write_problems,
    zero_variance_share,
)

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the real problems are not here")


def write_rows(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def good(n):
    return {"problem": f"p{n}", "answer": str(n)}


def problem(id, text="", answers=("1",)):
    return Problem(id, text or f"What is {id}?", answers)


def history_of(*visits):
    history = History()
    for problem_id, stage, step, rewards in visits:
        history.append(Visit(problem_id, stage, step, tuple(rewards)))
    return history


def solved(k, of=8):
    return (1.0,) * k + (0.0,) * (of - k)


# ---- schemas -------------------------------------------------------------------------------------


def test_gsm8k_answer_loses_its_thousands_separators_and_the_solution_its_calculator_marks(tmp_path):
    rows = [{"question": "How much?", "answer": "He has 40*27 = <<40*27=1080>>1,080 left.\n#### 1,080"}]
    (read,) = read_problems(write_rows(tmp_path / "gsm.jsonl", rows))
    assert read.text == "How much?" and read.answers == ("1080",)
    assert read.solution == "He has 40*27 = 1,080 left.\nThe final answer is \\boxed{1080}."


def verl(content, truth, extra):
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]
    return {"prompt": prompt, "reward_model": {"ground_truth": truth}, "extra_info": extra}


def test_verl_ground_truths_are_strings_floats_or_lists_with_stray_newlines(tmp_path):
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


def test_verl_parquet_reads_as_json_does(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    rows = [verl("a?", ["1\n", "2"], {"index": 7})]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "set.parquet")
    assert read_problems(tmp_path / "set.parquet") == read_problems(write_rows(tmp_path / "set.jsonl", rows))


def test_earlier_turns_of_a_conversation_are_not_dropped_in_silence(tmp_path):
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
    # a closed interval is JSON too, but no list of answers
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


def test_json_is_told_from_json_lines_by_content(tmp_path):
    lines = write_rows(tmp_path / "a.json", [{"problem": "p", "answer": "1"}, {"problem": "q", "answer": "2"}])
    array = tmp_path / "a.jsonl"
    array.write_text(json.dumps([{"problem": "p", "answer": "1"}, {"problem": "q", "answer": "2"}]))
    assert read_problems(lines) == read_problems(array)


# ---- ids and duplicates --------------------------------------------------------------------------


def test_an_id_used_for_different_problems_gives_way_to_a_hash(tmp_path):
    rows = [{"id": 1, **good(1)}, {"id": 1, **good(2)}, {"id": 2, **good(3)}]
    read = read_problems(write_rows(tmp_path / "s.jsonl", rows))
    again = read_problems(write_rows(tmp_path / "s.jsonl", rows[::-1]))[::-1]
    assert read == again  # a hash does not depend on the place in the file
    assert len({p.id for p in read}) == 3 and read[2].id == "s/2" and "s/1" not in {p.id for p in read}


def test_duplicates_are_dropped_and_counted(tmp_path, capsys):
    texts = ["What is $x + 1$?", "What is  $x+1$?\n", "r"]
    rows = [{"problem": text, "answer": "1"} for text in texts]
    read = read_problems(write_rows(tmp_path / "s.jsonl", rows))
    said = capsys.readouterr().err
    assert [p.text for p in read] == ["What is $x + 1$?", "r"]
    assert "left out 1 duplicate rows" in said and read[0].id in said and said.count("\n") == 1


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row, message",
    [
        ('{"problem": "p", ', "row 2 is malformed JSON"),
        ("[1, 2]", "row 2 is no JSON object"),
        ('"p"', "row 2 is no JSON object"),
        ({"problem": "  ", "answer": "1"}, "row 2 has no problem text"),
        ({"problem": "p", "answer": None}, "row 2 has no answer"),
        ({"problem": "p", "answer": " \n"}, "row 2 has no answer"),
        ({"problem": "p", "answer": float("nan")}, "row 2 has no answer"),
        ({"problem": "p"}, "row 2 has no answer"),
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


def test_gsm8k_row_without_its_mark_has_no_answer(tmp_path):
    rows = [{"question": "q", "answer": "a long way to 72"}, {"question": "r", "answer": "so\n#### 72"}]
    with pytest.raises(DataError, match="row 1 has no answer"):
        read_problems(write_rows(tmp_path / "s.jsonl", rows))


def test_benchmarks_of_the_hub_have_plain_or_several_answers_and_levels(tmp_path):
    minerva = write_rows(tmp_path / "minerva.jsonl", [{"question": "q", "answer": r"\frac{1}{2}"}])
    assert read_problems(minerva)[0].answers == (r"\frac{1}{2}",)
    olympiad = write_rows(tmp_path / "olympiad.jsonl", [{"question": "q", "final_answer": ["2", "3"], "answer": "x"}])
    assert read_problems(olympiad)[0].answers == ("2", "3")
    math = write_rows(tmp_path / "math.jsonl", [good(1) | {"level": "Level 5", "subject": "Algebra"}])
    (problem,) = read_problems(math)
    assert (problem.difficulty, problem.type) == (5.0, "Algebra")


def test_a_problem_without_an_answer_is_kept_only_when_asked(tmp_path, capsys):
    rows = [good(1), {"problem": "p2", "answer": ""}, {"problem": "p3", "answer": None}, good(4)]
    path = write_rows(tmp_path / "s.jsonl", rows)
    assert [p.answers for p in read_problems(path, on_bad_row="keep")] == [("1",), (), (), ("4",)]
    assert "kept, as problems that nothing can solve, 2 unusable rows (row 2 has no answer, row 3" in (
        capsys.readouterr().err
    )
    rows[1]["problem"] = " "
    with pytest.raises(DataError, match="row 2 has no problem text"):
        read_problems(write_rows(tmp_path / "t.jsonl", rows), on_bad_row="keep")


def test_missing_file_names_the_nearest(tmp_path):
    write_rows(tmp_path / "train.jsonl", [good(1)])
    write_rows(tmp_path / "other.jsonl", [good(1)])
    with pytest.raises(DataError, match=r"trian\.jsonl does not exist; did you mean .*train\.jsonl"):
        read_problems(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match="is a folder; did you mean"):
        read_problems(tmp_path)
    with pytest.raises(DataError, match="the folder .*nowhere does not exist"):
        read_problems(tmp_path / "nowhere" / "train.jsonl")


def test_unknown_columns_are_shown(tmp_path):
    with pytest.raises(DataError, match="has the columns prob, ans, which is no known schema"):
        read_problems(write_rows(tmp_path / "s.jsonl", [{"prob": "p", "ans": "1"}]), on_bad_row="skip")


def test_unreadable_files_say_so(tmp_path):
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
    (tmp_path / "t.csv").write_text("a,b")
    with pytest.raises(DataError, match="is not one of .parquet"):
        read_problems(tmp_path / "t.csv")
    with pytest.raises(DataError, match="on_bad_row is 'ignore'"):
        read_problems(tmp_path / "e.jsonl", on_bad_row="ignore")
    pytest.importorskip("pyarrow")
    (tmp_path / "p.parquet").write_text("not parquet at all")
    with pytest.raises(DataError, match="is no readable parquet file"):
        read_problems(tmp_path / "p.parquet")


# ---- the hub -------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the hub: the files of a dataset, and those that were asked for."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    files = {
        "README.md": [],
        "data/train-00000-of-00002.jsonl": [{**good(1), "id": "a"}, {**good(2), "id": "b"}],
        "data/train-00001-of-00002.jsonl": [{**good(3), "id": "b"}],
        "data/test-00000-of-00001.jsonl": [{**good(4), "id": "t"}],
    }
    asked = []

    def hf_hub_download(repo_id, filename, *, repo_type):
        assert repo_type == "dataset"
        asked.append(filename)
        return str(write_rows(tmp_path / filename.replace("/", "-"), files[filename]))

    def list_repo_files(self, repo_id, *, repo_type):
        return ["README.md", "data/test-00000-of-00001.jsonl"] if repo_id == "owner/tests" else list(files)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", list_repo_files)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    return asked


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
        with pytest.raises(DataError, match=f"owner/set is no local file.*{str(error)[:7]}") as raised:
            read_problems("owner/set")
        assert "\n" not in str(raised.value)


def test_a_path_is_never_taken_for_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for source in ("data/train", "nowhere/train.jsonl"):
        with pytest.raises(DataError, match="nor does data hold|folder nowhere does not exist"):
            read_problems(source)
    assert hub == []


# ---- prompts and contamination -------------------------------------------------------------------


def test_instruction_is_appended_once():
    bare = Problem("a", "What is 1+1?\n", ("2",))
    assert prompt_text(bare) == f"What is 1+1? {INSTRUCTION}"
    carries = Problem("a", f"What is 1+1? {INSTRUCTION}", ("2",))
    assert prompt_text(carries) == carries.text


def test_contamination_sees_through_instruction_case_and_spacing():
    train = [problem("a", "Find $x+1$."), problem("b", "Find $x-1$.")]
    assert contaminated(train, [problem("c", f"find $ x + 1 $. {INSTRUCTION}")]) == train[:1]
    assert contaminated(train, [problem("c", "Find $x+12$.")]) == []


# ---- history -------------------------------------------------------------------------------------


def test_pass_rate_weighs_rollouts_and_can_start_at_a_stage():
    history = history_of(("a", -1, 0, solved(8)), ("a", 0, 3, solved(0)), ("a", 1, 9, solved(1, of=4)))
    assert history.pass_rate("a") == 9 / 20
    assert history.pass_rate("a", since_stage=0) == 1 / 12
    assert history.pass_rate("a", since_stage=2) is None and history.pass_rate("b") is None
    assert [v.step for v in history.visits("a")] == [0, 3, 9]
    with pytest.raises(DataError, match="the visit to a at step 4 has no rewards"):
        history.append(Visit("a", 0, 4, ()))


def test_a_replayed_step_is_not_counted_twice():
    history = history_of(("a", 0, 3, solved(2)), ("a", 0, 4, solved(8)), ("a", 0, 3, solved(2)))
    assert history.pass_rate("a") == 10 / 16 and len(history.visits("a")) == 2


def test_history_survives_a_checkpoint_and_a_file(tmp_path):
    history = history_of(("a", -1, 0, solved(3)), ("b", 0, 1, (0.5, 1.0)))
    other = history_of(("c", 0, 0, solved(1)))
    other.load_state_dict(json.loads(json.dumps(history.state_dict())))
    assert other.log == history.log and other.visits("c") == []
    history.save(tmp_path / "h.jsonl")
    assert History.load(tmp_path / "h.jsonl").state_dict() == history.state_dict()
    with pytest.raises(DataError, match="does not exist"):
        History.load(tmp_path / "none.jsonl")


def test_a_second_save_does_not_read_the_file_again(tmp_path, monkeypatch):
    history_of(("a", 0, 0, solved(3))).save(tmp_path / "h.jsonl")
    history = history_of(("b", 0, 1, solved(4)))
    history.save(tmp_path / "h.jsonl")
    monkeypatch.setattr(History, "load", None)
    history.append(Visit("c", 0, 2, solved(5)))
    history.save(tmp_path / "h.jsonl")
    assert len((tmp_path / "h.jsonl").read_text().splitlines()) == 3


def test_history_file_is_only_appended_to(tmp_path):
    path = tmp_path / "h.jsonl"
    history = history_of(("a", 0, 0, solved(3)))
    for _ in range(2):
        history.save(path)
    assert len(path.read_text().splitlines()) == 1
    history.append(Visit("b", 0, 1, solved(4)))
    history.save(path)
    # a history that comes from a checkpoint adds only what the file lacks
    resumed = History()
    resumed.load_state_dict(history.state_dict())
    resumed.append(Visit("c", 0, 2, solved(5)))
    resumed.save(path)
    assert [json.loads(line)["problem_id"] for line in path.read_text().splitlines()] == ["a", "b", "c"]


def test_a_half_written_last_line_is_dropped_counted_and_overwritten(tmp_path, capsys):
    path = tmp_path / "h.jsonl"
    history_of(("a", 0, 0, solved(3)), ("b", 0, 0, solved(4))).save(path)
    path.write_text(path.read_text()[:-9])
    loaded = History.load(path)
    assert loaded.lines_dropped == 1 and "half-written" in capsys.readouterr().err
    assert loaded.pass_rate("a") == 3 / 8 and loaded.pass_rate("b") is None
    loaded.append(Visit("c", 0, 1, solved(5)))
    loaded.save(path)
    assert History.load(path).lines_dropped == 0 and History.load(path).pass_rate("c") == 5 / 8
    path.write_text('{"problem_id": "a"}\n' + path.read_text())
    with pytest.raises(DataError, match="row 1 is no visit"):
        History.load(path)


# ---- shapes --------------------------------------------------------------------------------------


def test_histogram_rounds_to_the_nearest_and_verdict_names_the_shape():
    assert histogram([0, 0.05, 0.07, 0.5, 0.95, 1.0]) == [2, 1, 0, 0, 1, 0, 0, 0, 2]
    assert histogram([0.0, 0.5, 1.0], group_size=4) == [1, 0, 1, 0, 1]
    assert verdict([5, 3, 2, 2, 2, 3, 5, 10, 60]) == "J"
    assert verdict([30, 20, 12, 9, 7, 6, 5, 4, 0]) == "mirrored J"
    assert verdict([60, 10, 5, 5, 5, 5, 5, 5, 0]) == "too hard"
    assert verdict([40, 3, 3, 3, 8, 3, 3, 3, 34]) == "U"
    assert verdict([1, 1, 1, 1, 9, 1, 1, 1, 1]) == "level"
    assert verdict([0] * 9) == "empty"


def test_zero_variance_share_is_both_ends_of_the_binomial():
    assert zero_variance_share([0.0, 1.0]) == 1.0
    assert math.isclose(zero_variance_share([0.5, 0.25]), (2 * 0.5**8 + 0.25**8 + 0.75**8) / 2)
    assert math.isclose(zero_variance_share([0.5], group_size=2), 0.5)
    assert zero_variance_share([]) == 0.0


def test_draw_histogram_shows_both_sides():
    lines = draw_histogram([4, 0, 8], [4, 0, 0], width=8).splitlines()
    assert lines[0].split() == ["solved", "before", "(J)", "after", "(too", "hard)"]
    assert [line.split() for line in lines[1:]] == [
        ["0/2", "4", "####", "4", "####"],
        ["1/2", "0", "0"],
        ["2/2", "8", "########", "0"],
        ["all", "12", "4"],
    ]


# ---- filter and drop -----------------------------------------------------------------------------


def ids(problems):
    return "".join(p.id for p in problems)


def test_filter_drops_the_perfect():
    history = history_of(("a", -1, 0, solved(8)), ("b", -1, 0, solved(7)), ("c", -1, 0, solved(1)))
    filtered = filter_mirrored_j([problem(i) for i in "abc"], history)
    assert ids(filtered.kept) == "bc" and ids(filtered.dropped) == "a"
    assert filtered.before == [0, 1, 0, 0, 0, 0, 0, 1, 1] and filtered.after == [0, 1, 0, 0, 0, 0, 0, 1, 0]


def test_filter_keeps_the_unsolved():
    history = history_of(("a", -1, 0, solved(0)), ("b", -1, 0, solved(4)))
    problems = [problem(i) for i in "ab"]
    assert ids(filter_mirrored_j(problems, history).kept) == "ab"
    assert ids(filter_mirrored_j(problems, history, keep_above=0.125).kept) == "b"
    assert ids(filter_mirrored_j(problems, history, keep_above=0.5).kept) == "b"  # inclusive
    assert ids(filter_mirrored_j(problems, history, drop_at=0.5).kept) == "a"


def test_filter_caps_the_share_of_the_unsolved_whatever_the_order():
    names = "abcdefghijklmnop"
    history = history_of(*[(i, -1, 0, solved(4 if i in "abcd" else 0)) for i in names])
    problems = [problem(i) for i in names]
    kept = filter_mirrored_j(problems, history, max_unsolved_share=1 / 3, seed=5).kept
    assert ids(kept) == "abcdnp"  # the same in every process
    backwards = filter_mirrored_j(problems[::-1], history, max_unsolved_share=1 / 3, seed=5).kept
    assert backwards == kept[::-1]
    assert len({ids(filter_mirrored_j(problems, history, max_unsolved_share=1 / 3, seed=s).kept) for s in range(5)}) > 1
    assert ids(filter_mirrored_j(problems, history, max_unsolved_share=0.0).kept) == "abcd"
    assert ids(filter_mirrored_j(problems, history, max_unsolved_share=1.0).kept) == names


def test_filter_refuses_a_problem_without_an_estimate():
    with pytest.raises(DataError, match=r"1 problems have no pass rate \(first: b\)"):
        filter_mirrored_j([problem("a"), problem("b")], history_of(("a", -1, 0, solved(4))))


def test_drop_uses_only_the_stage_just_ended():
    # the released script averages the whole history: 8/8 now would be diluted to 0.5
    history = history_of(("a", -1, 0, solved(0)), ("a", 0, 1, solved(8)), ("b", -1, 0, solved(8)), ("b", 0, 1, solved(7)))
    problems = [problem(i) for i in "ab"]
    assert ids(drop_easy(problems, history, stage=0).dropped) == "a"
    assert ids(drop_easy(problems, history, stage=0, window="all").dropped) == "b"
    # what a later stage saw does not count either
    history.append(Visit("a", 1, 2, solved(0)))
    assert ids(drop_easy(problems, history, stage=0).dropped) == "a"
    with pytest.raises(DataError, match="window of the drop is 'last'"):
        drop_easy(problems, history, stage=0, window="last")


def test_drop_averages_the_visits_within_the_stage():
    history = history_of(("a", 1, 1, solved(8)), ("a", 1, 2, solved(6)), ("b", 1, 1, solved(8)), ("b", 1, 2, solved(7)))
    assert ids(drop_easy([problem(i) for i in "ab"], history, stage=1).dropped) == "b"


def test_unvisited_problem_keeps_its_earlier_estimate():
    before = [("a", -1, 0, solved(0)), ("b", -1, 0, solved(8)), ("c", -1, 0, solved(8))]
    history = history_of(*before, ("a", 0, 1, solved(8)), ("b", 0, 1, solved(3)))
    assert ids(drop_easy([problem(i) for i in "abc"], history, stage=1).dropped) == "ac"


def test_drop_keeps_a_problem_that_was_never_visited():
    filtered = drop_easy([problem("a")], History(), stage=0)
    assert ids(filtered.kept) == "a" and sum(filtered.before) == 0


def test_drop_threshold_is_exclusive():
    history = history_of(("a", 0, 1, solved(9, of=10)), ("b", 0, 1, solved(10, of=10)))
    assert ids(drop_easy([problem(i) for i in "ab"], history, stage=0).kept) == "a"
    assert ids(drop_easy([problem(i) for i in "ab"], history, stage=0, threshold=1.0).kept) == "ab"


def test_too_few_problems_left_shows_the_histogram():
    history = history_of(*[(i, -1, 0, solved(8 if i in "ab" else 2)) for i in "abc"])
    filtered = filter_mirrored_j([problem(i) for i in "abc"], history)
    require_batch(filtered, 1)
    with pytest.raises(DataError, match="1 of 3 problems are left, fewer than a batch of 2;") as raised:
        require_batch(filtered, 2)
    assert draw_histogram(filtered.before, filtered.after) in str(raised.value)


# ---- order ---------------------------------------------------------------------------------------


def handed_out(order, batches, start=0):
    return [p.id for b in range(batches) for p in order.batch(start + b * order.batch_size)]


def test_order_depends_on_seed_and_stage_but_not_on_the_files_order():
    problems = [problem(f"{i:02d}") for i in range(20)]
    first = handed_out(DataOrder(problems, 4, seed=1, stage=0), 15)
    assert first == handed_out(DataOrder(problems[::-1], 4, seed=1, stage=0), 15)
    assert first != handed_out(DataOrder(problems, 4, seed=2, stage=0), 15)
    assert first != handed_out(DataOrder(problems, 4, seed=1, stage=1), 15)
    assert first[:20] != first[20:40] != first[40:]


def test_resume_from_a_position_is_exact():
    problems = [problem(f"{i:02d}") for i in range(7)]
    whole = handed_out(DataOrder(problems, 3, seed=1, stage=0), 40)
    assert handed_out(DataOrder(problems, 3, seed=1, stage=0), 20, start=60) == whole[60:]


@pytest.mark.parametrize("size, batch_size", [(7, 3), (7, 5), (5, 5), (6, 5), (8, 4), (3, 1), (1, 1)])
def test_a_batch_that_straddles_epochs_repeats_no_problem(size, batch_size):
    problems = [problem(f"{i:02d}") for i in range(size)]
    order = DataOrder(problems, batch_size, seed=3, stage=0)
    for position in range(20 * size):
        assert len({p.id for p in order.batch(position)}) == batch_size
    everything = handed_out(order, 20 * size)
    for epoch in range(20):
        assert sorted(everything[epoch * size : (epoch + 1) * size]) == [p.id for p in problems]


def test_every_problem_can_come_first():
    firsts = Counter(DataOrder([problem(i) for i in "abcd"], 2, seed, 0).batch(0)[0].id for seed in range(60))
    assert sorted(firsts) == list("abcd") and max(firsts.values()) < 30


def test_order_refuses_too_few_problems_and_repeated_ids():
    with pytest.raises(DataError, match="2 problems cannot fill a batch of 3"):
        DataOrder([problem("a"), problem("b")], 3, 0, 0)
    with pytest.raises(DataError, match="several problems have the id a"):
        DataOrder([problem("a"), problem("b"), problem("a")], 2, 0, 0)


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
def test_real_file_reads_whole(name, rows, unanswered, repeated, capsys):
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
def test_real_minerva_lists_lose_their_stray_newlines_and_repeats():
    pytest.importorskip("pyarrow")
    read = read_problems(DATA / "benchmarks" / "minerva.parquet")
    assert Counter(len(p.answers) for p in read) == {1: 232, 2: 38, 3: 2}
    assert read[0].answers == ("9.6",) and read[0].id == "minerva/0"


def test_53_000_problems_open_in_seconds(tmp_path):
    text = "Let $x_{%d}$ be the number of ways to tile a board. " * 6
    row = json.dumps(verl(text + "Find it.", "%d", {"index": "%d"}))
    path = tmp_path / "polaris.jsonl"
    path.write_text("\n".join(row % ((n,) * 8) for n in range(53_000)))
    start = time.process_time()
    assert len(read_problems(path)) == 53_000
    assert time.process_time() - start < 5


def test_the_drop_is_linear_in_the_problems():
    problems = [problem(str(n)) for n in range(10_000)]
    history = history_of(*[(p.id, 0, 0, solved(n % 9)) for n, p in enumerate(problems)])
    start = time.process_time()
    assert len(drop_easy(problems, history, stage=0).dropped) == 10_000 // 9
    assert time.process_time() - start < 2


def test_heavy_libraries_are_imported_only_where_they_are_used():
    source = Path(data_filter.__file__).read_text()
    assert not {"import pyarrow", "import huggingface_hub"} & set(source.splitlines())
    assert "\nfrom huggingface_hub" not in source
