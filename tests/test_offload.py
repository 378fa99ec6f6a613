"""Moments and layer inputs in host memory change nothing."""

import weakref

import pytest
import torch
import torch.distributed as dist
from forked import in_processes
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import model as models
from engine import distributed, sharding
from engine import offload as offloading
from engine.checkpoint import RunState, load_weights_and_optimizer, save_checkpoint
from engine.offload import HostAdamW

SOURCE = {
    "model_type": "qwen3", "vocab_size": 23, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 6, "max_position_embeddings": 64,
}  # fmt: skip
SETTINGS = {"lr": 0.02, "betas": (0.9, 0.95), "weight_decay": 0.1}


@pytest.fixture(scope="module")
def processes():
    with pytest.MonkeyPatch.context() as patch:  # float32 on a CPU, also on a machine with a GPU
        patch.setattr(torch.cuda, "is_available", lambda: False)
        started = distributed.start()
    yield started
    distributed.stop()


def tiny(mesh=None, seed=0):
    """Build a model of three layers with weights so large that no gradient is near zero."""
    model = models.Transformer(models.parse_config(SOURCE))
    models.initialise(model, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.2)
    if mesh is not None:
        sharding.shard(model, mesh, torch.float32)
    return model


def learn(model, optimizer, steps, first=0):
    tokens = torch.arange(19) % 23
    for step in range(first, first + steps):
        for group in optimizer.param_groups:  # as in train.py
            group["lr"] = 0.02 / (step + 1)
        logprobs = model(tokens, models.Packed([12, 7]), torch.arange(11), tokens[1:12])
        (-logprobs).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def everything(model, optimizer):
    """Return weights and moments, in the order of parameters."""
    moments = [value for parameter in model.parameters() for value in optimizer.state[parameter].values()]
    return [whole(tensor) for tensor in [*model.parameters(), *moments]]


# ------------------------------------------------------------------------------------- moments in host memory


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("bucket", [2**26, 7])
def test_host_adamw_steps_as_torchs_adamw(processes, monkeypatch, sharded, bucket):
    monkeypatch.setattr(offloading, "BUCKET_VALUES", bucket)
    found = []
    for kind in (torch.optim.AdamW, HostAdamW):
        model = tiny(processes.mesh if sharded else None)
        optimizer = kind(model.parameters(), **SETTINGS)
        learn(model, optimizer, 5)
        found.append(everything(model, optimizer))
    assert len(found[0]) == len(found[1]) > 100
    for expected, mine in zip(*found, strict=True):
        if bucket == 2**26:
            assert torch.equal(expected, mine)
        else:  # the last values of a bucket are not vectorised, and round differently
            torch.testing.assert_close(expected, mine, rtol=1e-6, atol=1e-7)


KINDS = {"torch": torch.optim.AdamW, "host": HostAdamW}


@pytest.mark.parametrize("before", KINDS)
@pytest.mark.parametrize("after", KINDS)
def test_a_run_resumes_bit_for_bit_with_either_optimizer(processes, tmp_path, before, after):
    model = tiny(processes.mesh)
    optimizer = KINDS[before](model.parameters(), **SETTINGS)
    learn(model, optimizer, 3)
    folder = save_checkpoint(tmp_path, model, optimizer, RunState(step=3), processes, 1)
    learn(model, optimizer, 2, first=3)
    resumed = tiny(processes.mesh, seed=1)
    other = KINDS[after](resumed.parameters(), **SETTINGS)
    load_weights_and_optimizer(folder, resumed, other, processes)
    learn(resumed, other, 2, first=3)
    found, expected = everything(resumed, other), everything(model, optimizer)
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))


def test_a_state_dict_is_loaded_as_a_copy():
    model = tiny()
    optimizer = HostAdamW(model.parameters(), **SETTINGS)
    learn(model, optimizer, 2)
    copy = tiny()
    other = HostAdamW(copy.parameters(), **SETTINGS)
    other.load_state_dict(optimizer.state_dict())
    learn(model, optimizer, 1)  # the loaded state must be a copy
    copy.load_state_dict(tiny().state_dict())
    moments = [s["exp_avg"] for s in other.state.values()]
    assert len(moments) == len(list(copy.parameters()))
    assert not any(torch.equal(a, b["exp_avg"]) for a, b in zip(moments, optimizer.state.values(), strict=True))


