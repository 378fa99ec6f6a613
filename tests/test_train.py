"""train.py on a miniature recipe: in one process and in several, interrupted and resumed, and refused."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path
from types import SimpleNamespace
from textwrap import fill

import forked
import pytest
import torch
from forked import free_port
from safetensors.torch import load_file

import grpo
import train
from bench import interrupt
from engine import checkpoint as checkpoints
from engine import fingerprint, run_folder, start
from engine import run as runs
from engine.checkpoint import CheckpointError, RunState
from engine.rollout_worker import RolloutWorker
from eval import Response
from lab import difficulty
from lab.glossary import DETERMINISTIC, GLOSSARY
from lab.metrics import Metrics
from lab.options import difficulty_arguments, training_arguments
from lab.data_files import DataError
from lab.problems import Problem
from lab.recipe import RecipeError, load_recipe, to_toml
from lab.run_data import RunData
from lab.story import what_happened
from rollout import Sampling

ROOT = Path(__file__).resolve().parent.parent
# a model of 0.1M parameters that learns the format in seconds, and sometimes a right answer
MINIATURE = [
    "world.sft_problems=2400", "world.sft_terms=[2, 3]", "world.train_terms=[3]", "world.held_out_terms=[3]",
    "world.beyond_terms=[3]", "world.train_problems=32", "world.held_out_problems=16", "world.beyond_problems=8",
    "world.hidden_size=64", "world.layers=2", "stage.0.steps=150", "stage.0.batch_sequences=16", "stage.1.steps=4", "stage.1.batch_problems=8",
    "stage.2.steps=2", "stage.2.batch_problems=8", "stage.3.steps=2", "stage.3.batch_problems=8", "search.problems=8",
    "search.samples=2", "search.most=1.1", "eval.samples=2", "eval.every_steps=2", "final.samples=2",
    "reward.format=0.1", "reward.steps=0.5", "run.checkpoint_every_steps=2", "stage.1.informative_share=0.0",
]  # fmt: skip


def command(out, *arguments):
    overrides = [word for value in MINIATURE for word in ("--set", value)]
    return [
        sys.executable,
        str(ROOT / "train.py"),
        *(overrides if out else []),
        *(["--out", str(out)] if out else []),
        *arguments,
    ]


def run(command):
    return forked.run(command, capture_output=True, timeout=300)


def run_unforked(command):
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def deterministic(folder):
    return [{key: row[key] for key in DETERMINISTIC if key in row} for row in metrics(folder)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run in one process, started with plain python."""
    out = tmp_path_factory.mktemp("runs")
    done = run_unforked(command(out))
    assert done.returncode == 0, done.stderr[-3000:]
    return out / "tiny", done.stdout


def test_one_command_goes_from_an_untrained_model_to_a_report(finished):
    folder, output = finished
    assert output.rstrip().endswith("report.html")
    for name in (
        "recipe.toml",
        "metrics.jsonl",
        "rollouts.jsonl",
        "report.html",
        "curves.svg",
        "stage-3/model.safetensors",
    ):
        assert (folder / name).stat().st_size > 0, name
    rows = metrics(folder)
    assert {key for row in rows for key in row} == {key for entry in GLOSSARY for key in entry.keys.split()}
    assert [row["step"] for row in rows if row["kind"] in ("sft", "rl")] == list(range(1, 159))
    kinds = {kind: [row for row in rows if row["kind"] == kind] for kind in ("rl", "eval", "filter", "temperature")}
    assert len(kinds["rl"]) == 8 and len(kinds["temperature"]) == 3 and len(kinds["filter"]) == 4
    assert {row["name"] for row in kinds["eval"]} == {
        "held-out",
        "beyond the window, no YaRN",
        "beyond the window, YaRN",
    }
    assert any(row["grad_norm"] > 0 for row in kinds["rl"] if not row["skipped"])
    assert (folder / "finished").exists() and not (folder / "resume-me").exists()


def test_the_same_held_out_problems_are_written_whole_and_the_story_ends_the_output(finished):
    folder, output = finished
    groups = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    held_out = [row for row in metrics(folder) if row["kind"] == "eval" and row["name"] == "held-out"]
    asked = [[g["problem_id"] for g in groups if g["kind"] == "held-out" and g["step"] == row["step"]] for row in held_out]
    assert len(held_out) > 3 and all(ids and ids == asked[0] for ids in asked)
    assert all(len(group["responses"]) == held_out[0]["n"] for group in groups if group["kind"] == "held-out")
    trained = [group for group in groups if group["kind"] == "training"]
    assert {group["stage"] for group in trained} == {1, 2, 3} and {len(group["responses"]) for group in trained} == {8}
    story, printed = what_happened(metrics(folder)), output.splitlines()
    told, report = printed[printed.index(fill(story[0], 100).splitlines()[0]) : -1], printed[-1]
    assert len(story) >= 6 and " ".join(told) == " ".join(story) and report.startswith("report in")
    assert max(map(len, told)) <= 100


def test_sampler_and_trainer_agree_in_float32_at_every_step(finished):
    rows = [row for row in metrics(finished[0]) if row["kind"] == "rl" and not row["skipped"]]
    assert rows and all(row["logprob_diff_max"] < 1e-4 for row in rows)
    assert all(abs(row["ratio_mean"] - 1) < 1e-4 for row in rows if row["rescued_ratio_mean"] is None)


