"""checkpoint.py: what is read is what was written, whole or not at all."""

import numpy as np
import pytest
import torch

import checkpoint as checkpoints
import device as devices
import model as models
from checkpoint import CheckpointError, RunState, list_checkpoints, load_weights_and_optimizer, read_state
from data_filter import Visit
from rollout import Rollout

SOURCE = {
    "model_type": "qwen3", "vocab_size": 17, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "max_position_embeddings": 32,
}  # fmt: skip


@pytest.fixture(scope="module")
def here():
    yield devices.start()
    devices.stop()


def trained(here, seed):
    """A sharded model and its optimizer, some steps in."""
    model = models.Transformer(models.parse_config(SOURCE))
    models.initialise(model, seed)
    models.shard(model, here.mesh, here.compute_dtype)
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
    whole = {name: p.detach() for name, p in model.named_parameters()} | moments
    return {name: (t.full_tensor() if hasattr(t, "full_tensor") else t).clone() for name, t in whole.items()}


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


def save(here, folder, step, kept=2, parts=None):
    return checkpoints.save_checkpoint(folder, *(parts or trained(here, 0)), state_of(step), here, kept)


def test_a_run_stands_where_it_stood(here, tmp_path):
    saved = save(here, tmp_path, 7)
    torch.manual_seed(123)  # what the run would have drawn next is part of where it stood
    folder, found = read_state(tmp_path)
    assert folder == saved == tmp_path / "checkpoints" / "step-7"
    expected = state_of(7)
    plain = [name for name in vars(expected) if name not in ("history", "sinks")]
    assert [getattr(found, name) for name in plain] == [getattr(expected, name) for name in plain]
    assert found.history.by_problem == expected.history.by_problem
    assert found.history.pass_rate("a/1") == 0.3
    (rollout, reward), (wanted, _) = found.sinks.held["a/1"], expected.sinks.held["a/1"]
    assert list(found.sinks.held) == ["a/1"] and reward == 1.25
    for name, value in vars(wanted).items():
        if isinstance(value, np.ndarray):
            assert isinstance(getattr(rollout, name), np.ndarray) and getattr(rollout, name).dtype == value.dtype
            np.testing.assert_array_equal(getattr(rollout, name), value)
        else:
            assert getattr(rollout, name) == value and type(getattr(rollout, name)) is type(value)


def test_the_state_of_a_run_that_has_barely_begun(here, tmp_path):
    checkpoints.save_checkpoint(tmp_path, *trained(here, 0), RunState(), here, 1)
    _, found = read_state(tmp_path)
    assert found.step == 0 and found.diversity is None and found.problem_ids == []
    assert not found.history.by_problem and not found.sinks.held


def test_torch_draws_on_where_it_was(here, tmp_path):
    parts = trained(here, 0)
    torch.manual_seed(5)
    save(here, tmp_path, 1, parts=parts)
    expected = torch.rand(4)
    torch.manual_seed(6)
    read_state(tmp_path)
    assert torch.equal(torch.rand(4), expected)


def test_weights_and_optimizer_come_back_exactly(here, tmp_path):
    parts = trained(here, 0)
    expected, rate = tensors(*parts), parts[1].param_groups[0]["lr"]
    folder = save(here, tmp_path, 3, parts=parts)
    model, optimizer = trained(here, 1)
    assert any(not torch.equal(t, expected[name]) for name, t in tensors(model, optimizer).items())
    load_weights_and_optimizer(folder, model, optimizer, here)
    found = tensors(model, optimizer)
    assert found.keys() == expected.keys() and len(found) > 20
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert optimizer.param_groups[0]["lr"] == rate


def test_the_last_few_are_kept_in_the_order_of_steps(here, tmp_path):
    parts = trained(here, 0)
    for step in (8, 9, 10, 100):
        save(here, tmp_path, step, kept=3, parts=parts)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-9", "step-10", "step-100"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-10", "step-100", "step-9"]
    assert read_state(tmp_path)[1].step == 100


def test_the_same_step_may_be_saved_again(here, tmp_path):
    parts = trained(here, 0)
    save(here, tmp_path, 4, parts=parts)
    (tmp_path / "checkpoints/step-4/left-over").touch()
    save(here, tmp_path, 4, parts=parts)
    assert not (tmp_path / "checkpoints/step-4/left-over").exists() and read_state(tmp_path)[1].step == 4


def test_an_unfinished_checkpoint_is_never_seen(here, tmp_path, monkeypatch):
    parts = trained(here, 0)
    save(here, tmp_path, 4, parts=parts)

    def fail(*_, **__):
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(checkpoints, "_pack", fail)
        save(here, tmp_path, 6, parts=parts)
    assert (tmp_path / "checkpoints/step-6.unfinished").is_dir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-4"] and read_state(tmp_path)[1].step == 4
    save(here, tmp_path, 6, parts=parts)  # what was left over is in nobody's way
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-6*")] == ["step-6"]


def test_no_checkpoint_is_none(tmp_path):
    assert list_checkpoints(tmp_path) == [] and read_state(tmp_path) is None


BROKEN = {
    "cut off": lambda whole: whole[:100],
    "empty": lambda whole: b"",
    "text": lambda whole: b"not a checkpoint\n" * 20,
    "pickle of code": lambda whole: b"cos\nsystem\n(S'true'\ntR.",
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_state_is_one_sentence(here, tmp_path, how):
    """Guards: a file that is no archive raised pickle's own error."""
    path = save(here, tmp_path, 4) / "run.pt"
    path.write_bytes(BROKEN[how](path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"step-4: run.pt cannot be read \(.*\): remove the folder to") as caught:
        read_state(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"unheard_of": 1}, {"history": {}}, {"sinks": {"p": {"reward": 1.0}}}])
def test_a_state_of_another_version_is_one_sentence(here, tmp_path, change):
    path = save(here, tmp_path, 4) / "run.pt"
    torch.save(torch.load(path) | change, path)
    with pytest.raises(CheckpointError, match="run.pt cannot be read"):
        read_state(tmp_path)


def test_a_missing_state_is_one_sentence(here, tmp_path):
    (save(here, tmp_path, 4) / "run.pt").unlink()
    with pytest.raises(CheckpointError, match="run.pt cannot be read"):
        read_state(tmp_path)


def test_broken_weights_are_one_sentence(here, tmp_path):
    parts = trained(here, 0)
    folder = save(here, tmp_path, 4, parts=parts)
    (folder / ".metadata").unlink()
    with pytest.raises(CheckpointError, match="step-4 cannot be read") as caught:
        load_weights_and_optimizer(folder, *parts, here)
    assert "\n" not in str(caught.value)


def test_saving_starts_no_second_team_of_threads(here, tmp_path, monkeypatch):
    # guards a slowdown: a writer thread's own OpenMP team made every step after the first checkpoint 3 times slower
    seen, save_parts = [], checkpoints.dcp.save

    def watched(*arguments, **options):
        seen.append(torch.get_num_threads())
        return save_parts(*arguments, **options)

    monkeypatch.setattr(checkpoints.dcp, "save", watched)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        save(here, tmp_path, 1)
        assert seen == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
