"""engine/checkpoint.py and engine/fingerprint.py: a checkpoint is read exactly as it was written, or not at all."""

import builtins
import errno
import io
import io
import json
import operator
import os
import pickle
import re
import shutil
import sys
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import model as models
from data_filter import Visit
from engine import checkpoint as checkpoints
from engine import distributed, files, fingerprint, sharding
from engine.checkpoint import CheckpointError, RunState, list_checkpoints, load_weights_and_optimizer, read_state
from lab.export import export_arguments, main
from lab.data_files import DataError
from lab.problems import Problem
from rollout import Prompt, Rollout

ROOT = Path(__file__).resolve().parent.parent
SOURCE = {
    "model_type": "qwen3", "vocab_size": 17, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "max_position_embeddings": 32,
}  # fmt: skip


@pytest.fixture(scope="module")
def processes():
    yield distributed.start()
    distributed.stop()


def trained(processes, seed):
    """A sharded model and its optimizer, after two steps."""
    model = models.Transformer(models.parse_config(SOURCE))
    models.initialise(model, seed)
    sharding.shard(model, processes.mesh, processes.compute_dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * (seed + 1))
    tokens = torch.arange(9) % 17
    for _ in range(2):
        model(tokens, models.Packed([9]), tokens, tokens).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def tensors(model, optimizer):
    moments = {
        f"{i}.{name}": value for i, s in enumerate(optimizer.state.values()) for name, value in s.items()
    }  # in the order of parameters
    shards = {name: p.detach() for name, p in model.named_parameters()} | moments
    return {name: (t.full_tensor() if hasattr(t, "full_tensor") else t).clone() for name, t in shards.items()}


def state_of(step):
    state = RunState(
        step=step, stage=2, stage_step=4, stage_tokens=99, prepared=True, position=96, problem_ids=["a/1", "b/é"],
        temperature=1.15, diversity=0.625,
    )  # fmt: skip
    state.history.append(Visit("a/1", 1, 3, (1.0, 0.0, 0.5)))
    state.history.append(Visit("a/1", 2, 6, (0.0, 0.0)))
    state.history.append(Visit("b/é", -1, 0, (1.0,)))
    rollout = Rollout(
        problem_id="a/1",
        index=5,
        prompt=np.array([3, 1, 2], dtype=np.int32),
        tokens=np.array([9, 8, 0], dtype=np.int32),
        logprobs=np.array([-0.1, -2.5, -1e-7], dtype=np.float32),
        finish_reason="stop",
        temperature=1.1,
    )
    state.sinks.held["a/1"] = (rollout, 1.25)
    return state


def save(processes, folder, step, kept=2, parts=None):
    return checkpoints.save_checkpoint(folder, *(parts or trained(processes, 0)), state_of(step), processes, kept)


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])  # the second in Python 3.13
def test_a_path_in_a_checkpoint_is_read_whatever_python_calls_it(module):
    written = f"c{module}\nPosixPath\n(S'runs'\nS'tiny'\ntR.".encode()
    assert checkpoints.MetadataUnpickler(io.BytesIO(written)).load() == "runs/tiny"


def test_the_state_of_a_run_comes_back_exactly(processes, tmp_path):
    saved = save(processes, tmp_path, 7)
    torch.manual_seed(123)  # read_state restores the generator
    folder, found = read_state(tmp_path, processes)
    assert folder == saved == tmp_path / "checkpoints" / "step-7"
    expected = state_of(7)
    plain = [name for name in vars(expected) if name not in ("history", "sinks")]
    assert [getattr(found, name) for name in plain] == [getattr(expected, name) for name in plain]
    assert found.history.by_problem == expected.history.by_problem
    assert found.history.pass_rate("a/1") == 0.3
    (rollout, reward), (wanted, _) = found.sinks.held["a/1"], expected.sinks.held["a/1"]
    packed = checkpoints._pack(expected)["sinks"]["a/1"]["tokens"]
    assert np.shares_memory(packed.numpy(), wanted.tokens)  # sinks may be gigabytes
    assert list(found.sinks.held) == ["a/1"] and reward == 1.25
    for name, value in vars(wanted).items():
        if isinstance(value, np.ndarray):
            assert isinstance(getattr(rollout, name), np.ndarray) and getattr(rollout, name).dtype == value.dtype
            np.testing.assert_array_equal(getattr(rollout, name), value)
        else:
            assert getattr(rollout, name) == value and type(getattr(rollout, name)) is type(value)


