"""Compare the memory estimates of lab/plan_memory.py with the memory the code uses, without a GPU or weights.

    python bench/plan.py              # small models run in float32; layers of the 4B on fake bfloat16 tensors
    python bench/plan.py --full       # also all 36 layers of the 4B at 40,960 tokens (about a minute)

It counts the bytes of every live storage while `grpo.optimizer_step` and `rollout.generate` run. Fake tensors have
shapes and no data, so the full size needs no memory; attention, norms and logits are replaced by functions that
allocate and keep what the CUDA kernels do. The table shows the memory above weights, gradients and moments.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model as model_file  # noqa: E402
import rollout  # noqa: E402
from bench.machine import LiveBytes  # noqa: E402
from engine.adapter import Lora, add_lora  # noqa: E402
from engine.attention import PackedLayout, SharedLayout  # noqa: E402
from engine.batches import TrainingSequence  # noqa: E402
from engine.sharding import gathered, shard  # noqa: E402
from grpo import PolicyLoss, optimizer_step  # noqa: E402
from lab import plan, plan_memory  # noqa: E402
from lab.plan_memory import Sampling, Shape, Update, sampling_moment, update_moments  # noqa: E402
from model import ModelConfig, Transformer, initialise, parse_config  # noqa: E402


class LiveFakeBytes(LiveBytes):
    """LiveBytes for fake tensors, which have no data to read a number from."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        fake = function is torch.ops.aten._local_scalar_dense.default
        if fake and isinstance(args[0], torch._subclasses.FakeTensor):
            return 1.0  # any number will do
        return super().__torch_dispatch__(function, types, args, kwargs)


class FlashShapes(torch.autograd.Function):
    """Allocate and keep what variable-length flash attention does."""

    @staticmethod
    def forward(context, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (T, H, D), k and v (T, K, D) -> (T, H, D)."""
        out = torch.empty_like(q)
        context.save_for_backward(q, k, v, out, torch.empty(q.shape[:2], dtype=torch.float32))
        return out

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Allocate the gradients, a float32 sum for dq, and dk and dv of every query head before they are summed."""
        q, k, v, *_ = context.saved_tensors
        working = [torch.empty_like(q, dtype=torch.float32), torch.empty_like(q), torch.empty_like(q)]
        result = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        del working
        return result


class NormShapes(torch.autograd.Function):
    """Allocate and keep what the fused RMS norm does."""

    @staticmethod
    def forward(context, x: Tensor, weight: Tensor) -> Tensor:
        """x -> normalised x, times the weight."""
        context.save_for_backward(x, weight, torch.empty(*x.shape[:-1], 1))
        return torch.empty_like(x)

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Allocate the gradients of input and weight."""
        x, weight, _ = context.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Use fake tensors, and the CUDA kernels' memory instead of the CPU's."""

    def attention(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
        if not isinstance(layout, SharedLayout):
            return FlashShapes.apply(q, k, v)
        return FlashShapes.apply(*(x.index_select(0, layout.unshare) for x in (q, k, v))).index_select(0, layout.share)

    def norm(x: Tensor, shape: object, weight: Tensor, eps: float) -> Tensor:
        return NormShapes.apply(x, weight)

    def logits(hidden: Tensor, weight: Tensor, float32: bool) -> Tensor:
        return hidden.new_empty(len(hidden), len(weight), dtype=torch.float32)

    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch.object(model_file, "packed_attention", attention),
        mock.patch.object(model_file, "head_logits", logits),
        mock.patch.object(F, "rms_norm", norm),
    ):
        yield


@contextmanager
def processes(ranks: int) -> Iterator[DeviceMesh]:
    """Start a process group: one real process, or the first of several with collectives that do nothing."""
    if ranks == 1:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield init_device_mesh("cpu", (ranks,))
    finally:
        dist.destroy_process_group()


def build(
    config: ModelConfig, mesh: DeviceMesh, dtype: torch.dtype, recompute: bool = True, lora_rank: int = 0
) -> Transformer:
    """Return a model with new weights, set up as in train.py."""
    model = Transformer(config)
    if lora_rank:
        add_lora(model, Lora(lora_rank, 32.0, ""))
    if dtype == torch.float32:
        initialise(model, 0)
    for layer in model.model.layers:
        layer.recompute = recompute
    shard(model, mesh, dtype)
    return model


def update_bytes(config: ModelConfig, update: Update, sequences: int = 1) -> int:
    """Return the peak of an update of two micro-batches per rank, above weights, gradients and moments.

    A micro-batch has `sequences` sequences of equal length. With kernels it runs on fake tensors.
    """
    length = update.tokens // sequences
    prompt = (update.tokens - update.predicted) // sequences
    every = 2 * sequences * update.processes
    batch = [  # distinct prompts: a shared one would be computed once
        TrainingSequence(np.full(length, i, np.int32), prompt, 1.0, np.zeros(length - prompt, np.float32))
        for i in range(every)
    ]
    with processes(update.processes) as mesh, fake_cuda() if update.kernels else nullcontext():
        model = build(config, mesh, update.dtype, update.recompute, update.lora_rank)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-6)
        with LiveFakeBytes():  # allocates the moments
            optimizer_step(model, optimizer, batch[: update.processes], PolicyLoss(), update.tokens)
        counter = LiveFakeBytes()
        for tensor in [*model.parameters(), *(v for state in optimizer.state.values() for v in state.values())]:
            counter.count(tensor)
        trained = [parameter.to_local().nbytes for parameter in model.parameters() if parameter.requires_grad]
        standing = counter.live + sum(trained)  # gradients are as large as their parameters
        with counter:
            optimizer_step(model, optimizer, batch, PolicyLoss(), update.tokens)
    return counter.most - standing