def test_temperature_never_falls_and_every_step_samples_at_the_chosen_one(finished):
    rows = metrics(finished[0])
    chosen = [row["chosen"] for row in rows if row["kind"] == "temperature"]
    assert chosen == sorted(chosen)
    for stage, temperature in enumerate(chosen, 1):
        assert {row["temperature"] for row in rows if row["kind"] == "rl" and row["stage"] == stage} == {temperature}


def test_a_stage_says_what_its_pass_rates_imply_and_then_what_was_seen(finished):
    folder, output = finished
    rows = metrics(folder)
    found = [row for row in rows if row["kind"] == "premises"]
    assert [row["label"] for row in found] == [f"{when} stage {i}" for i in (1, 2, 3) for when in ("before", "after")]
    filters = {row["label"]: row for row in rows if row["kind"] == "filter"}
    for i, before, after in zip((1, 2, 3), found[::2], found[1::2], strict=True):
        steps = [row for row in rows if row["kind"] == "rl" and row["stage"] == i]
        seen = {
            "zero_variance": sum(row["zero_variance"] for row in steps) / sum(row["groups"] for row in steps),
            "skipped": sum(row["skipped"] for row in steps),
            "rescued": sum(row["rescued"] for row in steps),
            "dropped": filters[f"after stage {i}"]["dropped"],
            "truncated_share": sum(row["truncated_share"] for row in steps) / len(steps),
        }
        assert after["seen"] == {key: pytest.approx(seen[key]) for key in before["predicted"]}
        assert after["predicted"] == before["predicted"] and all(a <= b for _, a, b in before["predicted"].values())
        assert f"premises of stage {i}: " in output and f"stage {i}: at the pass rates before it\n  predicted " in output
        assert all(f"  {mechanism} " in output and figure in output for mechanism, figure, _ in before["table"])
    cells = {mechanism: figure for mechanism, figure, _ in found[0]["table"]}
    assert cells["filter"].startswith(f"drops {filters['before stage 1']['dropped']} of 32, ")


def test_a_visit_keeps_the_lengths_of_its_rollouts(finished):
    """Without them, what a later stage's limit will cut was foretold from the problems that no step had visited."""
    newest = max((finished[0] / "checkpoints").glob("step-*"), key=lambda path: int(path.name.split("-")[1]))
    packed = torch.load(newest / "run.pt", weights_only=True)
    trained = [visit for visit in packed["history"]["visits"] if visit[1] % 1 == 0]
    assert trained and all(len(rewards) == len(lengths) and sum(lengths) == tokens
                           for _, _, _, rewards, tokens, lengths in trained)  # fmt: skip


def test_a_steps_seconds_leave_out_the_evaluation_before_it(last_stage, monkeypatch):
    passed, clock = [0.0], time.perf_counter

    def evaluated(*_, **__):
        passed[0] += 1000.0

    monkeypatch.setattr(train.time, "perf_counter", lambda: clock() + passed[0])
    monkeypatch.setattr(train, "held_out_evaluation", evaluated)
    assert main(monkeypatch, "--resume", last_stage, "--set", "eval.every_steps=1", "--set", "final.data=") is None
    steps = [row for row in metrics(last_stage) if row["kind"] == "rl" and row["step"] > 156]
    assert passed[0] >= 1000 and len(steps) == 2 and all(row["seconds"] < 1000 for row in steps)


DIVERSITY = {  # of the model before each stage, by temperature
    1: {1.0: 0.40},
    2: {1.0: 0.30, 1.05: 0.38, 1.1: 0.46, 1.15: 0.5},
    3: {1.1: 0.35, 1.15: 0.42, 1.2: 0.48},
}


@pytest.mark.parametrize(
    "word, checkpoints_lack, expected, said",
    [
        ("match", (), [1.0, 1.1, 1.2], "distinct-4 0.480 (to restore the previous stage's 0.460)"),
        ("match-previous", (), [1.0, 1.1, 1.2], "distinct-4 0.480 (to restore the previous stage's 0.460)"),
        ("match-first", (), [1.0, 1.1, 1.15], "distinct-4 0.420 (to restore the first stage's 0.400)"),
        ("match-first", ("previous_diversity",), [1.0, 1.1, 1.15], "(to restore the first stage's 0.400)"),
    ],
)
def test_a_temperature_restores_the_diversity_of_the_stage_that_it_names(
    tmp_path, monkeypatch, word, checkpoints_lack, expected, said
):
    def evaluate(worker, name, problems, samples, sampling):
        words = round(100 * DIVERSITY[stage_now][sampling.temperature])  # of 100 four-grams
        text = " ".join(["x"] * (104 - words) + [f"y{i}" for i in range(words - 1)])
        return [[Response("s", p.id, i, 1, "stop", "right", "1", text if i == 0 else "") for i in range(2)]
                for p in problems]  # fmt: skip

    monkeypatch.setattr(train, "evaluate", evaluate)
    recipe = load_recipe(ROOT / "recipes" / "tiny.toml", [f"stage.{i}.temperature={word}" for i in (2, 3)])
    (tmp_path / "recipe.toml").write_text(to_toml(recipe))
    assert load_recipe(tmp_path / "recipe.toml") == recipe
    problems, recorded, spoken, state, found = [Problem(str(i), "?", ("1",)) for i in range(3)], [], [], RunState(), []
    for stage_now in (1, 2, 3):
        run = SimpleNamespace(
            recipe=recipe, state=state, worker=None, processes=SimpleNamespace(say=spoken.append),
            probe_problems=lambda: problems, record=lambda index, row: recorded.append(row),
            sampling=lambda stage, temperature, draw: Sampling(temperature, 9, (), 0, draw),
        )  # fmt: skip
        train.choose_temperature(run, stage_now, recipe.stage[stage_now], problems)
        found.append(state.temperature)
        packed = checkpoints._pack(state)  # every stage resumes from a checkpoint
        packed.pop("torch_rng")
        state = checkpoints._unpack({key: value for key, value in packed.items() if key not in checkpoints_lack})
    assert found == expected and spoken[-1].endswith(said)
    restores = "first" if word == "match-first" else "previous"
    assert [row["restores"] for row in recorded] == [None, restores, restores]