def test_the_state_of_a_run_before_its_first_step_comes_back(processes, tmp_path):
    checkpoints.save_checkpoint(tmp_path, *trained(processes, 0), RunState(), processes, 1)
    _, found = read_state(tmp_path, processes)
    assert found.step == 0 and found.diversity is None and found.problem_ids == []
    assert not found.history.by_problem and not found.sinks.held


def test_torch_continues_to_draw_as_if_uninterrupted(processes, tmp_path):
    parts = trained(processes, 0)
    torch.manual_seed(5)
    save(processes, tmp_path, 1, parts=parts)
    expected = torch.rand(4)
    torch.manual_seed(6)
    read_state(tmp_path, processes)
    assert torch.equal(torch.rand(4), expected)


def test_weights_and_optimizer_come_back_exactly(processes, tmp_path):
    parts = trained(processes, 0)
    expected, rate = tensors(*parts), parts[1].param_groups[0]["lr"]
    folder = save(processes, tmp_path, 3, parts=parts)
    model, optimizer = trained(processes, 1)
    assert any(not torch.equal(t, expected[name]) for name, t in tensors(model, optimizer).items())
    load_weights_and_optimizer(folder, model, optimizer, processes)
    found = tensors(model, optimizer)
    assert found.keys() == expected.keys() and len(found) > 20
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert optimizer.param_groups[0]["lr"] == rate


def test_saving_and_loading_before_the_first_step_counts_no_step(processes, tmp_path):
    """Guards: torch creates AdamW's moments with a step at rate 0, which then counted in the bias correction."""

    def fresh():
        model, _ = trained(processes, 0)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.01)

    def step(model, optimizer):
        tokens = torch.arange(9) % 17
        model(tokens, models.Packed([9]), tokens, tokens).sum().backward()
        optimizer.step()
        return tensors(model, optimizer)

    expected, parts, others = step(*fresh()), fresh(), fresh()
    folder = save(processes, tmp_path, 3, parts=parts)
    load_weights_and_optimizer(folder, *others, processes)
    for found in (step(*parts), step(*others)):
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_newest_checkpoints_by_step_number_are_kept(processes, tmp_path):
    parts = trained(processes, 0)
    for step in (8, 9, 10, 100):
        save(processes, tmp_path, step, kept=3, parts=parts)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-9", "step-10", "step-100"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-10", "step-100", "step-9"]
    assert read_state(tmp_path, processes)[1].step == 100


def test_the_same_step_may_be_saved_again(processes, tmp_path):
    parts = trained(processes, 0)
    save(processes, tmp_path, 4, parts=parts)
    (tmp_path / "checkpoints/step-4/leftover").touch()
    save(processes, tmp_path, 4, parts=parts)
    assert not (tmp_path / "checkpoints/step-4/leftover").exists() and read_state(tmp_path, processes)[1].step == 4


def fill_up(monkeypatch, what):
    """Make the disk full for the function `what`."""

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*what, fail)


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_an_unfinished_checkpoint_is_never_seen(processes, tmp_path):
    parts = trained(processes, 0)
    save(processes, tmp_path, 4, parts=parts)
    shutil.copytree(tmp_path / "checkpoints/step-4", tmp_path / "checkpoints/step-6.unfinished")  # killed while saving
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-4"]
    assert read_state(tmp_path, processes)[1].step == 4
    save(processes, tmp_path, 6, parts=parts)  # the leftover is removed
    assert names(tmp_path) == ["step-4", "step-6"]