def in_two_processes(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    processes = distributed.Processes(
        torch.device("cpu"), torch.float32, rank, 2, init_device_mesh("cpu", (2,)), dist.group.WORLD
    )
    results = []
    for kind in KINDS.values():
        model = tiny(processes.mesh)
        optimizer = kind(model.parameters(), **SETTINGS)
        learn(model, optimizer, 3)
        results.append(everything(model, optimizer))
    assert all(map(torch.equal, *results))
    save_checkpoint(folder, model, optimizer, RunState(step=3), processes, 1)
    if rank == 0:
        torch.save(results[0], folder / "expected.pt")
    dist.destroy_process_group()


def test_two_processes_save_their_moments_in_one_checkpoint(processes, tmp_path):
    # the head size 6 and the vocabulary 23 do not divide by two: shards of unequal size
    in_processes(in_two_processes, tmp_path)
    model = tiny(processes.mesh, seed=1)
    optimizer = HostAdamW(model.parameters(), **SETTINGS)
    load_weights_and_optimizer(tmp_path / "checkpoints/step-3", model, optimizer, processes)
    expected = torch.load(tmp_path / "expected.pt")
    assert all(map(torch.equal, everything(model, optimizer), expected))


class Copies(TorchDispatchMode):
    """Track copies from the CPU to the meta device, which computes nothing, and count copies back."""

    def __init__(self):
        super().__init__()
        self.copies, self.most, self.returned = [], 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.copy_.default and args[1].is_meta and not args[0].is_meta:
            self.returned += args[1].numel()
            return args[0]
        result = function(*args, **kwargs or {})
        if function is torch.ops.aten._to_copy.default:
            assert args[0].device.type == "cpu" and result.is_meta
            self.copies.append(weakref.ref(result))
            alive = [reference() for reference in self.copies]
            self.most = max(self.most, sum(tensor.numel() for tensor in alive if tensor is not None))
        return result


def test_moments_are_on_the_cpu_and_few_at_a_time_on_the_device(monkeypatch):
    monkeypatch.setattr(offloading, "BUCKET_VALUES", 50)
    weights = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in [(20, 13), (7,), (101,)]]
    optimizer = HostAdamW(weights, **SETTINGS)
    for weight in weights:
        weight.grad = torch.empty_like(weight)
    with Copies() as copies:
        optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in offloading.MOMENTS]
    assert len(moments) == 6 and all(moment.device.type == "cpu" for moment in moments)
    assert copies.returned == sum(moment.numel() for moment in moments) == 2 * 368
    assert copies.most <= 2 * 2 * 50


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_moments_are_pinned_and_take_no_device_memory():
    weights = [torch.nn.Parameter(torch.randn(4096, 4096, device="cuda")) for _ in range(4)]
    plain, host = torch.optim.AdamW(weights, foreach=False), HostAdamW(weights)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    start, held = [weight.detach().clone() for weight in weights], torch.cuda.memory_allocated()
    host.step()
    assert torch.cuda.memory_allocated() == held
    assert all(state["exp_avg"].is_pinned() for state in host.state.values())
    found = [weight.detach().clone() for weight in weights]
    for weight, first in zip(weights, start, strict=True):
        weight.data.copy_(first)
    plain.step()
    for weight, mine in zip(weights, found, strict=True):
        torch.testing.assert_close(mine, weight.detach(), rtol=1e-6, atol=1e-7)


# -------------------------------------------------------------------------------- layer inputs in host memory


def device_types():
    return ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def prepared(model, recompute, offload):
    shared = offloading.Offload(torch.cuda.Stream() if model.device.type == "cuda" else None)
    for layer in model.model.layers:
        layer.recompute, layer.offload = recompute, shared if offload else None
    return model


def gradients(model, lengths=(9, 1, 5), backwards=1):
    total = sum(lengths)
    tokens = (torch.arange(total) * 7 % 23).to(model.device)
    predict = torch.arange(total - 1, device=model.device)
    logprobs = model(tokens, models.Packed(lengths, model.device), predict, tokens[1:])
    for left in reversed(range(backwards)):
        logprobs.sum().backward(retain_graph=bool(left))
    return [whole(parameter.grad) for parameter in model.parameters()]


@pytest.mark.parametrize("device", device_types())
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("backwards", [1, 2])
def test_offloaded_inputs_give_the_same_gradients(device, frozen, backwards):
    found = []
    for recompute, offload in [(False, False), (True, False), (True, True)]:
        model = prepared(tiny().to(device), recompute, offload)
        if frozen:  # as with LoRA, where the first layer's input needs no gradient
            model.model.embed_tokens.weight.requires_grad_(False)
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
            found.append(gradients_of_trainable(model, backwards))
        else:
            found.append(gradients(model, backwards=backwards))
    assert len(found[0]) >= 35
    for plain, kept, offloaded in zip(*found, strict=True):
        assert torch.equal(kept, offloaded)
        torch.testing.assert_close(plain, offloaded, rtol=1e-6, atol=1e-6)


def gradients_of_trainable(model, backwards):
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return gradients(model, backwards=backwards)