def test_a_run_of_an_older_version_with_match_names_the_difference(last_stage, monkeypatch):
    folder = last_stage
    launches = json.loads((folder / "fingerprints.json").read_text())
    assert 'temperature = "match-previous"' in launches[-1]["recipe"]
    for place in (folder / "recipe.toml", folder / "fingerprints.json"):  # where "match" meant the first
        place.write_text(place.read_text().replace("match-previous", "match"))
    assert "recipe: stage.2.temperature was 'match', is 'match-previous'" in main(monkeypatch, "--resume", folder)


def test_transformers_loads_the_exported_model(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = finished[0] / "stage-3"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": " 3 + 4 - 2"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**prompt, max_new_tokens=40, do_sample=False)
    assert "</think> \\boxed{" in tokenizer.decode(tokens[0])


def test_the_last_model_says_how_it_was_sampled_and_how_good_it_is(finished):
    folder, rows = finished[0] / "stage-3", metrics(finished[0])
    chosen = [row["chosen"] for row in rows if row["kind"] == "temperature"][-1]
    held = json.loads((folder / "nanopolaris.json").read_text())
    assert held["training"] == {"n": 8, "temperature": chosen, "top_k": 0, "max_tokens": 56}
    assert held["evaluation"] == {"n": 2, "temperature": 1.0, "top_k": 0, "max_tokens": 64}
    last = [row for row in rows if row["kind"] == "eval" and row["name"] == "held-out"][-1]
    assert last["final"] and f"held-out: avg@2 {100 * last['avg']:.1f} (95% " in (folder / "README.md").read_text()


def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(finished, tmp_path):
    folder = tmp_path / "tiny"
    with forked.Popen(command(tmp_path), stdout=forked.PIPE) as process:
        while process.poll() is None:  # SIGTERM, as from a preempted machine, in the second step of RL
            time.sleep(0.01)
            if (folder / "metrics.jsonl").exists() and '"step": 151,' in (folder / "metrics.jsonl").read_text():
                process.send_signal(signal.SIGTERM)
                break
        output = process.communicate(timeout=200)[0]
    assert process.returncode == -signal.SIGTERM and "resume with" in output, output[-2000:]  # 143 in a shell
    assert not (folder / "report.html").exists() and not (folder / "finished").exists()
    assert str(folder) in (folder / "resume-me").read_text()  # torchrun hides that it was asked to stop
    done = run(command(None, "--resume", str(folder)))
    assert (folder / "finished").exists() and not (folder / "resume-me").exists()
    assert done.returncode == 0, done.stderr[-3000:]
    assert deterministic(folder) == deterministic(finished[0])
    resumed, straight = (load_file(f / "stage-3" / "model.safetensors") for f in (folder, finished[0]))
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


def test_killed_and_damaged_at_random_moments_equals_uninterrupted_bit_for_bit(finished, tmp_path, monkeypatch):
    """The same command with --resume until it ends; bench/interrupt.py does this with more kills, of every kind."""
    monkeypatch.setattr(interrupt, "subprocess", forked)
    out, draw = tmp_path / "out", random.Random(4)
    for step in (1, 60, 152):  # in fine-tuning before and after the first checkpoint, in RL
        process = interrupt.launch(out, MINIATURE)
        assert interrupt.wait_for(process, interrupt.step_reached(out, step), 250)
        time.sleep(draw.uniform(0.0, 0.3))
        interrupt.end(process, signal.SIGKILL)
        process.wait()
        if step == 60:
            interrupt.flip_a_byte(out, draw)
        if step == 152:
            interrupt.cut_a_line(out, draw)
    log = (tmp_path / "out.log").read_text()
    assert "no unfinished run of tiny" in log  # the first launch
    assert interrupt.finish(interrupt.launch(out, MINIATURE))
    log = (tmp_path / "out.log").read_text()
    assert log.count(f"resuming {out / 'tiny'} after step ") >= 2 and "skipped" in log
    assert [path.name for path in out.iterdir()] == ["tiny"]
    assert interrupt.same(out / "tiny", finished[0])


def test_a_worker_that_torchrun_restarts_resumes_the_run(finished, tmp_path):
    """Only the sft stage, by one worker on one core: it ends with the same model as stage 0 of the finished run."""
    tables = (finished[0] / "recipe.toml").read_text().split("[[stage]]")
    recipe = tmp_path / "sft.toml"
    recipe.write_text("[[stage]]".join(tables[:2]).replace('name = "tiny"', 'name = "sft"'))
    out, cores = tmp_path / "out", os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})  # the same number of threads as the finished run
    try:
        words = [str(recipe), "--set", "eval.data=", "--set", "final.data="]
        process = interrupt.launch(out, (), resume=False, starter=interrupt.torchrun(1, restarts=2), words=words)
    finally:
        os.sched_setaffinity(0, cores)
    for moment in (lambda: any(out.glob("*/recipe.toml")), interrupt.step_reached(out, 60)):
        assert interrupt.wait_for(process, moment, 250)
        killed = interrupt.workers_of(process)
        for worker in killed:
            os.kill(worker, signal.SIGKILL)
        assert len(killed) == 1 and interrupt.wait_for(
            process, lambda killed=killed: interrupt.workers_of(process) != killed
        )
    assert interrupt.finish(process)
    log = (tmp_path / "out.log").read_text()
    assert f"{out / 'sft'} has no checkpoint: starting over" in log
    assert f"resuming {out / 'sft'} after step " in log and [path.name for path in out.iterdir()] == ["sft"]
    again, straight = (load_file(f / "stage-0" / "model.safetensors") for f in (out / "sft", finished[0]))
    assert all(torch.equal(again[name], straight[name]) for name in straight)
    rows = ([row for row in deterministic(f) if row["kind"] == "sft"] for f in (out / "sft", finished[0]))
    assert next(rows) == next(rows)


