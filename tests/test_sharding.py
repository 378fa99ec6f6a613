"""FSDP2 on one rank and on two changes no number: training, sampling, saving, loading."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forked import in_processes
from test_model import difference, gradients, our_logits, scoring_batch
from torch.distributed.device_mesh import init_device_mesh

from engine.sharding import gathered, shard
from model import Packed, Transformer, load, load_weights, read_config, save


@pytest.fixture
def mesh(tmp_path):
    """A device mesh of one gloo process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def check_sharded(folder: Path, out: Path, mesh) -> None:
    """Compare with the unsharded model. Every rank calls it with the same batch."""
    batch = scoring_batch()
    unsharded = load(folder)
    with torch.no_grad():
        logits = our_logits(unsharded, batch[0][:30])
    expected = gradients(unsharded, unsharded(batch[0], Packed(batch[1]), *batch[2:]))

    model = load(folder)
    shard(model, mesh, torch.float32)
    names = dict(unsharded.named_parameters()).keys()
    assert dict(model.named_parameters()).keys() == names
    for _ in range(2):  # train, sample, train again
        ours = gradients(model, model(batch[0], Packed(batch[1]), *batch[2:]))
        for name in names:
            assert difference(ours[name].full_tensor(), expected[name]) < 1e-4 * max(1, expected[name].abs().max())
        with gathered(model):
            for _ in range(1 + 3 * mesh.get_rank()):  # no collective: ranks may decode different numbers of steps
                assert difference(our_logits(model, batch[0][:30]), logits) < 1e-5
            assert not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()

    model(batch[0], Packed(batch[1]), *batch[2:]).sum().backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    with gathered(model):
        after = our_logits(model, batch[0][:30])
    assert difference(after, logits) > 1e-3  # sampling uses the updated weights
    save(model, out)
    dist.barrier()
    assert difference(our_logits(load(out), batch[0][:30]), after) < 1e-5

    with torch.device("meta"):
        empty = Transformer(read_config(out))
    shard(empty, mesh, torch.float32)
    load_weights(empty, out, "cpu")
    with gathered(empty):
        assert difference(our_logits(empty, batch[0][:30]), after) < 1e-5


@pytest.mark.parametrize("family, tied", [("qwen3", True), ("qwen2", False)])
def test_sharded_model_in_one_process_is_the_same_model(checkpoint, tmp_path, mesh, family, tied):
    check_sharded(checkpoint(family, tied), tmp_path / "out", mesh)


def in_two_processes(rank: int, folder: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=rank, world_size=2)
    check_sharded(folder, tmp_path / "out", init_device_mesh("cpu", (2,)))
    dist.destroy_process_group()


def test_sharded_model_in_two_processes_is_the_same_model(checkpoint, tmp_path):
    in_processes(in_two_processes, checkpoint(), tmp_path)


def test_recompute_and_sharding_together_give_the_same_gradients(checkpoint, mesh):
    batch = scoring_batch()
    unsharded = load(checkpoint())
    expected = gradients(unsharded, unsharded(batch[0], Packed(batch[1]), *batch[2:]))
    model = load(checkpoint())
    for layer in model.model.layers:
        layer.recompute = True
    shard(model, mesh, torch.float32)
    ours = gradients(model, model(batch[0], Packed(batch[1]), *batch[2:]))
    for name, gradient in expected.items():
        assert difference(ours[name].full_tensor(), gradient) < 1e-4 * max(1, gradient.abs().max())


def test_weights_are_sharded_again_when_sampling_fails(checkpoint, mesh):
    model = load(checkpoint())
    shard(model, mesh, torch.float32)
    with pytest.raises(KeyError), gathered(model):
        raise KeyError
    assert all(isinstance(parameter, torch.distributed.tensor.DTensor) for parameter in model.parameters())


def test_sharding_in_bfloat16_does_not_round_the_temperature(checkpoint, mesh):
    # FSDP would cast float32 inputs: 1.45 would silently become 1.453
    tokens, lengths, predict, targets, _ = scoring_batch()
    plain = load(checkpoint(), dtype=torch.bfloat16)
    sharded = load(checkpoint())
    shard(sharded, mesh, torch.bfloat16)
    with torch.no_grad():
        wanted = plain(tokens, Packed(lengths), predict, targets, 1.45)
        rounded = plain(tokens, Packed(lengths), predict, targets, 1.453125)
    temperature = torch.full((len(targets),), 1.45)  # a tensor, as in training: FSDP casts no Python numbers
    found = sharded(tokens, Packed(lengths), predict, targets, temperature).detach()
    assert (wanted - rounded).abs().max() > 1e-4
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
