"""lab/evaluation.py: output files, resuming, curves, comparing, regrading."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import forked
import numpy as np
import pytest

from engine.adapter import Lora, add_lora, initialise_lora
from engine.grader import Grader
from engine.rollout_worker import RolloutWorker
from eval import Response, interval
from lab import responses
from lab.evaluation import length_curve, main
from lab.options import evaluation_arguments
from lab.problems import Problem, read_problems
from model import load, save

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = ["--temperature", "1", "--top-k", "0", "--instruction", ""]


# ------------------------------------------------------------------------------------------- command line


@pytest.fixture
def command(small_world, tmp_path, monkeypatch):
    """Run eval.py as a user calls it, in this process."""

    def run(*arguments, model=small_world / "model", data=("held-out",), out="out", temperature=True):
        files = [word for name in data for word in ("--data", str(small_world / f"{name}.jsonl"))]
        settings = [*OPTIONS[0 if temperature else 2 :], "--out", str(tmp_path / out)]
        monkeypatch.setattr("sys.argv", ["eval.py", str(model), *files, *settings, *map(str, arguments)])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            main(evaluation_arguments(None))
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return read_out(tmp_path / out)

    return run


def read_out(folder):
    """Return the results of a folder and the rows of all its response files."""
    files = sorted((folder / "responses").glob("*"))
    assert all(file.suffix == ".jsonl" for file in files)  # no part is left
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return json.loads((folder / "results.json").read_text()), rows


def test_results_responses_and_page_agree(command, small_world, tmp_path, capsys):
    results, rows = command("-n", 3, "--max-tokens", 7, "--limit", 4, data=("held-out", "train"))
    printed = capsys.readouterr().out
    results = results["evaluations"]
    assert [result["name"] for result in results] == ["held-out", "train"]
    for result in results:
        problems = read_problems(small_world / f"{result['name']}.jsonl")[:4]
        mine = [row for row in rows if row["data"] == result["name"]]
        ids = [(row["problem_id"], row["sample"]) for row in mine]
        assert ids == [(problem.id, sample) for problem in problems for sample in range(3)]
        assert (result["problems"], result["n"], result["temperature"]) == (4, 3, 1.0)
        assert result["avg"] == np.mean([row["verdict"] == "right" for row in mine])
        assert result["tokens"] == sum(row["tokens"] for row in mine)
        assert result["length_mean"] == result["tokens"] / 12
        assert result["truncated_share"] == np.mean([row["finish_reason"] == "length" for row in mine])
        assert result["no_box_share"] == np.mean([row["answer"] is None for row in mine])
        assert sum(result["verdicts"].values()) == 12
        assert all(1 <= row["tokens"] <= 7 for row in mine)
        by_type = {label: group["avg"] for label, group in result["by_type"].items()}
        assert by_type == {problem.type: 0.0 for problem in problems} and len(by_type) >= 3
        assert f"{result['name']}: avg@3 0.0 (95% 0.0 to 49.0) over 4 problems" in printed
        assert result["tokens_per_s"] > 0 and result["peak_memory_gib"] > 0
    assert len(rows) == 24
    assert printed.splitlines()[-1].startswith(
        f"{small_world / 'model'} (measured here)"
    )  # the output ends with the measured row; nothing is published on these sets
    assert "81.2" not in printed and f"results in {tmp_path / 'out'}, report in " in printed
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in page and rows[0]["text"].split()[0] in page and "81.2" not in page
    title = page.index(f"Evaluation of {(small_world / 'model').name}</h1>")
    assert title < page.index("held-out, avg@3<b>0.0%</b>") < page.index("<dt>max tokens</dt><dd>7</dd>")


def test_responses_depend_on_the_seed_except_at_temperature_0(command):
    options = ["-n", 2, "--max-tokens", 6, "--limit", 2]
    same = [command(*options, "--seed", seed, out=f"out-{i}")[1] for i, seed in enumerate((1, 1, 2))]
    assert same[0] == same[1] != same[2]
    _, greedy = command("-n", 1, "--max-tokens", 6, "--limit", 2, "--temperature", 0, out="greedy")
    again = command("-n", 1, "--max-tokens", 6, "--limit", 2, "--temperature", 0, "--seed", 5, out="greedy-again")[1]
    assert [row["text"] for row in greedy] == [row["text"] for row in again]


def test_an_instruction_is_part_of_the_prompt(command):
    options = ["-n", 1, "--max-tokens", 60, "--limit", 1]
    with pytest.raises(SystemExit, match="exceeds the model's window of 96"):
        command(*options, "--instruction", "=" * 40)
    assert len(command(*options)[1]) == 1


def test_yarn_lengthens_the_window(command, tmp_path):
    options = ["-n", 1, "--max-tokens", 90, "--limit", 1]
    with pytest.raises(SystemExit, match=r"eval.py: problem held-out/0: .* exceeds the model's window of 96: "):
        command(*options)
    assert not (tmp_path / "out").exists()  # so that the same name can be used again
    _, rows = command(*options, "--yarn", 1.5)
    assert len(rows) == 1


@pytest.mark.parametrize(
    "arguments, options, sentence",
    [
        ((), {"model": "/no/such/model"}, "eval.py: /no/such/model: no such model folder"),
        ((), {"data": ("absent",)}, "eval.py: .*absent.jsonl"),
        (("--cache-tokens", 20), {}, "eval.py: problem held-out/0: .* exceed the cache of 20 tokens"),
        (("--yarn", 1), {}, "eval.py: a YaRN factor must be above 1, not 1.0"),
    ],
)
def test_bad_input_is_one_sentence(command, tmp_path, arguments, options, sentence):
    with pytest.raises(SystemExit, match=sentence) as caught:
        command("--max-tokens", 6, *arguments, **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_refused(command, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    with pytest.raises(SystemExit, match=r"eval.py: .*out already exists and is not an evaluation; give another --out"):
        command("--max-tokens", 6)
    assert os.listdir(tmp_path / "out") == ["precious"]


def test_an_unknown_benchmark_and_an_unknown_schema(command, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["eval.py", "no-model", "--data", "aime26"])
    with pytest.raises(SystemExit, match="aime26 is not a file, .* known are aime24, aime25, "):
        main(evaluation_arguments(None))
    (tmp_path / "odd.jsonl").write_text('{"prob": 1, "ans": 2}\n')
    monkeypatch.setattr("sys.argv", ["eval.py", "no-model", "--data", str(tmp_path / "odd.jsonl")])
    with pytest.raises(SystemExit, match="has the columns prob, ans, which is no known schema"):
        main(evaluation_arguments(None))


def test_columns_are_also_of_a_file_with_the_name_of_a_benchmark(command, tmp_path):
    file, options = tmp_path / "math500.jsonl", ["-n", 1, "--max-tokens", 4, "--columns", "problem=Q,answer=A"]
    file.write_text('{"Q": "1+1=", "A": "2"}\n')
    results, _ = command(*options, "--data", file, data=(), out="file")
    assert results["evaluations"][0]["unanswerable"] == 0
    file.write_text('{"problem": "1+1=", "answer": "2"}\n')
    command(*options, "--data", "math500", "--folder", tmp_path, data=(), out="known")


def test_a_problem_without_an_answer_counts_as_wrong_unless_skipped(command, small_world, tmp_path, capsys):
    rows = [{"problem": "1+1=", "answer": ""}, {"problem": "1+2=", "answer": "3"}]
    (small_world / "gap.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept, _ = command("-n", 1, "--max-tokens", 4, data=("gap",), out="kept")
    said = capsys.readouterr()
    assert "kept, as problems that nothing can solve, 1 unusable rows (row 1 has no answer)" in said.err
    assert "1 problems have no answer and count as wrong" in said.out
    assert (kept["evaluations"][0]["problems"], kept["evaluations"][0]["unanswerable"]) == (2, 1)
    skipped, _ = command("-n", 1, "--max-tokens", 4, "--skip-bad-rows", data=("gap",), out="skipped")
    assert (skipped["evaluations"][0]["problems"], skipped["evaluations"][0]["unanswerable"]) == (1, 0)
    assert "left out 1 unusable rows (row 1 has no answer)" in capsys.readouterr().err


def test_prompts_too_long_for_the_window_are_named_together_and_left_out_on_request(command, small_world, capsys):
    rows = [{"id": n, "problem": "1+" * 60 * (n % 2) + "1=", "answer": "2"} for n in range(4)]
    (small_world / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["-n", 1, "--max-tokens", 4]
    with pytest.raises(SystemExit, match=r"problem long/1: .* window of 96, and 1 more do so \(long/3\): .*--skip-bad-"):
        command(*options, data=("long",))
    results, responses = command(*options, "--skip-bad-rows", data=("long",), out="skipped")
    assert "long: left out 2 of 4 problems" in capsys.readouterr().out
    assert results["evaluations"][0]["problems"] == 2 and [row["problem_id"] for row in responses] == ["long/0", "long/2"]
    with pytest.raises(SystemExit, match="long: no prompt has 1 tokens or fewer; lower --max-tokens"):
        command(*options[:-1], 95, "--skip-bad-rows", data=("long",), out="none")


def test_a_tokenizer_of_another_model_is_refused_or_asked_about(command, small_world, tmp_path, capsys):
    import shutil

    from safetensors.torch import load_file, save_file

    config = json.loads((small_world / "model" / "config.json").read_text())
    weights, tokens = load_file(small_world / "model" / "model.safetensors"), config["vocab_size"]
    for rows in (tokens - 1, 3 * tokens):
        other = tmp_path / str(rows)
        shutil.copytree(small_world / "model", other)
        resized = {k: v.repeat(3, 1)[:rows] if v.shape[0] == tokens else v for k, v in weights.items()}
        save_file({k: v.contiguous() for k, v in resized.items()}, other / "model.safetensors")
        (other / "config.json").write_text(json.dumps(config | {"vocab_size": rows}))
    with pytest.raises(SystemExit, match=f"the tokenizer has {tokens} tokens, the model {tokens - 1}: use"):
        command("--max-tokens", 4, model=tmp_path / str(tokens - 1))
    command("--max-tokens", 4, model=other)  # unused rows are padding
    assert f"only {tokens} of the model's {3 * tokens} rows are tokens" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- resuming


def strip(results):
    """Return the evaluations without the fields that depend on the machine."""
    return [
        {k: v for k, v in r.items() if k not in ("tokens_per_s", "peak_memory_gib")} for r in results["evaluations"]
    ]


def test_an_interrupted_evaluation_resumes_and_ends_the_same(command, tmp_path, monkeypatch, capsys):
    options = ["-n", 4, "--max-tokens", 12, "--rows", 3]
    whole, rows = command(*options, out="whole")
    seen, asked = [], RolloutWorker.asked_to_stop
    monkeypatch.setattr(RolloutWorker, "asked_to_stop", lambda self: len(seen) > 40 or seen.append(1))
    with pytest.raises(SystemExit) as stopped:
        command(*options, out="cut")
    assert stopped.value.code == 130 and "stopped; the same command resumes" in capsys.readouterr().out
    monkeypatch.setattr(RolloutWorker, "asked_to_stop", asked)
    (part,) = (tmp_path / "cut" / "responses").glob("*.part")
    done = part.read_text().splitlines()
    assert 0 < len(done) < len(rows)
    part.rename(part.with_name("held-out.3.part"))  # as if four processes had run
    part.write_text(done[0][: len(done[0]) // 2])  # and this one had died in the middle of a line

    again, rows_again = command(*options, out="cut")
    assert f"held-out: {len(done)} responses are already stored" in capsys.readouterr().out
    assert rows_again == rows and strip(again) == strip(whole)
    finished = (tmp_path / "cut" / "responses" / "held-out.jsonl").stat().st_mtime_ns
    command(*options, out="cut")
    assert (tmp_path / "cut" / "responses" / "held-out.jsonl").stat().st_mtime_ns == finished  # nothing left to do


def test_more_samples_are_added_to_the_stored_ones(command, tmp_path, monkeypatch):
    command("-n", 2, "--max-tokens", 6, "--limit", 3, out="grown")
    grown = command("-n", 5, "--max-tokens", 6, "--limit", 3, out="grown")
    fresh = command("-n", 5, "--max-tokens", 6, "--limit", 3, out="fresh")
    assert grown[1] == fresh[1] and strip(grown[0]) == strip(fresh[0])
    fewer, _ = command("-n", 2, "--max-tokens", 6, "--limit", 3, out="grown")
    assert fewer["evaluations"][0]["n"] == 2
    monkeypatch.setattr("sys.argv", ["eval.py", "--regrade", str(tmp_path / "grown"), "--out", str(tmp_path / "again")])
    main(evaluation_arguments(None))  # of the two samples in the settings
    regraded = json.loads((tmp_path / "again" / "results.json").read_text())
    assert strip(regraded) == strip(fewer)


def test_other_settings_are_refused(command):
    command("-n", 1, "--max-tokens", 6, "--limit", 2)
    with pytest.raises(SystemExit, match="out was made with max_tokens = 6, not 7: use the same setting"):
        command("-n", 1, "--max-tokens", 7, "--limit", 2)
    with pytest.raises(SystemExit, match=r"other inputs \(different: prompts and problems\): use"):
        command("-n", 1, "--max-tokens", 6, "--limit", 3)


def test_other_weights_or_answers_under_the_same_name_are_refused(command, small_world, tmp_path):
    import shutil

    shutil.copytree(small_world, tmp_path / "copy")
    data, model = tmp_path / "copy" / "held-out.jsonl", tmp_path / "copy" / "model"
    options = ["-n", 1, "--max-tokens", 6, "--data", data]
    command(*options, model=model, data=())
    text = data.read_text()
    data.write_text(text.replace('"answers": ["', '"answers": ["1', 1))
    with pytest.raises(SystemExit, match=r"other inputs \(different: problems\): use"):
        command(*options, model=model, data=())
    data.write_text(text)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(SystemExit, match=r"other inputs \(different: weights\): use"):
        command(*options, model=model, data=())


def test_a_copied_model_goes_on_and_another_template_or_adapter_base_does_not(command, small_world, tmp_path):
    """Guards: responses of an adapter on two bases, and of a prompt rendered in two ways, in one table."""
    import shutil

    for name in ("model", "moved", "worded"):
        shutil.copytree(small_world / "model", tmp_path / name)
    options = ["--max-tokens", 6, "--limit", 2]
    command("-n", 1, *options, model=tmp_path / "model")
    _, rows = command("-n", 2, *options, model=tmp_path / "moved")
    assert len(rows) == 4
    template = tmp_path / "worded" / "chat_template.jinja"
    template.write_text("0 " + template.read_text())
    with pytest.raises(SystemExit, match=r"other inputs \(different: chat template and prompts\): use"):
        command("-n", 3, *options, model=tmp_path / "worded")
    model = load(tmp_path / "model")
    add_lora(model, Lora(1, 1.0, str(tmp_path / "model")))
    initialise_lora(model, 0)
    save(model, tmp_path / "adapter")
    command("-n", 1, *options, model=tmp_path / "adapter", out="second")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(SystemExit, match=r"other inputs \(different: adapter's base\): use"):
        command("-n", 2, *options, model=tmp_path / "adapter", out="second")


def test_a_broken_line_is_named(command, tmp_path):
    command("-n", 1, "--max-tokens", 6, "--limit", 2)
    path = tmp_path / "out" / "responses" / "held-out.jsonl"
    path.write_text(path.read_text() + '{"data": 1}\n')
    with pytest.raises(SystemExit, match="held-out.jsonl, line 3 is not a response of an evaluation"):
        command("-n", 1, "--max-tokens", 6, "--limit", 2)


def test_a_signal_keeps_the_finished_responses(small_world, tmp_path):
    arguments = [
        sys.executable,
        str(ROOT / "eval.py"),
        str(small_world / "model"),
        "--data",
        str(small_world / "held-out.jsonl"),
    ]
    arguments += [*OPTIONS, "-n", "300", "--max-tokens", "60", "--rows", "8", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    part, deadline = tmp_path / "out" / "responses" / "held-out.0.part", time.monotonic() + 60
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT, err
    assert "stopping: the finished responses are kept" in err and "the same command resumes" in out
    kept = responses.read_responses(part)
    assert 0 < len(kept) < 6 * 300
    arguments[arguments.index("300")] = "3"  # and the same command resumes
    run = forked.run(arguments, capture_output=True, timeout=60)
    assert run.returncode == 0 and "resuming in" in run.stdout, run.stderr
    assert not list(part.parent.glob("*.part")) and len(read_out(tmp_path / "out")[1]) >= 18


def test_two_processes_write_the_same_as_one(small_world, command, tmp_path):
    single = command("-n", 3, "--max-tokens", 10)
    arguments = [sys.executable, ROOT / "eval.py", small_world / "model"]
    arguments += ["--data", small_world / "held-out.jsonl", *OPTIONS]
    arguments += ["-n", "3", "--max-tokens", "10", "--out", tmp_path / "two"]
    run = forked.run_ranks(2, arguments, timeout=120)
    assert run.returncode == 0, run.stderr
    double = read_out(tmp_path / "two")
    assert double[1] == single[1] and strip(double[0]) == strip(single[0])
    assert run.stdout.count("(measured here)") == 1


# ------------------------------------------------------------------------------------------------------------- curves


@pytest.fixture
def made_up(monkeypatch):
    """Replace the model's responses by ones whose accuracy and diversity depend on the temperature."""
    made = {"accuracy at 1.2": 0.0}

    def respond(self, name, problems, n, sampling, budgets=(), key=""):
        t = sampling.temperature
        share, distinct = (
            float(np.interp(t, [1.0, 1.2], [1.0, made["accuracy at 1.2"]])),
            round(100 * t / 2.6),
        )  # half of 100 4-grams at 1.3
        text = " ".join(["x"] * (104 - distinct) + [f"y{i}" for i in range(distinct - 1)])
        random = np.random.default_rng(0)

        def response(problem, i):
            verdict = "right" if random.random() < share else "wrong"
            return Response(name, problem.id, i, 9, "stop", verdict, "1", text if i == 0 else "")

        return [[response(problem, i) for i in range(n)] for problem in problems]

    monkeypatch.setattr(responses.Recorder, "respond", respond)
    return made