@pytest.mark.parametrize("device", device_types())
def test_two_forwards_before_their_backward_keep_both_inputs(device):
    """A layer's buffer is taken only once backward has read it."""
    found = []
    for offload in (False, True):
        model = prepared(tiny().to(device), True, offload)
        rows = [(torch.arange(9, device=device) * n % 23) for n in (5, 7)]
        context, predict = models.Packed([9], device), torch.arange(8, device=device)
        sums = [model(tokens, context, predict, tokens[1:]).sum() for tokens in rows]
        for total in sums:
            total.backward()
        found.append([parameter.grad for parameter in model.parameters()])
    assert all(map(torch.equal, *found))


def test_offloaded_inputs_of_a_sharded_model(processes):
    expected, found = (gradients(prepared(tiny(processes.mesh), True, offload)) for offload in (False, True))
    assert all(map(torch.equal, expected, found))


def test_no_layer_input_stays_on_the_device(monkeypatch):
    moved, keep = [], offloading.Offload.keep
    kept = lambda self, x, layer: moved.append(x.shape) or keep(self, x, layer)  # noqa: E731
    monkeypatch.setattr(offloading.Offload, "keep", kept)
    alive = {}
    for offload in (False, True):
        model, seen = prepared(tiny(), True, offload), []
        for layer in model.model.layers:
            layer.register_forward_pre_hook(
                lambda module, inputs, seen=seen: seen.append(StorageWeakRef(inputs[0].untyped_storage()))
            )
        tokens = torch.arange(15)
        logprobs = model(tokens, models.Packed([15]), tokens, tokens)
        alive[offload] = [not reference.expired() for reference in seen]
        logprobs.sum().backward()
        assert all(reference.expired() for reference in seen)
    assert alive == {False: [True] * 3, True: [False] * 3}
    assert moved == [(15, 16)] * 3  # nothing else is moved


def forward(model, tokens):
    tokens = torch.arange(tokens) % 23
    return model(tokens, models.Packed([len(tokens)]), torch.arange(len(tokens)), tokens).sum()


def test_a_layers_buffer_is_used_again_and_has_the_size_of_the_largest_micro_batch():
    model, found = prepared(tiny(), True, True), []
    buffers = model.model.layers[0].offload.buffers
    for tokens in (9, 15, 4, 15):
        loss = forward(model, tokens)  # alive during the next forward, as in grpo.py
        loss.backward()
        found.append([(buffer.data_ptr(), buffer.numel()) for buffer in buffers.values()])
    assert found[1] == found[2] == found[3] and [len({*each}) for each in found] == [3] * 4
    assert [size for _, size in found[0] + found[1]] == [9 * 16 * 4] * 3 + [15 * 16 * 4] * 3  # tokens x width x float32


def test_a_forward_before_the_last_ones_backward_leaves_its_inputs_alone():
    model = prepared(tiny(), True, True)
    one, two = [forward(model, tokens) for tokens in (15, 9)]
    one.backward()
    two.backward()
    found = [whole(parameter.grad) for parameter in model.parameters()]
    model.zero_grad()
    for tokens in (15, 9):
        forward(model, tokens).backward()
    for mine, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad)


class Runtime:
    """CUDA's runtime, with the ranges of host memory that are pinned."""

    def __init__(self):
        self.pinned = {}

    def cudaHostRegister(self, address, size, flags):
        self.pinned[address] = size
        return 0

    def cudaHostUnregister(self, address):
        del self.pinned[address]


def test_host_memory_is_pinned_in_whole_pages_of_its_own_and_released(monkeypatch):
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    sizes = [(3, 5), (1025,), (4096, 33), (0, 7)]
    tensors = [offloading.host_zeros(size, torch.float32, pinned=True) for size in sizes]
    assert [tuple(tensor.shape) for tensor in tensors] == sizes and not any(tensor.any() for tensor in tensors)
    pages = [(tensor.data_ptr(), -(-tensor.nbytes // 4096) * 4096) for tensor in tensors[:3]]
    assert [*runtime.pinned.items()] == pages and all(address % 4096 == 0 for address, _ in pages)
    view = tensors[2].view(-1)[10:]
    del tensors[1:]
    assert [*runtime.pinned] == [tensors[0].data_ptr(), view.data_ptr() - 40]  # a view keeps its memory
    del tensors, view
    assert not runtime.pinned


def test_memory_that_cannot_be_pinned_is_one_sentence(monkeypatch):
    runtime = Runtime()
    runtime.cudaHostRegister = lambda *_: 2
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    with pytest.raises(MemoryError, match="CUDA cannot pin 8,192 bytes of host memory"):
        offloading.host_zeros([1025], torch.float32, pinned=True)