@pytest.fixture
def last_stage(finished, tmp_path):
    """A copy of the finished run, reset to the start of its last stage of two steps."""
    folder = tmp_path / "tiny"
    shutil.copytree(finished[0], folder)
    shutil.rmtree(folder / "checkpoints" / "step-158")
    assert (folder / "checkpoints" / "step-156").is_dir()
    return folder


def main(monkeypatch, *arguments):
    """Run train.py in this process, which saves the imports; return its exit status, None at its end."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    try:
        train.main(training_arguments(train.__doc__))
    except SystemExit as stopped:
        return str(stopped.code)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])  # a closed ssh session sends SIGHUP
def test_a_request_to_stop_during_the_update_saves_the_step_before_it(
    finished, last_stage, monkeypatch, capsys, number
):
    step = grpo.optimizer_step

    def asked(*arguments, **more):
        signal.raise_signal(number)
        return step(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "optimizer_step", asked)
        assert main(patch, "--resume", last_stage) == str(128 + number)  # a sweep must not take it for finished
    assert "stopped after step 156" in capsys.readouterr().out and (last_stage / "resume-me").exists()
    assert main(monkeypatch, "--resume", last_stage) is None
    assert interrupt.same(last_stage, finished[0])


@pytest.mark.parametrize("change", ["deleted", "emptied", "moved", "replaced"])
def test_a_run_stops_when_its_folder_is_no_longer_in_its_place(last_stage, monkeypatch, change):
    """Guards: a run went on in a folder without a recipe, from which nothing could be resumed."""
    step = grpo.optimizer_step

    def lost(*arguments, **more):
        if change == "emptied":
            (last_stage / "recipe.toml").unlink()
        else:
            last_stage.rename(last_stage.with_name("elsewhere"))
        if change == "replaced":
            shutil.copytree(last_stage.with_name("elsewhere"), last_stage)
        return step(*arguments, **more)

    before = {path.name for path in (last_stage / "checkpoints").iterdir()}
    monkeypatch.setattr(runs, "optimizer_step", lost)
    error = main(monkeypatch, "--resume", last_stage)
    assert f"{last_stage} was deleted, moved or replaced during the run, which stops" in error and "\n" not in error
    assert last_stage.exists() == (change in ("emptied", "replaced"))
    if last_stage.exists():
        assert {path.name for path in (last_stage / "checkpoints").iterdir()} == before


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[", "Expecting value"),
        ("[3]", "not subscriptable"),
        ('[{"recipe": "["}]', "Invalid"),
        ('[{"recipe": "", "code": 1}]', "texts"),
    ],
)
def test_fingerprints_that_are_none_are_one_sentence(tmp_path, content, reason):
    path = tmp_path / "fingerprints.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match=f"fingerprints.json cannot be read .*{reason}") as caught:
        run_folder.read_launches(path)
    assert "\n" not in str(caught.value)


CHANGES = {
    "recipe": (
        "recipe.toml",
        lambda text: text.replace("temperature = 1.0", "temperature = 0.9"),
        "temperature was 1.0",
    ),
    "data": ("world/train.jsonl", lambda text: text.replace(" - ", "  - ", 1), "data world/train.jsonl changed"),
    "model": ("world/model/config.json", lambda text: text + " ", "model config changed"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_resume_that_does_not_match_names_the_difference_and_needs_a_flag(last_stage, monkeypatch, what):
    name, change, difference = CHANGES[what]
    text = (last_stage / name).read_text()
    (last_stage / name).write_text(change(text))
    assert change(text) != text
    before = sorted(path.name for path in last_stage.iterdir())
    refusal = main(monkeypatch, "--resume", last_stage)
    assert refusal.startswith(f"train.py: {last_stage} differs from the run so far: ") and difference in refusal
    assert refusal.endswith("--resume-anyway") and "\n" not in refusal
    assert sorted(path.name for path in last_stage.iterdir()) == before  # nothing was touched
    monkeypatch.setattr(train, "train", lambda run: (_ for _ in ()).throw(RecipeError("resumed")))
    assert main(monkeypatch, "--resume", last_stage, "--resume-anyway") == "train.py: resumed"


def test_changed_code_needs_a_flag_and_a_value_set_on_purpose_does_not(last_stage, monkeypatch):
    monkeypatch.setattr(train, "train", lambda run: (_ for _ in ()).throw(RecipeError("resumed")))
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "code_version", lambda folder: "another, torch 9, commit 0")
        assert "so far: code changed since commit" in main(patch, "--resume", last_stage)
    rate = ("--set", "stage.3.learning_rate=1e-5")
    assert main(monkeypatch, "--resume", last_stage, *rate) == "train.py: resumed"
    assert load_recipe(last_stage / "recipe.toml").stage[3].learning_rate == 1e-5
    before, since = json.loads((last_stage / "fingerprints.json").read_text())
    assert before["after_step"] == 0 and since["after_step"] == 156 and "learning_rate = 1e-05" in since["recipe"]
    # this is now the recipe, although no checkpoint has been written with it yet
    assert main(monkeypatch, "--resume", last_stage) == "train.py: resumed"


@pytest.mark.parametrize("repeated", [False, True])  # a repeated command changes nothing on purpose
def test_prompts_that_other_libraries_render_need_a_flag(last_stage, monkeypatch, repeated):
    render = RolloutWorker.prompt

    def other(*arguments):
        return replace(prompt := render(*arguments), tokens=[*prompt.tokens, 1])

    monkeypatch.setattr(RolloutWorker, "prompt", other)
    monkeypatch.setattr(train, "train", lambda run: (_ for _ in ()).throw(RecipeError("resumed")))
    words = ("--resume", last_stage)
    if repeated:
        (last_stage / "finished").unlink(missing_ok=True)
        recipe, out = last_stage / "recipe.toml", last_stage.parent
        words = (recipe, "--out", out, "--set", "thinking=auto", "--resume")
    refusal = main(monkeypatch, *words)
    assert "so far: prompts world/beyond-window.jsonl changed; prompts world/held" in refusal
    assert "--resume-anyway" in refusal


def test_a_run_without_its_fingerprint_needs_a_flag(last_stage, monkeypatch):
    """Guards: a copied run that lacked the file was resumed without any check."""
    monkeypatch.setattr(train, "train", lambda run: (_ for _ in ()).throw(RecipeError("resumed")))
    (last_stage / "fingerprints.json").unlink()
    assert "fingerprints.json is missing" in main(monkeypatch, "--resume", last_stage)
    assert main(monkeypatch, "--resume", last_stage, "--resume-anyway") == "train.py: resumed"
    assert main(monkeypatch, "--resume", last_stage) == "train.py: resumed"


def test_a_run_whose_only_checkpoint_is_damaged_does_not_start_over(last_stage, monkeypatch):
    interrupt.flip_a_byte(last_stage.parent, random.Random(0))
    for path in (last_stage / "checkpoints").iterdir():
        (path / "run.pt").unlink()
    rows = (last_stage / "metrics.jsonl").read_bytes()
    error = main(monkeypatch, "--resume", last_stage)
    assert error.startswith(f"train.py: no checkpoint of {last_stage} can be used: step-156 (") and "\n" not in error
    assert (last_stage / "metrics.jsonl").read_bytes() == rows


def test_a_run_in_progress_is_not_resumed_by_a_second_process(last_stage, monkeypatch):
    held = run_folder.hold(last_stage)
    assert "is in use by another process" in main(monkeypatch, "--resume", last_stage)
    os.close(held)
    os.close(run_folder.hold(last_stage))


def test_resume_without_a_name_takes_the_newest_unfinished_run_of_exactly_this_recipe(finished, tmp_path):
    text = (finished[0] / "recipe.toml").read_text()
    recipe = load_recipe(finished[0] / "recipe.toml")
    assert run_folder.find_unfinished(tmp_path, recipe, False) is None
    for age, (name, recipe_text) in enumerate(
        {"tiny": text, "tiny-2": text, "tiny-3": text.replace("\nseed = 0", "\nseed = 1", 1), "tiny-new": text}.items()
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.toml").write_text(recipe_text)
        os.utime(tmp_path / name / "recipe.toml", (1e9 + age, 1e9 + age))
    assert run_folder.find_unfinished(tmp_path, recipe, False) == tmp_path / "tiny-2"
    assert run_folder.find_unfinished(tmp_path, recipe, True) == tmp_path / "tiny-3"
    (tmp_path / "tiny-2" / "finished").touch()
    assert run_folder.find_unfinished(tmp_path, recipe, False) == tmp_path / "tiny"
    (tmp_path / "tiny" / "finished").touch()
    with pytest.raises(CheckpointError, match=r"tiny-3 \(recipe: seed was 1, is 0\): name one with --resume RUN"):
        run_folder.find_unfinished(tmp_path, recipe, False)
    (tmp_path / "tiny-3" / "finished").touch()
    assert run_folder.find_unfinished(tmp_path, recipe, False) is None


def test_a_mistyped_name_does_not_start_a_new_run_beside_the_unfinished_one(tmp_path):
    """Guards: `--resume --set name=tinny` started a new run."""
    recipe = load_recipe(ROOT / "recipes" / "tiny.toml")
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "recipe.toml").write_text(to_toml(recipe))
    with pytest.raises(CheckpointError, match=r"tiny \(recipe: name was 'tiny', is 'tinny'\): name one with --resume RUN"):
        run_folder.find_unfinished(tmp_path, replace(recipe, name="tinny"), False)
    assert run_folder.find_unfinished(tmp_path, replace(recipe, name="other", seed=1), False) is None


def test_gradients_that_stay_nonfinite_stop_the_run_with_the_batch(tmp_path, monkeypatch, capsys):
    """A learning rate so high that the weights overflow float32 in the first step, and no later gradient is finite."""
    arguments = [*command(tmp_path)[2:], "--set", "stage.0.learning_rate=1e38", "--set", "stage.0.warmup_steps=0"]
    error = main(monkeypatch, *arguments)
    folder = tmp_path / "tiny"
    assert "step 4: 3 consecutive updates without a finite gradient" in error and "nonfinite-step-4.pt" in error
    batch = torch.load(folder / "nonfinite-step-4.pt", weights_only=True)
    assert len(batch) == 16 and {"tokens", "prompt_length", "advantage", "old_logprobs"} <= batch[0].keys()
    assert [row["nonfinite"] for row in metrics(folder) if row["kind"] == "sft"] == [0, 1, 1, 1]
    assert (folder / "checkpoints" / "step-4").is_dir()  # the run can be resumed


def test_a_read_only_folder_is_one_sentence(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(tmp_path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        error = main(patch, *command(tmp_path)[2:])
    assert "Read-only file system" in error and str(tmp_path) in error and "\n" not in error


def two_nodes(arguments):
    """Run two torchrun agents, as if on two machines, which find each other by torchrun's rendezvous."""
    place = f"localhost:{free_port()}"
    nodes = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", place]
    agent = [sys.executable, forked.TORCHRUN, *nodes, "--local-addr", "localhost", *arguments]

    def run_on(core):
        os.sched_setaffinity(0, {core})  # of this thread: two machines share no cores
        return run(agent)

    with ThreadPoolExecutor(2) as pool:
        cores = islice(cycle(sorted(os.sched_getaffinity(0))), 2)
        return max(pool.map(run_on, cores), key=lambda done: done.returncode != 0)