def run_only(command, tmp_path, *arguments, **options):
    """Return only the results, also of a command that stores no responses."""
    try:
        return command(*arguments, **options)[0]
    except FileNotFoundError:
        return json.loads((tmp_path / options.get("out", "out") / "results.json").read_text())


def test_the_temperature_curve_finds_the_zones_and_draws_them(command, made_up, tmp_path, capsys):
    results = run_only(
        command, tmp_path, "-n", 4, "--max-tokens", 8, "--curve", "temperature", "0.8:1.2:0.1", temperature=False
    )
    curve = results["temperature"]["held-out"]
    assert [point["temperature"] for point in curve["points"]] == [0.8, 0.9, 1.0, 1.1, 1.2]
    assert curve["points"][0]["accuracy"] == 1.0 and curve["points"][4]["accuracy"] == 0.0
    assert 1.0 < curve["zones"]["robust_end"] < 1.05 and curve["zones"]["start"] == pytest.approx(1.0)
    said = capsys.readouterr().out
    assert "\nrobust generation up to 1.0" in said and "start training at 1 (95% " in said
    assert said.count("temperature  accuracy    +-  distinct-4") == 1
    assert (tmp_path / "out" / "temperature-held-out.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "controlled exploration" in page and "performance collapse" in page and "start training at 1" in page


def test_match_takes_a_score_or_a_run(command, made_up, tmp_path, capsys, monkeypatch):
    made_up["accuracy at 1.2"] = 1.0
    results = run_only(command, tmp_path, "-n", 4, "--max-tokens", 8, "--match", "0.5", "--margin", "0", out="score")
    found = results["match"]["held-out"]
    assert found["chosen"] == 1.3 and found["points"][-1]["distinct4"] == 0.5
    assert [point["temperature"] for point in found["points"]] == [1.0, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3]
    assert "chosen: temperature 1.3" in capsys.readouterr().out
    assert {point["target"] for point in found["points"]} == {0.5}

    run = tmp_path / "run"
    run.mkdir()
    row = {"kind": "temperature", "step": 0, "stage": 1, "target_distinct4": None, "chosen": 1.0}
    (run / "metrics.jsonl").write_text(json.dumps(row | {"curve": [{"temperature": 1.0, "distinct4": 0.5}]}) + "\n")
    as_run = run_only(command, tmp_path, "-n", 4, "--max-tokens", 8, "--match", str(run), out="as-run")
    assert as_run["match"]["held-out"]["chosen"] == 1.3
    for given, sentence in [
        ("nowhere", "--match nowhere is neither a number nor a folder"),
        ("nan", "--match nan: distinct-4 is above 0 and at most 1"),
        ("5", "distinct-4 is above 0 and at most 1"),
    ]:
        with pytest.raises(SystemExit, match=sentence):
            command("-n", 4, "--max-tokens", 8, "--match", given, out="none")
        assert not (tmp_path / "none").exists()  # so that the same name can be used again


def test_match_ends_where_accuracy_collapses(command, made_up, tmp_path, capsys):
    results = run_only(command, tmp_path, "-n", 40, "--max-tokens", 8, "--match", "0.5", "--margin", "0")
    found = results["match"]["held-out"]
    assert found["chosen"] == 1.05 and [point["temperature"] for point in found["points"]] == [1.0, 1.05, 1.1]
    assert "no temperature below 1.1, where accuracy has collapsed" in capsys.readouterr().out


def test_match_refuses_a_diversity_of_other_settings(command, tmp_path):
    command("-n", 2, "--max-tokens", 8, "--limit", 2, out="before")
    with pytest.raises(SystemExit, match="before was made with n = 2, not 3: "):
        command("-n", 3, "--max-tokens", 8, "--limit", 2, "--match", tmp_path / "before", out="other")
    command("-n", 2, "--max-tokens", 8, "--limit", 2, "--match", tmp_path / "before", out="same")
    found = json.loads((tmp_path / "same" / "results.json").read_text())["match"]["held-out"]
    assert found["chosen"] == 1.0 and len(found["points"]) == 1  # the very same responses
    with pytest.raises(SystemExit, match="before was made with top_k = 0, not 5: "):
        command("-n", 2, "--max-tokens", 8, "--limit", 2, "--top-k", 5, "--match", tmp_path / "before", out="other")


def test_an_interrupted_curve_resumes_and_ends_the_same(command, tmp_path, monkeypatch):
    """Guards: NAME-temperature-1.*.part also took NAME-temperature-1.05.0.part for a part of temperature 1."""
    options = ["-n", 2, "--max-tokens", 8, "--rows", 3, "--curve", "temperature", "1:1.1:0.05"]
    command(*options, out="whole", temperature=False)
    real, seen = responses.Recorder.respond, []

    def respond(self, name, problems, n, sampling, budgets=(), key=""):
        if sampling.temperature == 1.05:
            asked = lambda _: len(seen) > 12 or seen.append(1)  # noqa: E731
            monkeypatch.setattr(RolloutWorker, "asked_to_stop", asked)
        return real(self, name, problems, n, sampling, budgets, key)

    with monkeypatch.context() as patch:
        patch.setattr(responses.Recorder, "respond", respond)
        with pytest.raises(SystemExit) as stopped:
            command(*options, out="cut", temperature=False)
        assert stopped.value.code == 130
    monkeypatch.setattr(RolloutWorker, "asked_to_stop", lambda self: False)
    assert list((tmp_path / "cut" / "responses").glob("held-out-temperature-1.05.0.part"))
    command(*options, out="cut", temperature=False)
    files = sorted(path.name for path in (tmp_path / "whole" / "responses").iterdir())
    assert files == [f"held-out-temperature-{t}.jsonl" for t in ("1.05", "1.1", "1")]
    for name in files:
        assert (tmp_path / "cut/responses" / name).read_text() == (tmp_path / "whole/responses" / name).read_text()
    assert (tmp_path / "cut/results.json").read_text() == (tmp_path / "whole/results.json").read_text()
    with pytest.raises(SystemExit, match="is a curve; --regrade takes an evaluation"):
        monkeypatch.setattr("sys.argv", ["eval.py", "--regrade", str(tmp_path / "cut"), "--out", str(tmp_path / "no")])
        main(evaluation_arguments(None))
    with pytest.raises(SystemExit, match="is a curve; .* as do --compare and --match"):
        monkeypatch.setattr("sys.argv", ["eval.py", "--compare", str(tmp_path / "cut"), str(tmp_path / "whole")])
        main(evaluation_arguments(None))
    with pytest.raises(SystemExit, match="is a curve; .* as do --compare and --match"):
        command(*options[:6], "--match", tmp_path / "cut", out="matched")


def test_the_length_curve_of_known_responses():
    problems = [Problem("a", "?", ("5",)), Problem("b", "?", ("7",))]
    text = r"<think>x</think> \boxed{5} and then nonsense \boxed{6}"
    early = text.index(" and")
    groups = [
        [
            Response("s", "a", 0, 90, "stop", "wrong", "6", text, {"30": early, "60": early + 4}),
            Response("s", "a", 1, 20, "stop", "right", "5", r"</think> \boxed{5}", {}),
        ],
        [
            Response("s", "b", 0, 60, "stop", "right", "7", r"<think>long</think> \boxed{7}", {"30": 9}),
            Response(
                "s", "b", 1, 100, "length", "no answer", None, "<think>" + "x" * 93, {"30": 30, "60": 60, "90": 90}
            ),
        ],
    ]
    with Grader() as grader:
        curve = length_curve(problems, groups, [30, 60, 90, 100], grader)
    assert [point["accuracy"] for point in curve] == [0.5, 0.75, 0.5, 0.5]
    assert (curve[1]["low"], curve[1]["high"]) == interval([1.0, 0.5])


def test_a_model_with_yarn_of_its_own_is_compared_without_it(command, small_world, tmp_path):
    """It was sampled with YaRN under the name "no YaRN"."""
    scaled = tmp_path / "scaled"
    words = [sys.executable, "model.py", small_world / "model", scaled, "--yarn", "1.5", "--original-window", "96"]
    subprocess.run([*map(str, words)], check=True, cwd=ROOT, capture_output=True)
    command("-n", 1, "--max-tokens", 8, "--limit", 2, "--curve", "length", model=scaled)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["length"]["held-out"]) == ["no YaRN", "YaRN"]