PLACES = [
    (checkpoints.dcp, "save"), (checkpoints, "_pack"), (checkpoints.torch, "save"), (checkpoints, "write_manifest"),
    (os, "fsync"), (files, "sync_folder"), (checkpoints.Path, "rename"), (checkpoints.Path, "mkdir"),
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place[1])
def test_a_full_disk_loses_no_good_checkpoint(processes, tmp_path, monkeypatch, place):
    parts = trained(processes, 0)
    save(processes, tmp_path, 4, kept=1, parts=parts)
    for step in (6, 4):  # a later step, and the same step again
        with monkeypatch.context() as patch, pytest.raises(CheckpointError) as caught:
            fill_up(patch, place)
            save(processes, tmp_path, step, kept=1, parts=parts)
        message = str(caught.value)
        assert f"step-{step} cannot be written ([Errno 28] No space left on device" in message and "--resume" in message
        assert "\n" not in message and names(tmp_path) == ["step-4"]
        assert read_state(tmp_path, processes)[1].step == 4
    save(processes, tmp_path, 6, kept=1, parts=parts)
    assert names(tmp_path) == ["step-6"]


def test_a_file_size_limit_is_reported_as_a_full_disk(processes, tmp_path):
    """A real limit on the size of a file, in a separate process: torch's own error is caught as well."""
    script = """
import resource, sys
from pathlib import Path
import torch
import model
from engine import checkpoint, distributed
from engine.sharding import shard
processes, folder = distributed.start(), Path(sys.argv[1])
net = model.Transformer(model.parse_config(eval(sys.argv[2])))
model.initialise(net, 0)
shard(net, processes.mesh, processes.compute_dtype)
optimizer = torch.optim.AdamW(net.parameters())
checkpoint.save_checkpoint(folder, net, optimizer, checkpoint.RunState(step=1), processes, 1)
state = checkpoint.RunState(step=2, problem_ids=[f"{i:040}" for i in range(10_000)] if sys.argv[3] == "run.pt" else [])
limit = 300_000 if sys.argv[3] == "run.pt" else 3_000
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    checkpoint.save_checkpoint(folder, net, optimizer, state, processes, 1)
except checkpoint.CheckpointError as error:
    print("error:", error)
assert checkpoint.read_state(folder, processes)[1].step == 1
print(sorted(path.name for path in (folder / "checkpoints").iterdir()))
distributed.stop()
"""
    (tmp_path / "script.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{script}")
    for what in ("run.pt", "tensors"):
        arguments = [sys.executable, tmp_path / "script.py", tmp_path / what, repr(SOURCE), what]
        done = forked.run(arguments, capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        *_, error, left = done.stdout.splitlines()
        assert error.startswith("error: ") and "step-2 cannot be written (" in error and left == "['step-1']"


@pytest.mark.parametrize("kept", [1, 2])
def test_a_skipped_checkpoint_is_never_kept_in_place_of_a_good_one(processes, tmp_path, kept):
    """Guards: with one kept, a damaged step-8 outlived the good step-6 and step-7 that came after it."""
    parts = trained(processes, 0)
    for step in (6, 8):
        save(processes, tmp_path, step, parts=parts)
    (tmp_path / "checkpoints/step-8/run.pt").unlink()
    assert read_state(tmp_path, processes)[1].step == 6
    save(processes, tmp_path, 7, kept=kept, parts=parts)
    assert names(tmp_path) == ["step-6", "step-7"][-kept:]


def test_a_step_stays_readable_at_every_moment_of_saving_it_again(processes, tmp_path, monkeypatch):
    parts = trained(processes, 0)
    save(processes, tmp_path, 4, kept=1, parts=parts)
    rename, seen = checkpoints.Path.rename, []

    def watched(path, target):
        rename(path, target)
        if path.parent.name != "checkpoints":  # a file inside a checkpoint
            return
        seen.append([(c.name, read_state(tmp_path, processes)[1].step) for c in list_checkpoints(tmp_path)])

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.Path, "rename", watched)
        save(processes, tmp_path, 4, kept=1, parts=parts)
    assert seen == [[("step-4.replaced", 4)], [("step-4", 4)], [("step-4", 4)]] and names(tmp_path) == ["step-4"]