@contextmanager
def besides_weights(model: Transformer, *others: Tensor) -> Iterator[LiveBytes]:
    """Count the memory above gathered weights and these tensors."""
    counter = LiveFakeBytes()
    for tensor in (*model.parameters(), *others):
        counter.count(tensor)
    counter.live = counter.most = 0
    with counter:
        yield counter


def sampling_bytes(config: ModelConfig, sampling: Sampling) -> int:
    """Return the measured peak of sampling above the weights, with every response at its limit.

    As on CUDA: from the weights themselves, without the packed copy of a CPU, and with CUDA's prefills.
    """
    prompts = [
        rollout.Prompt(str(i), [1] * sampling.prompt, sampling.group)
        for i in range(sampling.requests // sampling.group)
    ]
    limits = rollout.CacheLimits(sampling.cache_tokens, sampling.page_tokens, sampling.rows)
    with processes(1) as mesh:
        model = build(config, mesh, sampling.dtype)
        with (
            gathered(model),
            mock.patch.object(rollout, "sampling_forward", lambda model, rows: model),
            mock.patch.object(rollout, "LARGEST_CPU_PREFILL", rollout.LARGEST_PREFILL),
            besides_weights(model) as counter,
        ):
            for _ in rollout.generate(model, prompts, rollout.Sampling(1.0, sampling.response, (), 0), limits):
                pass
    return counter.most


def prefill_bytes(config: ModelConfig, tokens: int) -> int:
    """Return the peak of one prefill on CUDA above weights and cache, from fake tensors."""
    with processes(1) as mesh, fake_cuda():
        model = build(config, mesh, torch.bfloat16)
        with gathered(model):
            cache = rollout.PagedCache(model, 1, tokens, torch.bfloat16)
            with besides_weights(model, cache.keys, cache.values) as counter:
                context = rollout.Prefill(cache, [tokens], [[0]], torch.device("cpu"))
                model.hidden(torch.zeros(tokens, dtype=torch.int64), context)
    return counter.most


def estimated_update(config: ModelConfig, update: Update) -> tuple[str, float]:
    """Return the plan's estimate for `update_bytes`, and the moment of its peak."""
    moments = update_moments(Shape(config), update)
    name = max(moments, key=lambda moment: sum(moments[moment].values()))
    return name, sum(moments[name].values())


SMALL = {
    "model_type": "qwen3", "vocab_size": 1000, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}  # fmt: skip
CPU = {"dtype": torch.float32, "kernels": False}
UPDATES = {  # name: (model, update, sequences of a micro-batch), run in float32
    "4 layers, 1,024 tokens, recomputed": ({}, Update(1024, 960, **CPU), 1),
    "the same, nothing recomputed": ({}, Update(1024, 960, recompute=False, **CPU), 1),
    "2 layers, width 256, 1,024 tokens": (
        {"num_hidden_layers": 2, "hidden_size": 256}, Update(1024, 960, **CPU), 1),
    "8 layers, 512 tokens in 4 sequences": ({"num_hidden_layers": 8}, Update(512, 256, **CPU), 4),
    "biases, untied head (Qwen2), 1,024 tokens": (
        {"model_type": "qwen2", "tie_word_embeddings": False}, Update(1024, 1000, **CPU), 1),
    "Llama, no recomputation": ({"model_type": "llama"}, Update(1024, 1000, recompute=False, **CPU), 1),
    "12,000 words, 512 tokens: the log-probs": (
        {"vocab_size": 12_000, "hidden_size": 64}, Update(512, 448, **CPU), 1),
    "8,000 words, 64 tokens": ({"vocab_size": 8_000}, Update(64, 32, **CPU), 1),
}  # fmt: skip
SAMPLERS = {
    "one page a sequence, 16 rows": ({}, Sampling(64, 32, 32, 8, 16, 256, 100_000, **CPU)),
    "long prompts": ({}, Sampling(1024, 4, 8, 2, 8, 2048, 100_000, **CPU)),
    "12,000 words": ({"vocab_size": 12_000}, Sampling(32, 4, 64, 8, 64, 256, 100_000, **CPU)),
}
LARGE = {  # on fake bfloat16 tensors; a few layers show what each adds
    "4B, 4 layers, 40,960 tokens": ("Qwen/Qwen3-4B", 4, Update(40_960, 39_936)),
    "4B, 4 layers, 40,960 tokens, of 8 processes": ("Qwen/Qwen3-4B", 4, Update(40_960, 39_936, processes=8)),
    "4B, 4 layers, 8,192 tokens, nothing recomputed": ("Qwen/Qwen3-4B", 4, Update(8192, 7168, recompute=False)),
    "0.6B, 28 layers, 17,408 tokens": ("Qwen/Qwen3-0.6B", 28, Update(17_408, 16_384)),
    "0.6B, 4 layers, 2,048 tokens": ("Qwen/Qwen3-0.6B", 4, Update(2048, 1024)),
    "7B, 2 layers, 32,768 tokens": ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", 2, Update(32_768, 31_744)),
    "4B, 4 layers, 40,960 tokens, LoRA of rank 32": ("Qwen/Qwen3-4B", 4, Update(40_960, 39_936, lora_rank=32)),
    "0.6B, 28 layers, 17,408 tokens, LoRA of rank 16": ("Qwen/Qwen3-0.6B", 28, Update(17_408, 16_384, lora_rank=16)),
}
FULL = {"4B, 36 layers, 40,960 tokens": ("Qwen/Qwen3-4B", 36, Update(40_960, 39_936))}


def published(name: str, layers: int) -> ModelConfig:
    """Return a published shape with fewer layers."""
    source = dict(zip(plan.PUBLISHED_KEYS, plan.PUBLISHED[name], strict=True))
    return parse_config(source | {"num_hidden_layers": layers})


def comparisons(full: bool) -> Iterator[tuple[str, str, float, float]]:
    """Yield the name, the moment of the planned peak, and measured and estimated bytes."""
    for name, (overrides, update, sequences) in UPDATES.items():
        config = parse_config(SMALL | overrides)
        moment, estimated = estimated_update(config, update)
        yield f"update: {name}", moment, update_bytes(config, update, sequences), estimated
    for name, (overrides, sampling) in SAMPLERS.items():
        config = parse_config(SMALL | overrides)
        moment = sampling_moment(Shape(config), sampling)
        yield f"sampling: {name}", list(moment)[1], sampling_bytes(config, sampling), sum(moment.values())
    for name, (model_name, layers, update) in (LARGE | (FULL if full else {})).items():
        config = published(model_name, layers)
        moment, estimated = estimated_update(config, update)
        yield f"update, bfloat16: {name}", moment, update_bytes(config, update), estimated
    for tokens in (16_384, 53_248):
        config = published("Qwen/Qwen3-4B", 2)
        yield (
            f"prefill, bfloat16: 4B, {tokens:,} tokens",
            "",
            prefill_bytes(config, tokens),
            plan_memory.prefill_bytes(Shape(config), tokens, torch.bfloat16, kernels=True),
        )


def main() -> None:
    """Measure, estimate, and print both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="also all layers of the 4B")
    rows = []
    print("| what | at its peak in | measured, MiB | plan, MiB | plan / measured |\n|---|---|---|---|---|")
    for name, moment, measured, estimated in comparisons(parser.parse_args().full):
        rows.append({"what": name, "measured": measured, "plan": round(estimated), "ratio": estimated / measured})
        mib = f"{measured / 2**20:,.1f} | {estimated / 2**20:,.1f}"
        print(f"| {name} | {moment} | {mib} | {estimated / measured:.3f} |", flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