def test_cuts_count_the_characters_of_the_first_tokens(command, small_world, tmp_path):
    command("-n", 2, "--max-tokens", 32, "--limit", 3, "--curve", "length", "--yarn", 1.5, "--original-window", 96)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small_world / "model")
    plain = responses.read_responses(tmp_path / "out" / "responses" / "held-out-no-YaRN.jsonl")
    scaled = responses.read_responses(tmp_path / "out" / "responses" / "held-out-YaRN.jsonl")
    assert len(plain) == len(scaled) == 6 and [r.text for r in plain] != [r.text for r in scaled]
    for response in plain:
        assert sorted(map(int, response.cuts)) == [b for b in range(2, 33, 2) if b < response.tokens]
        tokens = tokenizer(response.text, add_special_tokens=False).input_ids
        for budget, characters in response.cuts.items():
            head = tokenizer.decode(tokens[: int(budget)], skip_special_tokens=True)
            assert response.text[:characters] == head[:characters]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {setting: len(points) for setting, points in results["length"]["held-out"].items()} == {
        "no YaRN": 16,
        "YaRN": 16,
    }
    assert (tmp_path / "out" / "length-held-out.png").exists()


# ------------------------------------------------------------------------------------------- comparing and regrading


def test_compare_pairs_problems(command, tmp_path, monkeypatch, capsys):
    for out, right in (("a", 0), ("b", 2)):
        command("-n", 2, "--max-tokens", 4, out=out)
        path = tmp_path / out / "responses" / "held-out.jsonl"
        rows = responses.read_responses(path)
        rows = [Response(**asdict(r) | {"verdict": "right" if i < right else "wrong"}) for i, r in enumerate(rows)]
        responses.write_responses(path, rows)
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["eval.py", "--compare", str(tmp_path / "a"), str(tmp_path / "b")])
    main(evaluation_arguments(None))
    line = capsys.readouterr().out.splitlines()[-1].split()
    assert line[:4] == ["held-out", "0.0", "16.7", "+16.7"] and line[-4:] == ["1", "0", "5", "0"]
    monkeypatch.setattr("sys.argv", ["eval.py", "--compare", str(tmp_path / "a"), str(tmp_path)])
    with pytest.raises(SystemExit, match="is not an evaluation: it has no settings.json"):
        main(evaluation_arguments(None))


