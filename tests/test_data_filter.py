"""The history of pass rates, the filter, the drop and the order of training."""

import json
import math
import time
from collections import Counter

import pytest

from data_filter import (
    DataOrder,
    History,
    Visit,
    draw_histogram,
    drop_easy,
    filter_mirrored_j,
    histogram,
    require_batch,
    verdict,
)
from lab.data_files import DataError
from lab.problems import Problem


def problem(id, text="", answers=("1",)):
    return Problem(id, text or f"What is {id}?", answers)


def history_of(*visits):
    history = History()
    for problem_id, stage, step, rewards in visits:
        history.append(Visit(problem_id, stage, step, tuple(rewards)))
    return history


def solved(k, of=8):
    return (1.0,) * k + (0.0,) * (of - k)


# ---- history -------------------------------------------------------------------------------------


def test_pass_rate_weighs_rollouts():
    history = history_of(("a", -1, 0, solved(8)), ("a", 0, 3, solved(0)), ("a", 1, 9, solved(1, of=4)))
    assert history.pass_rate("a") == 9 / 20 and history.pass_rate("b") is None
    assert [v.step for v in history.visits("a")] == [0, 3, 9]
    with pytest.raises(DataError, match="the visit to a at step 4 has no rewards"):
        history.append(Visit("a", 0, 4, ()))


def test_a_step_that_is_repeated_knows_the_lengths_that_it_knew_the_first_time():
    """Guards: a step whose update was abandoned dealt its problems otherwise, and its log-probs were rounded otherwise."""
    history = History()
    history.append(Visit("p", 0, 3, (1.0, 0.0), 40))
    assert history.response_tokens("p", 0, 3) is None and history.response_tokens("p", 0, 4) == 20
    history.append(Visit("p", 1, 9, (1.0, 0.0), 60))
    assert [history.response_tokens("p", *when) for when in ((1, 9), (1, 10))] == [20, 30]


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


def test_a_failed_save_leaves_the_earlier_file_complete(tmp_path, monkeypatch):
    path, history = tmp_path / "h.jsonl", history_of(("a", 0, 0, solved(3)))
    for _ in range(2):
        history.save(path)
    before = path.read_text()
    history.append(Visit("b", 0, 1, solved(4)))
    history.settings = {"n": 8}
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda _: 1 / 0)  # the machine crashes
        with pytest.raises(ZeroDivisionError):
            history.save(path)
    assert path.read_text() == before and len(before.splitlines()) == 1
    history.save(path)
    first, *rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert first == {"settings": {"n": 8}} and [row["problem_id"] for row in rows] == ["a", "b"]


def test_a_half_written_last_line_is_dropped_and_reported(tmp_path, capsys):
    path = tmp_path / "h.jsonl"
    history_of(("a", 0, 0, solved(3)), ("b", 0, 0, solved(4))).save(path)
    path.write_text(path.read_text()[:-9])
    loaded = History.load(path)
    assert f"{path}: dropped 1 half-written last line (line 2)" in capsys.readouterr().err
    assert loaded.pass_rate("a") == 3 / 8 and loaded.pass_rate("b") is None


@pytest.mark.parametrize(
    "change",
    [{"problem_id": 3}, {"stage": "0"}, {"stage": math.inf}, {"step": 1.5}, {"step": True}, {"rewards": []},
     {"rewards": "1"}, {"rewards": [2]}, {"rewards": [False]}, {"rewards": [math.nan]}, {"tokens": -1},
     {"tokens": 2.5}, {"tokens": None}],
)  # fmt: skip
def test_a_line_that_is_not_a_visit_is_reported(tmp_path, change):
    path, row = tmp_path / "h.jsonl", {"problem_id": "a", "stage": -0.5, "step": 0, "rewards": [1], "tokens": 9}
    path.write_text(json.dumps(row) + "\n")
    assert History.load(path).log == [Visit("a", -0.5, 0, (1,), 9)]
    path.write_text(f"{json.dumps(row)}\n{json.dumps(row | change)}\n")
    with pytest.raises(DataError, match="h.jsonl, row 2 is not a visit"):
        History.load(path)
    for broken in ('{"problem_id": "a"}', "3", "[]", '{"settings": 3}'):
        path.write_text(f"{broken}\n{json.dumps(row)}\n")
        with pytest.raises(DataError, match="h.jsonl, row 1 is not a visit"):
            History.load(path)
    path.write_text(f"oops\n{json.dumps(row)}\n")
    with pytest.raises(DataError, match="h.jsonl, line 1: .* fix or remove that line"):
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