def test_a_checksum_is_the_crc_of_the_crcs_of_blocks(tmp_path, monkeypatch):
    size = 3 * files.CHUNK
    monkeypatch.setattr(files, "CHECKSUM_BLOCK", size)
    data = np.random.default_rng(0).bytes(10 * 2**20 + 3)
    (tmp_path / "file").write_bytes(data)
    blocks = [zlib.crc32(data[i : i + size]) for i in range(0, len(data), size)]
    assert files.checksum(tmp_path / "file") == zlib.crc32(np.array(blocks, dtype="<u4").tobytes())
    (tmp_path / "empty").touch()
    assert files.checksum(tmp_path / "empty") == 0


def test_a_run_without_a_checkpoint_reads_as_none(processes, tmp_path):
    assert list_checkpoints(tmp_path) == [] and read_state(tmp_path, processes) is None


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


DAMAGES = {  # the damage, and the reported fault
    "a flipped byte of the weights": (lambda c: flip(c / "__0_0.distcp", 5000), "__0_0.distcp has changed"),
    "a flipped byte of the state": (lambda c: flip(c / "run.pt", 200), "run.pt has changed"),
    "a flipped byte of the index": (lambda c: flip(c / ".metadata", -1), ".metadata has changed"),
    "a flipped digit of the manifest": (lambda c: flip(c / "manifest.json", 70), "manifest.json (has changed|cannot)"),
    "a file cut off": (lambda c: os.truncate(c / "run.pt", 100), "run.pt has 100 bytes, not "),
    "an empty file": (lambda c: (c / "run.pt").write_bytes(b""), "run.pt has 0 bytes, not "),
    "weights cut off": (lambda c: os.truncate(c / "__0_0.distcp", 64), "__0_0.distcp has 64 bytes, not "),
    "weights missing": (lambda c: (c / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
    "a state missing": (lambda c: (c / "run.pt").unlink(), "run.pt is missing"),
    "a manifest missing": (lambda c: (c / "manifest.json").unlink(), "manifest.json is missing"),
    "a manifest cut off": (lambda c: os.truncate(c / "manifest.json", 30), "manifest.json cannot be read"),
    "a folder in place of a file": (lambda c: [(c / "run.pt").unlink(), (c / "run.pt").mkdir()], "run.pt (has|cannot)"),
    "another list as manifest": (lambda c: (c / "manifest.json").write_text("[1]"), "manifest.json cannot be read"),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_the_last_good_checkpoint_is_used_and_the_damaged_one_named(processes, tmp_path, capfd, how):
    parts = trained(processes, 0)
    for step in (4, 6):
        save(processes, tmp_path, step, parts=parts)
    harm, fault = DAMAGES[how]
    harm(tmp_path / "checkpoints/step-6")
    found, state = read_state(tmp_path, processes)
    assert found.name == "step-4" and state.step == 4
    assert re.search(f"skipped .*step-6: {fault}", capfd.readouterr().out)
    harm(tmp_path / "checkpoints/step-4")
    faults = rf"can be used: step-6 \({fault}.*\); step-4 \({fault}.*\): restore one"
    with pytest.raises(CheckpointError, match=faults) as caught:
        read_state(tmp_path, processes)
    assert "\n" not in str(caught.value)


BROKEN = {
    "empty": b"",
    "text": b"not a checkpoint\n" * 20,
    "pickle of code": b"cos\nsystem\n(S'true'\ntR.",
}


def seal(checkpoint):
    """Write the manifest of the present files."""
    paths = [path for path in checkpoint.iterdir() if path.name != "manifest.json"]
    checkpoints.write_manifest(checkpoint, checkpoints.file_checksums(paths))


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_state_is_one_sentence(processes, tmp_path, how):
    """Guards: a file that is not an archive raised pickle's own error."""
    path = save(processes, tmp_path, 4) / "run.pt"
    path.write_bytes(BROKEN[how])
    seal(path.parent)
    with pytest.raises(CheckpointError, match=r"step-4 \(run.pt cannot be read \(.*\)\): restore one") as caught:
        read_state(tmp_path, processes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"unheard_of": 1}, {"history": {}}, {"sinks": {"p": {"reward": 1.0}}}])
def test_a_state_of_another_version_is_one_sentence(processes, tmp_path, change):
    path = save(processes, tmp_path, 4) / "run.pt"
    torch.save(torch.load(path) | change, path)
    seal(path.parent)
    with pytest.raises(CheckpointError, match="run.pt cannot be read"):
        read_state(tmp_path, processes)


def test_a_checkpoint_that_continues_from_lost_lines_is_skipped(processes, tmp_path, capfd):
    parts = trained(processes, 0)
    for step, lines in ((4, [5, 8]), (6, [7, 12])):
        state = state_of(step)
        state.metrics_position = lines
        checkpoints.save_checkpoint(tmp_path, *parts, state, processes, 2)
    assert read_state(tmp_path, processes, lines=[7, 12])[1].step == 6
    assert read_state(tmp_path, processes, lines=[6, 12])[1].step == 4
    assert "metrics.jsonl has only 6 of the 7 lines that it continues from" in capfd.readouterr().out
    with pytest.raises(CheckpointError, match="rollouts.jsonl has only 3 of the 8 lines"):
        read_state(tmp_path, processes, lines=[7, 3])


# -------------------------------------------------------------------------------------------------- fingerprint

RECIPE = 'name = "a"\n[sampler]\nrows = 4\n[[stage]]\nkind = "sft"\nsteps = 3\n[[stage]]\nkind = "rl"\nsteps = 5\n'
PRINT = {
    "recipe": RECIPE, "model weights": "w1", "model config": "c1", "code": "a.py 1, b.py 1, torch 2, commit f",
    "data a.jsonl": "d1", "data b": "e1",
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "chosen", "expected"),
    [
        ({}, (), []),
        ({"recipe": RECIPE.replace("steps = 5", "steps = 9")}, (), ["recipe: stage.1.steps was 5, is 9"]),
        ({"recipe": RECIPE.replace("steps = 5", "steps = 9")}, ["stage.1.steps"], []),
        ({"recipe": RECIPE.replace("rows = 4", "rows = 5")}, ["sampler"], []),
        ({"recipe": RECIPE.replace("rows = 4", "rows = 5")}, ["sampler.row"], ["recipe: sampler.rows was 4, is 5"]),
        ({"recipe": RECIPE + "warmup = 1\n"}, (), ["recipe: stage.1.warmup was None, is 1"]),
        ({"model weights": "w2"}, ["model"], ["model weights changed"]),
        ({"data a.jsonl": "d2", "data c": "new"}, (), ["data a.jsonl changed"]),
        ({"code": "a.py 1, b.py 1, torch 2, commit g"}, (), []),  # the same code in another commit
        ({"code": "a.py 1, b.py 2, torch 3, commit g"}, (), ["code changed since commit f: b.py, torch"]),
        ({"code": "a.py 1, c.py 1, torch 2, commit g"}, (), ["code changed since commit f: b.py, c.py"]),
    ],
)
def test_differences_are_named(change, chosen, expected):
    assert fingerprint.differences(PRINT, PRINT | change, chosen) == expected