def test_compare_takes_several_and_lists_the_problems_that_moved(command, tmp_path, monkeypatch, capsys):
    for out, right in (("a", 0), ("b", 8), ("c", 0)):
        command("-n", 8, "--max-tokens", 2, out=out)
        path = tmp_path / out / "responses" / "held-out.jsonl"
        rows = responses.read_responses(path)
        rows = [Response(**asdict(r) | {"verdict": "right" if i < right else "wrong"}) for i, r in enumerate(rows)]
        responses.write_responses(path, rows)
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["eval.py", "--compare", *(str(tmp_path / out) for out in "abc")])
    main(evaluation_arguments(None))
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[2:5] for line in printed[-2:]] == [["0.0", "16.7", "+16.7"], ["0.0", "0.0", "+0.0"]]
    moved = [line.split() for line in printed if " of 8" in line]
    assert [(words[0], words[-6:]) for words in moved] == [(rows[0].problem_id, "0 of 8 8 of 8".split())]
    page = (tmp_path / "compare.html").read_text()
    assert rows[0].problem_id in page and rows[8].problem_id not in page


def test_regrade_grades_stored_responses_again(command, tmp_path, monkeypatch, capsys):
    command("-n", 2, "--max-tokens", 4)
    path = tmp_path / "out" / "responses" / "held-out.jsonl"
    rows = responses.read_responses(path)
    golds = {
        problem.id: problem.answers[0] for problem in read_problems(tmp_path / "out" / "problems" / "held-out.jsonl")
    }
    boxed = [Response(**asdict(r) | {"text": rf"</think> \boxed{{{golds[r.problem_id]}}}"}) for r in rows[:3]]
    responses.write_responses(path, boxed + rows[3:])
    monkeypatch.setattr("sys.argv", ["eval.py", "--regrade", str(tmp_path / "out"), "--out", str(tmp_path / "new")])
    main(evaluation_arguments(None))
    results, again = read_out(tmp_path / "new")
    assert [row["verdict"] for row in again] == ["right"] * 3 + ["no answer"] * 9
    assert results["evaluations"][0]["avg"] == 0.25
    assert "held-out: 12 responses regraded; 3 no answer -> right" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="new already exists; give another --out"):
        main(evaluation_arguments(None))