def test_draw_histogram_shows_both_sides():
    lines = draw_histogram([4, 0, 8], [4, 0, 0], width=8).splitlines()
    assert lines[0].split() == ["solved", "before", "(J)", "after", "(too", "hard)"]
    assert [line.split() for line in lines[1:]] == [
        ["0/2", "4", "####", "4", "####"],
        ["1/2", "0", "0"],
        ["2/2", "8", "########", "0"],
        ["all", "12", "4"],
    ]


def test_draw_histogram_shows_a_single_one():
    lines = draw_histogram([1, 0, 2], width=4).splitlines()
    assert [line.split() for line in lines] == [
        ["solved", "problems", "(J)"],
        ["0/2", "1", "##"],
        ["1/2", "0"],
        ["2/2", "2", "####"],
        ["all", "3"],
    ]


# ---- filter and drop -----------------------------------------------------------------------------


def ids(problems):
    return "".join(p.id for p in problems)


def test_filter_drops_the_always_solved():
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


def test_filter_caps_the_share_of_the_unsolved_in_any_order():
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


def test_drop_uses_only_the_visits_of_the_stage_that_ended():
    # the released script averages the whole history: 8/8 now would be diluted to 0.5
    history = history_of(
        ("a", -1, 0, solved(0)), ("a", 0, 1, solved(8)), ("b", -1, 0, solved(8)), ("b", 0, 1, solved(7))
    )
    problems = [problem(i) for i in "ab"]
    assert ids(drop_easy(problems, history, stage=0).dropped) == "a"
    assert ids(drop_easy(problems, history, stage=0, window="all").dropped) == "b"
    # visits of a later stage do not count either
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


def drawn_ids(order, batches, start=0):
    return [p.id for b in range(batches) for p in order.batch(start + b * order.batch_size)]


def test_order_depends_on_seed_and_stage_but_not_on_the_files_order():
    problems = [problem(f"{i:02d}") for i in range(20)]
    first = drawn_ids(DataOrder(problems, 4, seed=1, stage=0), 15)
    assert first == drawn_ids(DataOrder(problems[::-1], 4, seed=1, stage=0), 15)
    assert first != drawn_ids(DataOrder(problems, 4, seed=2, stage=0), 15)
    assert first != drawn_ids(DataOrder(problems, 4, seed=1, stage=1), 15)
    assert first[:20] != first[20:40] != first[40:]


def test_resume_from_a_position_is_exact():
    problems = [problem(f"{i:02d}") for i in range(7)]
    whole = drawn_ids(DataOrder(problems, 3, seed=1, stage=0), 40)
    assert drawn_ids(DataOrder(problems, 3, seed=1, stage=0), 20, start=60) == whole[60:]


@pytest.mark.parametrize("size, batch_size", [(7, 3), (7, 5), (5, 5), (6, 5), (8, 4), (3, 1), (1, 1)])
def test_a_batch_that_straddles_epochs_repeats_no_problem(size, batch_size):
    problems = [problem(f"{i:02d}") for i in range(size)]
    order = DataOrder(problems, batch_size, seed=3, stage=0)
    for position in range(20 * size):
        assert len({p.id for p in order.batch(position)}) == batch_size
    everything = drawn_ids(order, 20 * size)
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


def test_the_drop_is_linear_in_the_problems():
    problems = [problem(str(n)) for n in range(10_000)]
    history = history_of(*[(p.id, 0, 0, solved(n % 9)) for n, p in enumerate(problems)])
    start = time.process_time()
    assert len(drop_easy(problems, history, stage=0).dropped) == 10_000 // 9
    assert time.process_time() - start < 2