def test_the_layout_changes_no_problem_no_token_no_loss_and_no_gradient(finished, tmp_path):
    # all start RL from the weights of the finished run after fine-tuning; no number of processes divides 7 problems, so
    # that groups are split
    folder = finished[0]
    recipe = tmp_path / "rl.toml"
    recipe.write_text(
        f"""name = "rl"
model = "{folder / "stage-0"}"
instruction = ""
micro_batch_tokens = 300
reward = {{ format = 0.1, steps = 0.5 }}
sampler = {{ rows = 20, page_tokens = 16, cache_tokens = 4000 }}
[[stage]]
kind = "rl"
data = "{folder / "world" / "train.jsonl"}"
steps = 2
batch_problems = 7
temperature = 1.0
max_prompt_tokens = 112
max_response_tokens = 48
informative_share = 0.0
learning_rate = 1e-3
"""
    )
    small = ["--set", "micro_batch_tokens=90", "--set", "sampler.rows=5"]
    rows = {}
    for name, processes, settings in (("one", 0, []), ("small", 0, small), ("nodes", 2, []), ("four", 4, small)):
        out = tmp_path / name
        arguments = [str(recipe), "--out", str(out), *settings]
        if name == "nodes":
            done = two_nodes([str(ROOT / "train.py"), *arguments])
        else:
            arguments = [*command(None), *arguments]
            done = forked.run_ranks(processes, arguments, timeout=300) if processes else run(arguments)
        assert done.returncode == 0, done.stderr[-3000:]
        rows[name] = [row for row in metrics(out / "rl") if row["kind"] == "rl"]
        shares = [row["idle_shares"] for row in rows[name]]
        assert len(shares) == 2 and all(len(share) == max(1, processes) and min(share) == 0 for share in shares)
    for name in ("small", "nodes", "four"):
        for one, other in zip(rows["one"], rows[name], strict=True):
            assert not one["skipped"] and one["grad_norm"] > 0
            for key in ("problems_hash", "tokens_hash", "response_length_max", "rescued", "substituted", "verdicts"):
                assert one[key] == other[key], (name, key)
            for key in ("reward_mean", "response_length_mean", "distinct4"):
                assert one[key] == pytest.approx(other[key], abs=1e-9), (name, key)
            assert one["loss"] == pytest.approx(other["loss"], abs=1e-5), name
            assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5), name
    assert rows["one"][0]["tokens_hash"] != rows["one"][1]["tokens_hash"]


