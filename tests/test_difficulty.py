"""lab/difficulty.py: estimate, filter and drop on the command line, resumed, on two processes, and refused."""

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import forked
import pytest
import torch

import data_filter
from data_filter import History, Visit
from engine import checkpoint
from engine.rollout_worker import RolloutWorker
from lab import difficulty
from lab.options import difficulty_arguments
from lab.data_files import DataError
from lab.problems import Problem, read_problems, write_problems

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = ["-n", "4", "--temperature", "1", "--max-tokens", "10", "--instruction", "", "--rows", "6"]
SAYS = ("0", "1", "2", "3")  # the model's answers to any problem, about equally often


@pytest.fixture(scope="module")
def world(small_world, tmp_path_factory):
    """The laptop world's raw model, trained with transformers to answer 0, 1, 2 or 3; problems of known difficulty."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("taught")
    tokenizer = AutoTokenizer.from_pretrained(small_world / "model")
    model = AutoModelForCausalLM.from_pretrained(small_world / "model")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows = [f"<|user|> {a} + {b}<|end|><|assistant|><think></think> \\boxed{{{a % 4}}}<|end|>"
            for a in range(1, 9) for b in range(10, 14)]  # fmt: skip
    tokens = tokenizer(rows, add_special_tokens=False, return_tensors="pt").input_ids
    shuffled = tokens.clone()
    for step in range(60):  # prompts and answers are shuffled apart: only the answers' frequencies can be learned
        shuffled[:, :7] = tokens[torch.randperm(len(rows), generator=torch.Generator().manual_seed(step)), :7]
        loss = model(shuffled, labels=shuffled).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    answers = [SAYS, ("1",), ("77",), ("0", "2"), SAYS, ("1",), ("77",), ("3",), ("0", "1", "3")]
    write_problems([Problem(f"sums/{i}", f" {i} + 12", a) for i, a in enumerate(answers)], folder / "sums.jsonl")
    return folder


@pytest.fixture
def command(monkeypatch):
    """Run data_filter.py as a user calls it, in this process."""

    def run(*words):
        monkeypatch.setattr("sys.argv", ["data_filter.py", *map(str, words)])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            difficulty.main(difficulty_arguments(None))
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    return run


def pass_rates(path):
    """Compute the pass rate of each line directly."""
    rows = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    return {row["problem_id"]: sum(row["rewards"]) / len(row["rewards"]) for row in rows}


# ---- estimate ------------------------------------------------------------------------------------


def test_estimate_counts_the_models_answers(command, world, tmp_path, monkeypatch, capsys):
    said, stream = {}, RolloutWorker.stream

    def listening(self, *arguments):
        for attempt in stream(self, *arguments):
            said.setdefault(attempt.rollout.problem_id, []).append(attempt.text)
            yield attempt

    monkeypatch.setattr(RolloutWorker, "stream", listening)
    monkeypatch.setattr(data_filter, "ESTIMATE_SLICE", 4)
    out = tmp_path / "new" / "rates.jsonl"
    command("estimate", world / "model", world / "sums.jsonl", *OPTIONS, "--out", out)
    problems = read_problems(world / "sums.jsonl")
    expected = {}
    for problem in problems:
        boxes = [re.search(r"</think>.*\\boxed\{(\d+)\}", text) for text in said[problem.id]]
        assert len(boxes) == 4
        expected[problem.id] = sum(box is not None and box[1] in problem.answers for box in boxes) / 4
    assert pass_rates(out) == expected
    assert list(expected.values()).count(0.0) >= 2 and max(expected.values()) > 0.5  # easy and hard problems
    printed = capsys.readouterr().out
    assert re.search(r"pass rates: 4/9 problems  ETA \d:\d\d:\d\d\npass rates: 8/9 problems", printed)
    counts = [list(expected.values()).count(k / 4) for k in range(5)]
    table = out.with_suffix(".txt").read_text()
    assert [int(count) for count in re.findall(r"^\d of 4 +(\d+)$", table, re.M)] == counts
    assert "\npremises of stage 0: 1 x 9 x 8 rollouts, at unchanged pass rates" in printed
    assert out.with_suffix(".png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    results = f"results in {out}, table in {out.with_suffix('.txt')}, picture in {out.with_suffix('.png')}"
    lines = printed.splitlines()
    assert lines.index(results) + 1 == next(i for i, line in enumerate(lines) if line.startswith("premises of stage 0"))
    assert lines[-1].startswith("  clip-higher  ")


def test_prompts_too_long_for_the_estimate_are_left_out_of_it_and_of_the_filter(command, small_world, tmp_path):
    data, rates = tmp_path / "long.jsonl", tmp_path / "rates.jsonl"
    write_problems([Problem(f"long/{n}", "1+" * 60 * (n % 2) + "1=", ("2",)) for n in range(4)], data)
    command("estimate", small_world / "model", data, *OPTIONS, "--skip-bad-rows", "--out", rates)
    assert list(pass_rates(rates)) == ["long/0", "long/2"]
    bounds = ["--batch", "1"]
    command("filter", rates, data, tmp_path / "kept.jsonl", "--skip-bad-rows", *bounds)
    assert [problem.id for problem in read_problems(tmp_path / "kept.jsonl")] == ["long/0", "long/2"]
    with pytest.raises(SystemExit):
        command("filter", rates, data, tmp_path / "other.jsonl", *bounds)


def test_an_interrupted_estimate_resumes_and_ends_in_the_same_file(command, world, tmp_path, monkeypatch, capsys):
    words = ("estimate", world / "model", world / "sums.jsonl", *OPTIONS, "--out")
    command(*words, tmp_path / "whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_text()
    assert len(whole.splitlines()) == 10 and "already" not in capsys.readouterr().out
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(RolloutWorker, "asked_to_stop", lambda self: len(seen) > 15 or seen.append(1))
        with pytest.raises(SystemExit) as stopped:
            command(*words, tmp_path / "cut.jsonl")
    assert stopped.value.code == 130 and "stopped; the same command resumes" in capsys.readouterr().out
    done = (tmp_path / "cut.jsonl").read_text().splitlines()
    assert 1 < len(done) < 10 and set(done) < set(whole.splitlines())  # the finished problems are kept, line by line
    assert not (tmp_path / "cut.png").exists()
    # its last line is cut as well, and an early problem is missing
    (tmp_path / "cut.jsonl").write_text("\n".join([done[0], *done[2:], done[1]])[:-9])
    command(*words, tmp_path / "cut.jsonl")
    assert f"pass rates: {len(done) - 2} problems are in {tmp_path / 'cut.jsonl'} already" in capsys.readouterr().out
    assert (tmp_path / "cut.jsonl").read_text() == whole
    finished = (tmp_path / "cut.jsonl").stat().st_mtime_ns
    monkeypatch.setattr(RolloutWorker, "stream", None)
    command(*words, tmp_path / "cut.jsonl")  # nothing left to sample
    assert (tmp_path / "cut.jsonl").stat().st_mtime_ns == finished
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{name}.{kind}" for name in ("whole", "cut") for kind in ("jsonl", "txt", "png")
    )


def test_two_processes_write_the_same_as_one(command, world, tmp_path):
    command("estimate", world / "model", world / "sums.jsonl", *OPTIONS, "--out", tmp_path / "one.jsonl")
    words = ["estimate", world / "model", world / "sums.jsonl", *OPTIONS, "--out", tmp_path / "two.jsonl"]
    done = forked.run_ranks(2, [sys.executable, ROOT / "data_filter.py", *words], timeout=120)
    assert done.returncode == 0, done.stderr
    for kind in (".jsonl", ".txt", ".png"):
        assert (tmp_path / f"two{kind}").read_bytes() == (tmp_path / f"one{kind}").read_bytes()
    assert done.stdout.count("premises of ") == 1


def test_a_signal_keeps_the_finished_problems(world, tmp_path):
    write_problems([Problem(f"many/{i}", f" {i % 9} + 11", ("1",)) for i in range(2500)], tmp_path / "many.jsonl")
    out = tmp_path / "rates.jsonl"
    words = [sys.executable, str(ROOT / "data_filter.py"), "estimate", str(world / "model")]
    words += [str(tmp_path / "many.jsonl"), *OPTIONS, "-n", "2", "--out", str(out)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:  # the first of five slices
        time.sleep(0.02)
        if out.exists() and out.stat().st_size > 10_000:
            break
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT, errors
    assert "stopping: saving the finished problems" in errors
    assert f"stopped; the same command resumes from {out}" in printed
    known = History.load(out)
    assert 512 <= len(known.log) < 2500 and all(len(visit.rewards) == 2 for visit in known.log)


def test_another_model_other_problems_and_other_sampling_are_refused(command, small_world, world, tmp_path):
    out = tmp_path / "rates.jsonl"
    words = ["estimate", world / "model", world / "sums.jsonl", *OPTIONS, "--limit", 2, "--out", out]
    command(*words)
    before = out.read_bytes()
    refusals = {
        "was made with other inputs (different: weights, config and tokenizer)": [words[0], small_world / "model", *words[2:]],
        "was made with other inputs (different: prompts and problems): use": [*words, "--limit", 3],
        "was made with temperature = 1.0, not 0.9: use": [*words, "--temperature", 0.9],
        "was made with n = 4, not 5: use": [*words, "-n", 5],
        "was made with thinking = True, not False: use": [*words, "--no-thinking"],
    }
    for sentence, others in refusals.items():
        with pytest.raises(SystemExit, match=rf"^data_filter.py: .*rates.jsonl {re.escape(sentence)}") as refused:
            command(*others)
        assert "\n" not in str(refused.value) and out.read_bytes() == before
    out.write_bytes(before.split(b"\n", 1)[1])  # an old file without the first line
    with pytest.raises(SystemExit, match="rates.jsonl does not say which model, prompts and problems"):
        command(*words)


# ---- filter --------------------------------------------------------------------------------------


def rates_file(path, problems, right, n=8):
    """Write a file of pass rates of problems that were solved right[i] times of n."""
    history = History()
    history.settings = {"identity": {"problems": data_filter.problems_fingerprint(problems)}, "n": n}
    for problem, k in zip(problems, right, strict=True):
        history.append(Visit(problem.id, -0.5, 0, (1.0,) * k + (0.0,) * (n - k)))
    history.save(path)
    return path


@pytest.fixture
def estimated(tmp_path):
    """Eight problems and their pass rates."""
    problems = [Problem(f"p/{i}", f"What is {i}?", (str(i),)) for i in range(8)]
    write_problems(problems, tmp_path / "data.jsonl")
    return rates_file(tmp_path / "rates.jsonl", problems, [8, 0, 0, 0, 4, 7, 8, 2]), tmp_path / "data.jsonl"


def kept(path):
    return [int(problem.id.removeprefix("p/")) for problem in read_problems(path)]


def test_filter_drops_the_always_solved_and_shows_both_shapes(command, estimated, tmp_path, capsys):
    command("filter", *estimated, tmp_path / "out.jsonl")
    assert kept(tmp_path / "out.jsonl") == [1, 2, 3, 4, 5, 7]
    printed, table = capsys.readouterr().out, (tmp_path / "out.txt").read_text()
    assert "kept 6, dropped 2 of 8 problems" in printed
    rows = [line.split() for line in table.splitlines()]
    assert [row[-2:] for row in rows if row[1:3] == ["of", "8"]] == [
        ["3", "3"], ["0", "0"], ["1", "1"], ["0", "0"], ["1", "1"], ["0", "0"], ["0", "0"], ["1", "1"], ["2", "0"],
    ]  # fmt: skip
    assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"
    original = {problem.id: problem for problem in read_problems(estimated[1])}
    assert all(problem == original[problem.id] for problem in read_problems(tmp_path / "out.jsonl"))


def test_filter_bounds_and_the_cap_on_unsolved(command, estimated, tmp_path):
    command("filter", *estimated, tmp_path / "bounds.jsonl", "--drop-at", 0.8, "--keep-above", 0.25)
    assert kept(tmp_path / "bounds.jsonl") == [4, 7]
    command("filter", *estimated, tmp_path / "capped.jsonl", "--max-unsolved-share", 0.25)
    assert len(set(kept(tmp_path / "capped.jsonl")) & {1, 2, 3}) == 1 and len(kept(tmp_path / "capped.jsonl")) == 4


def test_filter_refuses_problems_that_do_not_match_the_pass_rates(command, estimated, tmp_path):
    rates, data = estimated
    out = tmp_path / "out.jsonl"
    with pytest.raises(SystemExit, match="6 of 8 problems are left, fewer than a batch of 7") as refused:
        command("filter", rates, data, out, "--batch", 7)
    assert "8/8       2 ###################" in str(refused.value)
    with pytest.raises(SystemExit, match=r"rates.jsonl was made with other inputs \(different: problems\): "):
        command("filter", rates, data, out, "--limit", 7)
    text = data.read_text()
    data.write_text(text.replace('"answers": ["4"]', '"answers": ["5"]'))
    with pytest.raises(SystemExit, match=r"rates.jsonl was made with other inputs \(different: problems\): "):
        command("filter", rates, data, out)
    data.write_text("\n".join(reversed(text.splitlines())))  # the order of the problems does not matter
    rates.write_text(rates.read_text().rsplit("\n", 2)[0] + "\n")
    with pytest.raises(SystemExit, match=r"1 problems have no pass rate \(first: p/7\); estimate them"):
        command("filter", rates, data, out)
    with pytest.raises(SystemExit, match="absent.jsonl does not exist"):
        command("filter", tmp_path / "absent.jsonl", data, out)
    assert not out.exists() and not out.with_suffix(".png").exists()
    out.write_text("mine")
    rates.unlink()
    rates_file(rates, read_problems(data), [1] * 8)
    with pytest.raises(SystemExit, match="out.jsonl exists already"):
        command("filter", rates, data, out)
    assert out.read_text() == "mine" and not out.with_suffix(".png").exists()


# ---- drop ----------------------------------------------------------------------------------------

RECIPE = """name = "r"
model = "m"
[[stage]]
kind = "sft"
data = "d"
steps = 5
[[stage]]
kind = "rl"
data = "d"
steps = 9
group_size = 4
drop_above = 0.7
[[stage]]
kind = "rl"
steps = 9
group_size = 4
"""


def write_checkpoint(folder, state):
    """Write a checkpoint without weights."""
    torch.save(checkpoint._pack(state), folder / "run.pt")
    checkpoint.write_manifest(folder, checkpoint.file_checksums([folder / "run.pt"]))


@pytest.fixture
def run(tmp_path):
    """A run in the middle of its second rl stage, and its problems, solved k of 4 times in each visit."""
    visits = {  # by problem: before stage 1, in stage 1, in stage 2
        0: (4, None, None),  # filtered before stage 1
        1: (0, 4, 0),
        2: (4, 3, 4),
        3: (2, 2, 4),
        4: (1, None, None),
    }
    state = checkpoint.RunState(step=18, stage=2, stage_step=4, prepared=True)
    for problem, solved in visits.items():
        for stage, k in zip((0.5, 1, 2), solved, strict=True):
            if k is not None:
                state.history.append(Visit(f"p/{problem}", stage, int(5 + 9 * stage), (1.0,) * k + (0.0,) * (4 - k)))
    folder = tmp_path / "run"
    (folder / "checkpoints" / "step-18").mkdir(parents=True)
    write_checkpoint(folder / "checkpoints" / "step-18", state)
    (folder / "recipe.toml").write_text(RECIPE)
    write_problems([Problem(f"p/{i}", f"{i}?", ("1",)) for i in range(6)], tmp_path / "data.jsonl")
    return folder, tmp_path / "data.jsonl"


def test_drop_defaults_to_the_last_ended_stage_and_the_runs_rule(command, run, tmp_path, capsys):
    command("drop", *run, tmp_path / "out.jsonl")
    assert kept(tmp_path / "out.jsonl") == [3, 4, 5]  # above 0.7 by the visits of stage 1, or the estimate before it
    printed = capsys.readouterr().out
    assert "after stage 1: dropping accuracy above 0.7 in the visits of that stage" in printed
    assert "kept 3, dropped 3 of 6 problems (1 of the kept ones were never visited)" in printed
    assert (tmp_path / "out.png").exists() and re.search(r"^all +5 +2$", (tmp_path / "out.txt").read_text(), re.M)


def test_drop_takes_another_stage_threshold_and_window(command, run, tmp_path):
    command("drop", *run, tmp_path / "two.jsonl", "--stage", 2)  # its own threshold is 0.9
    assert kept(tmp_path / "two.jsonl") == [1, 4, 5]
    command("drop", *run, tmp_path / "above.jsonl", "--above", 0.75)
    assert kept(tmp_path / "above.jsonl") == [2, 3, 4, 5]
    command("drop", *run, tmp_path / "all.jsonl", "--window", "all")  # 1: 4/12; 2: 11/12; 3: 8/12
    assert kept(tmp_path / "all.jsonl") == [1, 3, 4, 5]


def test_drop_refuses_a_wrong_or_unfinished_run(command, run, tmp_path):
    folder, data = run
    out = tmp_path / "out.jsonl"
    write_problems([Problem("q/1", "?", ("1",))], tmp_path / "other.jsonl")
    refusals = {
        "data.jsonl is not a run: it has no recipe.toml": (data, data, out),
        "run has not trained in stage 0; its rl stages are 1, 2": (folder, data, out, "--stage", 0),
        "run has not visited any problem of .*other.jsonl": (folder, tmp_path / "other.jsonl", out),
        "3 of 6 problems are left, fewer than a batch of 4": (folder, data, out, "--batch", 4),
    }
    for sentence, words in refusals.items():
        with pytest.raises(SystemExit, match=f"^data_filter.py: .*{sentence}"):
            command("drop", *words)
    (folder / "recipe.toml").write_text(RECIPE.replace("steps = 9", "steps = 99"))
    state = checkpoint.RunState(step=18, stage=1, stage_step=4)
    write_checkpoint(folder / "checkpoints" / "step-18", state)
    with pytest.raises(SystemExit, match="run has not ended an rl stage yet"):
        command("drop", folder, data, out)
    # by its budget of tokens, the same stage has ended
    text = RECIPE.replace("steps = 9", "steps = 99\ngenerated_tokens = 100")
    (folder / "recipe.toml").write_text(text)
    write_checkpoint(folder / "checkpoints" / "step-18", replace(state, stage_tokens=100))
    with pytest.raises(SystemExit, match="run has not trained in stage 1"):  # ended, but this state has no visits
        command("drop", folder, data, out)
    (folder / "checkpoints" / "step-18" / "run.pt").write_bytes(b"")
    with pytest.raises(SystemExit, match="step-18 .run.pt has 0 bytes, not "):
        command("drop", folder, data, out)
    (folder / "checkpoints" / "step-18").rename(tmp_path / "away")
    with pytest.raises(SystemExit, match="run has no checkpoint yet"):
        command("drop", folder, data, out)
    assert not out.exists()


# ---- the first line of a file --------------------------------------------------------------------


def test_the_first_line_is_written_once_and_again_after_a_cut(tmp_path):
    path, problems = tmp_path / "rates.jsonl", [Problem(str(i), "?", ("1",)) for i in range(2)]
    rates_file(path, problems, [1, 2])
    loaded = History.load(path)
    assert loaded.settings["n"] == 8 and len(loaded.log) == 2
    loaded.append(Visit("2", -0.5, 0, (1.0,)))
    loaded.save(path)
    assert [line.startswith('{"settings"') for line in path.read_text().splitlines()] == [True, False, False, False]
    whole = path.read_text()
    path.write_text(whole[:20])  # the process died while writing the first line: nothing is known
    assert History.load(path).settings is None
    path.write_text(whole[:20])
    again = History()
    again.settings = loaded.settings
    again.save(path)
    assert path.read_text() == whole.splitlines(keepends=True)[0]
    path.write_text('{"settings": 3}\n')
    with pytest.raises(DataError, match="row 1 is not a visit"):
        History.load(path)


def test_the_fingerprint_of_problems_covers_what_decides_their_pass_rates():
    a, b = Problem("a", "x?", ("1", "2")), Problem("b", "y?", ("3",))
    one = data_filter.problems_fingerprint([a, b])
    assert one == data_filter.problems_fingerprint([b, a])
    assert one == data_filter.problems_fingerprint([a, Problem("b", "y?", ("3",), "hard", 0.5, "because")])
    others = [[a], [a, Problem("c", "y?", ("3",))], [a, Problem("b", "z?", ("3",))], [a, Problem("b", "y?", ("4",))]]
    assert len({one, *map(data_filter.problems_fingerprint, others)}) == 5