@pytest.fixture
def model_folder(tmp_path, small_world):
    """A copy of a laptop model with weights of 3 MB; no weight is read."""
    folder = tmp_path / "model"
    shutil.copytree(small_world / "model", folder)
    save_file({"a": torch.zeros(800_000), "b": torch.ones(3)}, folder / "model.safetensors")
    return folder


def flip_a_byte(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


MODEL_CHANGES = {
    "a byte in the middle of the weights": (lambda m: flip_a_byte(m / "model.safetensors", 1_600_000), ["weights"]),
    "the last byte": (lambda m: flip_a_byte(m / "model.safetensors", -1), ["weights"]),
    "a frequency": (lambda m: edit(m / "config.json", '"rope_theta": 1', '"rope_theta": 2'), ["config"]),
    "another end": (lambda m: (m / "generation_config.json").write_text('{"eos_token_id": 7}'), ["config"]),
    "the role": (lambda m: edit(m / "chat_template.jinja", "message", "messages"), ["chat template"]),
    "a template in the tokenizer's config": (
        lambda m: edit(m / "tokenizer_config.json", "{", '{"chat_template": "x", '),
        ["chat template"],
    ),
    "a token": (lambda m: (m / "added_tokens.json").write_text('{"a": 7}'), ["tokenizer"]),
    "how it splits": (lambda m: edit(m / "tokenizer_config.json", "{", '{"a": true, '), ["tokenizer"]),
    "a page about it": (lambda m: (m / "README.md").write_text("A model."), []),
    "weights that are not read": (lambda m: (m / "consolidated.safetensors").write_bytes(b"x"), []),
    "other times": (lambda m: [os.utime(path, (0, 0)) for path in m.iterdir()], []),
}


@pytest.mark.parametrize("change", MODEL_CHANGES)
def test_a_model_is_identified_by_what_decides_its_responses(model_folder, tmp_path, change):
    """Guards: a change in the middle of large weights was the same model, and a README another one."""
    before = fingerprint.model_identity(model_folder)
    shutil.copytree(model_folder, tmp_path / "copy")
    make, expected = MODEL_CHANGES[change]
    make(tmp_path / "copy")
    assert fingerprint.other_parts(before, fingerprint.model_identity(tmp_path / "copy")) == expected


def test_an_adapter_is_identified_by_its_base_wherever_that_lies(model_folder, tmp_path):
    """Guards: an adapter whose base had changed was the same model."""
    seen = []
    for place in ("here", "there", "changed"):
        base, folder = tmp_path / place, tmp_path / f"{place}-adapter"
        shutil.copytree(model_folder, base)
        folder.mkdir()
        if place == "changed":
            flip_a_byte(base / "model.safetensors", -1)
        config = {"r": 1, "lora_alpha": 1, "peft_type": "LORA", "target_modules": ["q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
        save_file({"a": torch.zeros(3)}, folder / "adapter_model.safetensors")
        seen.append(fingerprint.model_identity(folder))
    assert fingerprint.other_parts(*seen[:2]) == [] and fingerprint.other_parts(seen[0], seen[2]) == ["adapter's base"]


def test_an_identity_of_an_older_version_is_refused_in_words():
    wanted = {"n": 2, "identity": {"weights": "w", "prompts": "p"}}
    fingerprint.require_same("out", wanted | {"identity": {"weights": "w", "prompts": "p", "more": "m"}}, wanted)
    for held, said in {
        None: "out does not say which model, prompts and problems it was made with",
        "w": "out does not say which model",
        ("w", "other"): r"other inputs \(different: prompts, as the template writes a date or",
        ("v", "other"): r"other inputs \(different: weights and prompts\): use",
    }.items():
        identity = dict(zip(("weights", "prompts"), held, strict=True)) if isinstance(held, tuple) else held
        with pytest.raises(DataError, match=said):
            fingerprint.require_same("out", held and {"n": 2, "identity": identity}, wanted)


def test_prompts_are_identified_in_any_order():
    a, b, c = Prompt("a", [1, 2], 1), Prompt("b", (3,), 4, 2), Prompt("b", [4], 1)
    assert fingerprint.prompts_identity([a, b]) == fingerprint.prompts_identity([replace(b, n=1), a])
    assert fingerprint.prompts_identity([a, b]) != fingerprint.prompts_identity([a, c])


def test_data_is_identified_by_ids_texts_and_order():
    some = [Problem("a/1", "1 + 1", ("2",)), Problem("a/2", "1 + 2", ("3",))]
    others = [some[::-1], some[:1], [replace(some[0], id="b/1"), some[1]], [replace(some[0], text="1 + 1 "), some[1]]]
    assert fingerprint.data_identity(some) == fingerprint.data_identity(list(some))
    assert len({fingerprint.data_identity(rows) for rows in [some, *others, [[{"role": "user"}]]]}) == 6


def test_the_program_is_identified_by_its_files(tmp_path):
    (tmp_path / "a.py").write_text("1")
    first = fingerprint.code_version(tmp_path)
    assert "torch " + torch.__version__ in first
    (tmp_path / "notes.md").write_text("not code")
    assert fingerprint.code_version(tmp_path) == first
    (tmp_path / "a.py").write_text("2")
    assert fingerprint.code_version(tmp_path) != first


def test_a_checkpoint_becomes_a_model_folder(processes, tmp_path, capsys):
    parts = trained(processes, 0)
    models.save(trained(processes, 1)[0], tmp_path / "base")  # other weights
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    folder = save(processes, tmp_path / "run", 5, parts=parts)
    (tmp_path / "run" / "recipe.toml").write_text(
        f'name = "run"\nmodel = "{tmp_path}/base"\nmax_position_embeddings = 64\n'
        '[[stage]]\nkind = "sft"\ndata = "none.jsonl"\nsteps = 1\nbatch_sequences = 1\nmax_tokens = 64\n'
    )
    main(export_arguments([str(folder), str(tmp_path / "out"), "--dtype", "float32"]))
    exported, (wanted, _) = models.load(tmp_path / "out"), parts
    for (name, parameter), (_, trained_one) in zip(exported.named_parameters(), wanted.named_parameters(), strict=True):
        assert torch.equal(parameter, trained_one.full_tensor()), name
    assert exported.config.max_position_embeddings == 64 and (tmp_path / "out" / "tokenizer.json").exists()
    with pytest.raises(models.ModelError, match="a checkpoint of a run, no model: export it first"):
        models.load(folder)
    (folder / "run.pt").write_bytes(b"")
    with pytest.raises(SystemExit, match=r"^model.py: .*step-5 cannot be used \(run.pt has 0 bytes"):
        main(export_arguments([str(folder), str(tmp_path / "again")]))


def test_nothing_draws_from_a_generator_that_checkpoints_do_not_save():
    """torch's global generator is saved; the code never draws from numpy's or Python's."""
    found = {}
    for path in (path for pattern in ("*.py", "engine/*.py", "lab/*.py") for path in ROOT.glob(pattern)):
        text = path.read_text()
        hits = re.findall(r"np\.random\.(?!default_rng|Generator|PCG64)\w+", text)
        if re.search(r"^(import|from) random\b", text, re.MULTILINE):
            hits += re.findall(r"\brandom\.(?!Random\()\w+", text)
        found |= {path.name: hits} if hits else {}
    assert not found


def test_broken_weights_are_one_sentence(processes, tmp_path):
    parts = trained(processes, 0)
    folder = save(processes, tmp_path, 4, parts=parts)
    (folder / ".metadata").unlink()
    with pytest.raises(CheckpointError, match="step-4 cannot be read") as caught:
        load_weights_and_optimizer(folder, *parts, processes)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------- from somebody else


class Calls:
    """An object whose unpickling calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def named(module, name, argument):
    """A pickle that looks up a dotted name (STACK_GLOBAL) and calls it."""
    module, name, argument = (b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, name, argument))
    return b"\x80\x04" + module + name + b"\x93" + argument + b"\x85R."


def payloads(trace):
    """Programs in pickles: each makes the file `trace` when it runs."""
    shell, program = f"touch {trace}", f"open({str(trace)!r}, 'w')"
    objects = {
        "os.system": Calls(os.system, shell),
        "eval": Calls(builtins.eval, program),
        "exec inside a list": [1, {"a": Calls(builtins.exec, program)}],
        "methodcaller": Calls(operator.methodcaller, "unlink"),
        "torch.hub": Calls(torch.hub.load, str(trace.parent), "entry", "local"),
        "torch.load": Calls(partial(torch.load, trace.parent / "inner.pt", weights_only=False)),
        "torch's functions": Calls(torch._utils._rebuild_tensor_v2, None, 0, (), (), False, None),
    }
    found = {name: pickle.dumps(value) for name, value in objects.items()}
    found["getattr"] = b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(Vos\ntRVsystem\ntR(V" + shell.encode() + b"\ntR."
    found["a dotted name"] = named("torch.distributed.checkpoint.metadata", "os.system", shell)
    found["a dotted name of torch"] = named("torch", "os.system", shell)
    found["a module beside a class"] = named("torch.serialization", "os.system", shell)
    return found


def tamper(folder, name, content):
    """Put other content into a checkpoint's file, with the right checksums: an attacker can do this too."""
    (folder / name).write_bytes(content)
    names = [path for path in folder.iterdir() if path.name != checkpoints.MANIFEST]
    checkpoints.write_manifest(folder, checkpoints.file_checksums(names))


@pytest.mark.parametrize("name", payloads(Path("x")))
def test_a_program_in_a_checkpoint_never_runs(processes, tmp_path, name):
    """Guards: DCP unpickles `.metadata`, and values that are no tensors, with all of Python at hand."""
    trace, parts = tmp_path / "ran", trained(processes, 0)
    program = payloads(trace)[name]
    torch.save(Calls(os.system, f"touch {trace}"), tmp_path / "inner.pt")
    (tmp_path / "hubconf.py").write_text(f"open({str(trace)!r}, 'w')\ndef entry(): pass")
    folder = save(processes, tmp_path, 4, parts=parts)
    tamper(folder, ".metadata", program)
    with pytest.raises(CheckpointError, match="step-4 cannot be read .*it names .*, which is no part of") as caught:
        load_weights_and_optimizer(folder, *parts, processes)
    assert "\n" not in str(caught.value)
    tamper(folder, "run.pt", program)
    with pytest.raises(CheckpointError, match="run.pt cannot be read") as caught:
        read_state(tmp_path, processes)
    assert "\n" not in str(caught.value) and not trace.exists()
    if name == "os.system":  # the pickle is a program indeed
        pickle.loads(program)
        assert trace.exists()


def test_a_program_in_a_value_that_is_no_tensor_never_runs(processes, tmp_path):
    """Guards: DCP reads such values, here the optimizer's settings, by torch.load(weights_only=False)."""
    trace, parts = tmp_path / "ran", trained(processes, 0)
    parts[1].param_groups[0]["foreach"] = Calls(os.system, f"touch {trace}")
    folder = save(processes, tmp_path, 4, parts=parts)
    parts[1].param_groups[0]["foreach"] = None
    with pytest.raises(CheckpointError, match="step-4 cannot be read") as caught:
        load_weights_and_optimizer(folder, *parts, processes)
    assert "\n" not in str(caught.value) and not trace.exists()
    torch.distributed.checkpoint.load(checkpoints.trained_parts(*parts), checkpoint_id=folder)
    assert trace.exists()  # DCP alone runs it


@pytest.mark.parametrize("value", [None, 3, "text", {}, {"torch_rng": 5}, {"torch_rng": torch.zeros(3)}])
def test_a_state_of_another_type_is_one_sentence(processes, tmp_path, value):
    folder = save(processes, tmp_path, 4)
    file = io.BytesIO()
    torch.save(value, file)
    tamper(folder, "run.pt", file.getvalue())
    with pytest.raises(CheckpointError, match="run.pt cannot be read") as caught:
        read_state(tmp_path, processes)
    assert "\n" not in str(caught.value)


def test_saving_starts_no_second_openmp_team(processes, tmp_path, monkeypatch):
    """Guards: a writer thread's own OpenMP team made every step after the first checkpoint 3 times slower."""
    seen, save_parts = [], checkpoints.dcp.save

    def watched(*arguments, **options):
        seen.append(torch.get_num_threads())
        return save_parts(*arguments, **options)

    monkeypatch.setattr(checkpoints.dcp, "save", watched)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        save(processes, tmp_path, 1)
        assert seen == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