def test_a_stage_ends_with_its_token_budget_also_after_a_resume(finished, tmp_path):
    folder, recipe = finished[0], tmp_path / "budget.toml"
    stage = "steps = 40\ngenerated_tokens = 2500\nbatch_problems = 8\nmax_prompt_tokens = 112\nmax_response_tokens = 48"
    stage = f'[[stage]]\nkind = "rl"\ntemperature = 1.0\nfilter_before = true\n{stage}\n'
    recipe.write_text(
        f"""name = "budget"
model = "{folder / "stage-0"}"
instruction = ""
sampler = {{ rows = 64, page_tokens = 128, cache_tokens = 10000 }}
run = {{ checkpoint_every_steps = 1, checkpoints_kept = 99 }}
search = {{ problems = 8, samples = 2 }}
{stage}data = "{folder / "world" / "train.jsonl"}"
{stage}"""
    )
    done = run([*command(None), str(recipe), "--out", str(tmp_path)])
    assert done.returncode == 0, done.stderr[-3000:]
    expected = [row for row in metrics(tmp_path / "budget") if row["kind"] == "rl"]
    for stage in (0, 1):
        tokens = [row["tokens"] for row in expected if row["stage"] == stage]
        assert 2 <= len(tokens) < 40 and sum(tokens[:-1]) < 2500 <= sum(tokens)
    # estimates and searches report their own tokens: 8 rollouts of each problem, 2 of each probe, of 2 tokens or more
    rows = metrics(tmp_path / "budget")
    spent = [row["tokens"] for row in rows if row["kind"] == "filter" and row["label"].startswith("before")]
    assert len(spent) == 2 and all(2 * 8 * 16 < tokens < 48 * 8 * 32 for tokens in spent)
    assert all(2 * 16 <= row["tokens"] <= 48 * 16 for row in rows if row["kind"] == "temperature")
    # resume after the first step of the second stage, whose tokens are in the checkpoint
    first = next(row["step"] for row in expected if row["stage"] == 1)
    for path in (tmp_path / "budget" / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > first:
            shutil.rmtree(path)
    again = run(command(None, "--resume", str(tmp_path / "budget")))
    assert again.returncode == 0 and f"after step {first}" in again.stdout, again.stderr[-3000:]
    assert [row["tokens"] for row in metrics(tmp_path / "budget") if row["kind"] == "rl"] == [
        r["tokens"] for r in expected
    ]


def test_data_filter_commands_filter_and_drop_as_the_run_did(finished, tmp_path, monkeypatch):
    folder = finished[0]
    filters = {row["label"]: row for row in metrics(folder) if row["kind"] == "filter"}
    data = folder / "world" / "train.jsonl"
    for words, label, option in (
        (["filter", folder / "pass-rates-1.jsonl"], "before stage 1", []),
        (["drop", folder], "after stage 1", ["--stage", "1"]),
        (["drop", folder], "after stage 3", []),
    ):
        out = tmp_path / f"{label.replace(' ', '-')}.jsonl"
        monkeypatch.setattr("sys.argv", ["data_filter.py", *map(str, [*words, data, out]), *option])
        difficulty.main(difficulty_arguments(None))
        # the run dropped from the problems that its filter had kept, the command drops from all
        assert len(out.read_text().splitlines()) == filters[label]["kept"], label
    first = json.loads((folder / "pass-rates-1.jsonl").read_text().splitlines()[0])["settings"]
    model = fingerprint.model_identity(folder / "stage-0")
    assert {part: first["identity"][part] for part in model} == model and first["n"] == 8


# --------------------------------------------------------------------------- duplicates and benchmark problems


@dataclass
class OneProcess:
    """The part of Processes that guard_data uses."""

    is_main: bool = True
    said: list = field(default_factory=list)

    def say(self, line):
        self.said.append(line)


@pytest.fixture
def guarded(tmp_path):
    """Return a function that runs guard_data on data with copied rows, in a new or a resumed run."""

    def write(name, texts, **more):
        rows = [{"id": n, "problem": text, "answer": "1"} | more for n, text in enumerate(texts)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / f"{name}.jsonl"

    chats = [("What is d?", "so"), ("What is x?", "so"), ("What is x?", "so"), ("What is x?", "else")]
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in chats]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    (tmp_path / "r.toml").write_text(
        f"""name = "r"
model = "m"
eval = {{ data = "{write("held", ["What is d?", "what is  D?"])}" }}
guard = {{ benchmarks = ["{write("more", ["What is  $e$?"], answer=None)}"] }}
[[stage]]
kind = "sft"
data = "{tmp_path / "chat.jsonl"}"
steps = 1
[[stage]]
kind = "rl"
data = "{write("one", ["What is a?", "What is b?", "what is a?", "What is d?", "What is e?"])}"
steps = 1
batch_problems = 1
[[stage]]
kind = "rl"
data = "{write("two", ["What is c?", "What is B?"])}"
steps = 1
batch_problems = 1
"""
    )

    def guard(*overrides, is_main=True):
        folder, processes = tmp_path / "run", OneProcess(is_main)
        made = Metrics(folder, enabled=is_main)
        recipe = load_recipe(tmp_path / "r.toml", overrides)
        unused = dict.fromkeys(["model", "model_folder", "worker", "stop", "resume_from", "lock", "saved"])
        run = runs.Run(
            recipe=recipe, folder=folder, processes=processes, data=RunData(recipe, folder), metrics=made,
            state=RunState(), micro_batch_tokens=1, **unused,
        )  # fmt: skip
        start.guard_data(run)
        made.close()
        return run

    return guard


def ids(run, index):
    return [problem.id for problem in run.stage_problems(index)]


def test_copies_are_reported_and_trained_on_unless_the_recipe_excludes_them(guarded, tmp_path):
    run = guarded()
    assert ids(run, 1) == [f"one/{n}" for n in range(5)] and ids(run, 2) == ["two/0", "two/1"]
    said = "\n".join(run.processes.said).replace(f"{tmp_path}/", "")
    assert "held.jsonl: 1 problems repeat an earlier one's text (held/1 is held/0)" in said
    assert "chat.jsonl: 1 of 4 repeat an earlier one's text (row 3 is row 2): kept in training (guard.dup" in said
    assert "chat.jsonl: 1 of 4 are a benchmark's (row 1 is held/0): kept in training" in said
    assert "one.jsonl: 1 of 5 repeat an earlier one's text (one/2 is one/0)" in said
    assert "one.jsonl: 2 of 5 are a benchmark's (one/3 is held/0, one/4 is more/0)" in said
    assert "two.jsonl: 1 of 2 repeat an earlier one's text (two/1 is one/1)" in said and len(run.processes.said) == 6
    assert [(row["duplicates"], row["contamination"], row["excluded"]) for row in metrics(run.folder)] == [
        (1, 1, 0), (1, 2, 0), (1, 0, 0),
    ]  # fmt: skip


def test_exclusions_are_recorded_once_and_are_the_same_on_every_process(guarded):
    rules = "guard.duplicates=exclude", "guard.contamination=exclude"
    run = guarded(*rules)
    assert ids(run, 1) == ["one/0", "one/1"] and ids(run, 2) == ["two/0"]
    assert run.data.excluded["sft", run.recipe.stage[0].data] == {"row 1", "row 3"}
    assert sum(line.endswith(": excluded") for line in run.processes.said) == 5
    record = metrics(run.folder)
    assert [row["excluded_ids"] for row in record] == [["row 1", "row 3"], ["one/2", "one/3", "one/4"], ["two/1"]]
    assert all(row["excluded"] == len(row["excluded_ids"]) and row["kind"] == "guard" for row in record)
    other = guarded(*rules, is_main=False)
    assert other.data.excluded == run.data.excluded and ids(other, 1) == ids(run, 1)
    assert guarded(*rules).data.excluded == run.data.excluded and metrics(run.folder) == record  # resumed
    assert len(metrics(guarded(rules[0]).folder)) == 6  # resumed with another guard: recorded too
    assert ids(guarded(rules[1]), 1) == ["one/0", "one/1", "one/2"]


def test_one_id_for_two_problems_is_refused(guarded, tmp_path):
    """Files of one name in two folders: a rollout kept for one problem was put into the group of the other."""
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.jsonl").write_text('{"id": 0, "problem": "What is z?", "answer": "1"}\n')
    with pytest.raises(DataError, match=r"b/one.jsonl: one/0 is another problem than in an earlier stage's data: rename"):
        guarded(f"stage.2.data={tmp_path / 'b' / 'one.jsonl'}")
    (tmp_path / "c").mkdir()
    shutil.copy(tmp_path / "one.jsonl", tmp_path / "c" / "one.jsonl")  # the same problems may come again
    assert ids(guarded(f"stage.2.data={tmp_path / 'c' / 'one.jsonl'}"), 2)[0] == "one/0"


def test_a_run_does_not_resume_without_problems_that_it_needs(guarded):
    run = guarded("guard.duplicates=exclude")
    run.state.stage, run.state.prepared, run.state.problem_ids = 1, True, ["one/1", "one/2"]
    with pytest.raises(DataError, match=r"1 of the 2 problems that this run trains on are missing \(first: one/2"):
        ids(run, 1)


# -------------------------------------------------------------------------------------------------- bad input


def refused(monkeypatch, arguments):
    """Return the error of a run that must not start."""
    status = main(monkeypatch, *arguments[1:])
    assert status is not None
    return status


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such.toml"], "no such recipe file"),
        (["--set", "model=no-such-model"], "no such model folder"),
        (["--set", "stage.1.data=no-such.jsonl"], "no-such.jsonl"),
        (["--set", "stage.1.temprature=1.0"], "did you mean temperature?"),
        (["--set", "stage.1.max_prompt_tokens=5"], "raise max_prompt_tokens"),
        (["--set", "stage.1.max_response_tokens=100000"], "exceed the model's window"),
        (["--set", "stage.1.batch_problems=999"], "cannot fill a batch of 999"),
    ],
)
def test_bad_input_is_one_sentence(monkeypatch, tmp_path, arguments, message):
    error = refused(monkeypatch, [*command(tmp_path)[1:], *arguments])
    assert error.startswith("train.py: ") and message in error
    assert "\n" not in error and not list(tmp_path.iterdir())  # a refused start leaves nothing behind