def test_regrade_takes_thinking_and_compare_a_folder(command, tmp_path, monkeypatch):
    command("-n", 2, "--max-tokens", 4, "--thinking", "true")
    path = tmp_path / "out" / "responses" / "held-out.jsonl"
    problems = read_problems(tmp_path / "out" / "problems" / "held-out.jsonl")
    answers = {problem.id: rf"\boxed{{{problem.answers[0]}}}" for problem in problems}
    rows = [Response(**asdict(r) | {"text": answers[r.problem_id]}) for r in responses.read_responses(path)]
    responses.write_responses(path, rows)  # no </think> before a box

    def call(*words):
        monkeypatch.setattr("sys.argv", ["eval.py", *map(str, words)])
        main(evaluation_arguments(None))

    call("--regrade", tmp_path / "out", "--out", tmp_path / "as-it-was")
    call("--regrade", tmp_path / "out", "--out", tmp_path / "new", "--no-thinking")
    assert {row["verdict"] for row in read_out(tmp_path / "as-it-was")[1]} == {"no answer"}
    assert {row["verdict"] for row in read_out(tmp_path / "new")[1]} == {"right"}
    assert json.loads((tmp_path / "new" / "settings.json").read_text())["thinking"] is False
    call("--compare", tmp_path / "as-it-was", tmp_path / "new", "--out", tmp_path / "pages")
    assert (tmp_path / "pages" / "compare.html").exists() and not (tmp_path / "compare.html").exists()
    with pytest.raises(SystemExit, match="settings.json is not a folder; give another --out"):
        call("--compare", tmp_path / "out", tmp_path / "new", "--out", tmp_path / "out" / "settings.json")


def test_broken_or_unfinished_folders_are_refused(command, tmp_path, monkeypatch):
    command("-n", 2, "--max-tokens", 4)
    path = tmp_path / "out" / "responses" / "held-out.jsonl"

    def regrade():
        monkeypatch.setattr("sys.argv", ["eval.py", "--regrade", str(tmp_path / "out"), "--out", str(tmp_path / "new")])
        main(evaluation_arguments(None))

    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    with pytest.raises(SystemExit, match="does not have all 2 responses to held-out yet; run its command again"):
        regrade()
    path.write_text("".join(lines))
    (path.parent / "held-out.1.part").write_text("")
    with pytest.raises(SystemExit, match="does not have all 2 responses"):
        regrade()
    (tmp_path / "out" / "settings.json").write_text("{")
    with pytest.raises(SystemExit, match="settings.json is broken"):
        regrade()
    assert not (tmp_path / "new").exists()