def test_a_row_without_an_answer_names_the_row(monkeypatch, tmp_path):
    data = tmp_path / "bad.jsonl"
    data.write_text('{"problem": "1 + 1", "answer": "2"}\n{"problem": "1 + 2"}\n')
    override = ["--set", f"stage.1.data={data}"]
    assert "bad.jsonl, row 2 has no answer" in refused(monkeypatch, [*command(tmp_path)[1:], *override])


def test_errors_reach_the_shell(tmp_path):
    done = run_unforked([sys.executable, str(ROOT / "train.py"), "no-such.toml", "--out", str(tmp_path)])
    assert done.returncode == 1 and done.stderr.startswith("train.py: no-such.toml: no such recipe file")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("out", ["new/runs", "dangling", "long"])
def test_a_start_that_is_refused_leaves_nothing_behind(monkeypatch, tmp_path, out):
    """Guards: a dangling link, as of a disk that is not mounted, was taken for a folder in use, for ever."""
    (tmp_path / "dangling").symlink_to(tmp_path / "unmounted")
    words = ["--out", tmp_path / out, "--set", "name=" + "x" * 300 if out == "long" else "stage.1.batch_problems=999"]
    error = refused(monkeypatch, [*command(tmp_path)[1:], *words])
    expected = {
        "new/runs": "cannot fill a batch of 999",
        "dangling": f"{tmp_path / 'dangling'} links to {tmp_path / 'unmounted'}: is its disk mounted?",
        "long": "File name too long",
    }
    assert expected[out] in error and "\n" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["dangling"]


def test_a_dangling_link_in_the_place_of_a_run_is_refused(tmp_path):
    (tmp_path / "tiny").symlink_to(tmp_path / "unmounted")
    with pytest.raises(RecipeError, match=f"{tmp_path}/tiny links to {tmp_path}/unmounted: is its disk mounted"):
        run_folder.new_folder(tmp_path, "tiny")


@pytest.mark.parametrize(
    "words",
    [["train.py"], ["eval.py", "m", "--data", "d"], ["data_filter.py", "estimate", "m", "d"], ["model.py", "m", "o"]],
)
def test_ctrl_c_while_starting_is_no_traceback(tmp_path, words):
    """The signal comes when the import of torch begins."""
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    (tmp_path / "numpy.py").write_text((tmp_path / "torch.py").read_text())
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    script = [sys.executable, str(ROOT / words[0]), *words[1:]]
    done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_a_second_run_gets_its_own_folder(tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "keep").write_text("mine")
    assert run_folder.new_folder(tmp_path, "tiny") == tmp_path / "tiny-2"
    assert run_folder.new_folder(tmp_path, "tiny") == tmp_path / "tiny-3"
    assert [path.name for path in (tmp_path / "tiny").iterdir()] == ["keep"]
