"""The checks of bench/gpu_check.py, each run in a process of its own; its docstring says how.

Oracles are float64 on the same inputs. `--small` runs them on a CPU in float32: what needs CUDA is "not available".
"""

import copy
import faulthandler
import functools
import gc
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import model as models
import rollout
from bench.machine import measure_machine, seconds_of
from bench.sampler import Case, run_continuous, run_generate, run_ours
from bench.update import SHAPES, in_own_process
from engine import attention, decode, distributed
from engine.attention import PackedLayout, packed_attention
from engine.batches import TrainingSequence, pack
from engine.memory import out_of_memory
from grpo import PolicyLoss, optimizer_step
from model import Transformer, initialise, parse_config, save
from rollout import CacheLimits, Prompt, Rollout, SamplerStats, Sampling, cache_bytes_per_token, generate

GIB = 2**30
CARD_BYTES = 23.6 * GIB  # what a 24 GiB card offers
CUDA = torch.cuda.is_available()
DEVICE, DTYPE = (torch.device("cuda", 0), torch.bfloat16) if CUDA else (torch.device("cpu"), torch.float32)
TINY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
HEADS = ((4, 4), (8, 2), (16, 8))  # query and key heads
KERNELS = {  # functions that compute attention or record graphs, and the path that a call shows
    "flash_attn_varlen_func": "flash-attn", "varlen_attn": "varlen", "scaled_dot_product_attention": "SDPA",
    "paged_attention": "Triton paged kernel", "capture_graph": "CUDA graphs",
}  # fmt: skip


class Report:
    """Append a check's figures to results.jsonl as they are found."""

    def __init__(self, check: str, results: Path):
        self.check, self.results, self.failures = check, results, []
        card = torch.cuda.get_device_name() if CUDA else "CPU"
        self.machine = {"card": card, "torch": torch.__version__}

    def __call__(
        self, what: str, value: float | None, unit: str = "", target: str = "", path: str = "", note: str = ""
    ) -> None:
        """Write one figure; `target` is like "< 0.005"; a note explains a value of None, or says more."""
        value = None if value is None else float(value)
        if value is not None and not math.isfinite(value):
            value, note = None, f"failed: {value}"
            self.failures.append(f"{what}: {note}")
        row = {"check": self.check, "what": what, "value": value, "unit": unit, "target": target, "path": path}
        with self.results.open("a") as file:
            file.write(json.dumps(row | {"note": note} | self.machine) + "\n")
        print(what, value, unit, note, flush=True)

    def missing(self, what: str, why: str) -> None:
        """Record a figure that is not available here."""
        self(what, None, note=f"not available: {why}")

    @contextmanager
    def part(self, what: str) -> Iterator[None]:
        """Turn an error inside into a line, so that the rest of the check still runs."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            reason = "out of memory" if out_of_memory(error) else (str(error).strip() or repr(error)).splitlines()[0]
            self.failures.append(f"{what}: {type(error).__name__}: {reason[:200]}")
            self(what, None, note=f"failed: {reason[:200]}")
        free_memory()


def run_check(name: str, small: bool, results: Path) -> None:
    """Wait for a line with the time limit, then run one check of this name; exit 1 if any part of it failed."""
    line = sys.stdin.readline()
    if not line:
        return  # the runner has ended or skips this check
    faulthandler.dump_traceback_later(max(1.0, float(line) - 2), exit=False)  # where it hung
    if not CUDA and not small:
        sys.exit("no CUDA device found: --small tries the script on a CPU")
    # as engine.distributed.start sets it for training, before CUDA initializes
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    report = Report(name, results)
    try:
        globals()["check_" + name.replace("-", "_")](report, small)
    except Exception as error:
        traceback.print_exc()
        report.failures.append(f"{type(error).__name__}: {error}")
    if report.failures:
        print("; ".join(report.failures)[:300].replace("\n", " "), file=sys.stderr)
    sys.stdout.flush()
    os._exit(bool(report.failures))  # threads that a failed part left behind must not keep the process alive


# ------------------------------------------------------------------------------------------------------ helpers


def free_memory() -> None:
    """Release what no longer has a reference, also to the driver."""
    gc.collect()
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def random_model(shape: str, small: bool, **changes: object) -> Transformer:
    """Draw a model on the device, in the compute dtype."""
    with DEVICE:
        model = Transformer(parse_config(SHAPES[shape] | (TINY if small else {}) | changes))
    initialise(model, 0)
    return model.to(DTYPE).requires_grad_(False)


@contextmanager
def paths() -> Iterator[Counter]:
    """Count the calls of the functions in KERNELS by name, wherever they were imported."""
    calls, undo = Counter(), []

    def counted(name: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*arguments, **options):
            calls[name] += 1
            return function(*arguments, **options)

        return call

    modules = [m for n, m in list(sys.modules.items()) if n == "rollout" or n.startswith("engine.")]
    for module in [*modules, F]:
        for name, path in KERNELS.items():
            function = vars(module).get(name)
            if callable(function):
                undo.append((module, name, function))
                setattr(module, name, counted(path, function))
    attend = rollout.Decode.attend

    def attend_counted(*arguments, **options):
        before = calls.total()
        found = attend(*arguments, **options)
        calls["gathered pages"] += calls.total() == before  # in plain PyTorch, by none of the kernels
        return found

    rollout.Decode.attend = attend_counted
    try:
        yield calls
    finally:
        rollout.Decode.attend = attend
        for module, name, function in undo:
            setattr(module, name, function)


def named(calls: Counter) -> str:
    """Return the path that was taken, in words."""
    return " + ".join(path for path in [*KERNELS.values(), "gathered pages"] if calls[path]) or "none"


@contextmanager
def replaced(module: object, **values: object) -> Iterator[None]:
    """Replace those of a module's names that it has."""
    old = {name: getattr(module, name) for name in values if hasattr(module, name)}
    for name in old:
        setattr(module, name, values[name])
    try:
        yield
    finally:
        for name, value in old.items():
            setattr(module, name, value)


def relative(found: Tensor, exact: Tensor) -> float:
    """Return |found - exact| / |exact|, in float64."""
    return float((found.double() - exact).norm() / exact.norm())


def event_seconds(work: Callable[[], object], times: int) -> float:
    """Return the mean seconds of a call, by CUDA events, or by the clock on a CPU."""
    if not CUDA:
        return seconds_of(lambda: [work() for _ in range(times)]) / times
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record()
    for _ in range(times):
        work()
    ended.record()
    ended.synchronize()
    return begun.elapsed_time(ended) / 1000 / times


def copy_bandwidth() -> float:
    """Return bytes read and written a second by a copy of a large array on the device."""
    source = torch.ones(1 << (30 if CUDA else 26), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / min(event_seconds(lambda: target.copy_(source), 5) for _ in range(3))


def sample(
    model: Transformer, sampling: Sampling, prompts: list[Prompt], limits: CacheLimits
) -> tuple[list[Rollout], SamplerStats]:
    """Sample all rollouts and put them in order."""
    stats = SamplerStats()
    with torch.no_grad():
        found = list(generate(model, prompts, sampling, limits, stats))
    return sorted(found, key=lambda r: (int(r.problem_id), r.index)), stats


def make_prompts(count: int, group: int, vocabulary: int, limits: Sequence[int] | None = None) -> list[Prompt]:
    """Make prompts of 20 tokens and more."""
    draw = np.random.default_rng(0)
    return [
        Prompt(str(i), draw.integers(0, vocabulary, 20 + 40 * (i % 8)).tolist(), group, limits=limits)
        for i in range(count)
    ]


def equal_share(one: list[Rollout], other: list[Rollout]) -> float:
    """Return the share of positions with equal tokens."""
    return float(np.mean([np.mean(a.tokens == b.tokens) for a, b in zip(one, other, strict=True)]))


def common_difference(one: list[Rollout], other: list[Rollout]) -> float:
    """Return the mean log-prob difference of tokens up to each pair's first different one."""
    parts = []
    for a, b in zip(one, other, strict=True):
        same = int(np.cumprod(a.tokens == b.tokens).sum())
        parts.append(np.abs(a.logprobs[:same] - b.logprobs[:same]))
    return float(np.concatenate(parts).mean())


def sequences_of(rollouts: list[Rollout]) -> list[TrainingSequence]:
    """Return rollouts as the update sees them, with alternating advantages."""
    return [
        TrainingSequence(np.concatenate([r.prompt, r.tokens]), len(r.prompt), (-1.0) ** i, r.logprobs, r.temperature)
        for i, r in enumerate(rollouts)
    ]


# ------------------------------------------------------------------------------------------------------- checks


def check_machine(report: Report, small: bool) -> None:
    """Measure the ceilings that other figures are shares of; make a group of one process."""
    with report.part("ceilings"):
        report("copy bandwidth, read + written", copy_bandwidth() / 1e9, "GB/s")
        read, rate = measure_machine(DEVICE, DTYPE, 3)
        report("reading bandwidth (sum)", read / 1e9, "GB/s")
        report(f"matrix rate, {str(DTYPE)[6:]} {8192 if CUDA else 2048}^3", rate / 1e12, "TFLOP/s")
    if CUDA:
        with report.part("host copies"):
            host = torch.ones(1 << 28, dtype=torch.uint8, pin_memory=True)
            there = host.to(DEVICE)
            up = event_seconds(lambda: there.copy_(host, non_blocking=True), 4)
            down = event_seconds(lambda: host.copy_(there, non_blocking=True), 4)
            report("pinned host to device", host.nbytes / up / 1e9, "GB/s")
            report("device to pinned host", host.nbytes / down / 1e9, "GB/s")
            report("compute capability", float(".".join(map(str, torch.cuda.get_device_capability()))))
            report("memory of the card", torch.cuda.mem_get_info()[1] / GIB, "GiB")
    with report.part("process group of one"):
        import torch.distributed as dist

        from engine.sharding import shard

        begun = time.perf_counter()
        processes = distributed.start()
        value = torch.full((1000,), 3.0, device=DEVICE)
        dist.all_reduce(value)
        dist.broadcast(value, src=0)
        assert processes.broadcast("x") == "x" and bool((value == 3).all())
        model = Transformer(parse_config(SHAPES["qwen3-0.6b"] | TINY))
        initialise(model, 0)
        model.to(DEVICE)
        shard(model, processes.mesh, processes.compute_dtype)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        with paths() as calls:
            tokens = np.arange(100, dtype=np.int32)
            sequence = TrainingSequence(tokens, 20, 1.0, np.full(80, -6.2, np.float32))
            stats = optimizer_step(model, optimizer, [sequence] * 4, PolicyLoss(), 1000)
        assert stats.stepped, stats
        backend = "nccl" if CUDA else "gloo"
        report(f"{backend}, FSDP and a step", time.perf_counter() - begun, "s", path=f"{backend}, {named(calls)}")
        distributed.stop()


def check_attention(report: Report, small: bool) -> None:
    """Compare packed attention and log-probs, forward and backward, with float64."""
    lengths = [1, 7, 256, 257] + [1000] * (not small)
    tried = {}
    for only in ("flash_attn_varlen_func", "varlen_attn", None):
        off = dict.fromkeys({"flash_attn_varlen_func", "varlen_attn"} - {only})
        label = only or "SDPA"
        if only and (not CUDA or not getattr(attention, only, None)):
            report.missing(f"{label} against float64", "not installed, or not with this torch" if CUDA else "no CUDA")
            continue
        with report.part(f"{label} against float64"), replaced(attention, **off), paths() as calls:
            worst, worst_gradient = 0.0, 0.0
            for heads, key_heads in HEADS:
                for size in (32, 64, 128):
                    torch.manual_seed(size)
                    shapes = [(sum(lengths), n, size) for n in (heads, key_heads, key_heads)]
                    leaves = [torch.randn(s, device=DEVICE, dtype=DTYPE, requires_grad=True) for s in shapes]
                    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
                    found = packed_attention(*leaves, PackedLayout(lengths, DEVICE))
                    wanted = exact_attention(*exact, lengths)
                    slope = torch.randn_like(found)
                    gradients = torch.autograd.grad(found, leaves, slope)
                    wanted_gradients = torch.autograd.grad(wanted, exact, slope.double())
                    worst = max(worst, relative(found, wanted))
                    worst_gradient = max([worst_gradient, *map(relative, gradients, wanted_gradients)])
            path = named(calls)
            if path in tried:
                report.missing(f"{label} against float64", f"the path that ran is that of {tried[path]}: {path}")
                continue
            tried[path] = label
            report(f"{label}: relative error of the output", worst, "", "< 0.01", path)
            report(f"{label}: relative error of the gradients", worst_gradient, "", "< 0.02", path)
    if CUDA:
        with report.part("cuDNN beside the path in use, 16,384 tokens"):
            q, k, v = (torch.randn(16_384, n, 128, device=DEVICE, dtype=DTYPE) for n in (32, 8, 8))
            layout = PackedLayout([16_384], DEVICE)
            rows = [x[None].transpose(1, 2) for x in (q, k, v)]
            used = event_seconds(lambda: packed_attention(q, k, v, layout), 3)
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                attend = functools.partial(F.scaled_dot_product_attention, *rows, is_causal=True, enable_gqa=True)
                attend()
                report("cuDNN's time over that of the path in use, 16,384 tokens", event_seconds(attend, 3) / used)
    positions, vocabulary, width = (40, 512, 64) if small else (1500, 151_936, 1024)
    torch.manual_seed(0)
    states = torch.randn(positions, width, device=DEVICE).to(DTYPE)
    head = (4 / width**0.5 * torch.randn(vocabulary, width, device=DEVICE)).to(DTYPE)
    targets = torch.randint(vocabulary, (positions,), device=DEVICE)
    temperature = torch.linspace(0.8, 1.5, positions, device=DEVICE)
    with report.part("log-probs against float64"):
        exact = [x.double().requires_grad_() for x in (states, head)]
        logprobs = F.linear(*exact).div_(temperature.double()[:, None]).log_softmax(1).gather(1, targets[:, None])
        slope = torch.randn(positions, device=DEVICE)
        wanted = torch.autograd.grad(logprobs.squeeze(1), exact, slope.double())
        logprobs = logprobs.detach().squeeze(1)
        for float32 in (True, False):
            for trained in (True, False):
                leaves = [states.clone().requires_grad_(), head.clone().requires_grad_(trained)]
                found = models.TokenLogprobs.apply(*leaves, targets, temperature, float32)
                gradients = torch.autograd.grad(found, leaves[: 1 + trained], slope)
                name = f"{'float32' if float32 else 'rounded'} {'trained' if trained else 'frozen'} head"
                error = (found.detach().double() - logprobs).abs()
                report(f"{name}: mean log-prob error", error.mean(), "", "< 0.0001" if float32 else "",
                       note=f"largest {float(error.max()):.2g}")  # fmt: skip
                worst = max(map(relative, gradients, wanted))
                report(f"{name}: relative error of gradients", worst, "", "< 0.01" if float32 else "")


def exact_attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Compute causal attention of packed sequences, one by one and in plain arithmetic."""
    outputs, group = [], q.shape[1] // k.shape[1]
    for parts in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        own, keys, values = (x.transpose(0, 1) for x in parts)  # (H or K, n, D)
        keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
        scores = own @ keys.transpose(1, 2) * q.shape[-1] ** -0.5  # (H, n, n)
        unseen = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
        outputs.append((scores.masked_fill(unseen, -math.inf).softmax(-1) @ values).transpose(0, 1))
    return torch.cat(outputs)


def paged_case(lengths: list[int], heads: int, key_heads: int, size: int, page: int) -> tuple[Tensor, ...]:
    """Return queries, keys, values, table and lengths on shuffled pages whose unused cells hold 1e4."""
    width = -(-max(lengths) // page)
    total = sum(-(-n // page) for n in lengths) + 3
    order, table, start = torch.randperm(total), torch.zeros(len(lengths), width, dtype=torch.int32), 0
    keys, values = (torch.full((total, page, key_heads, size), 1e4, device=DEVICE, dtype=DTYPE) for _ in range(2))
    for row, n in enumerate(lengths):
        count = -(-n // page)
        pages, start = order[start : start + count], start + count
        table[row, :count] = pages.int()
        cells = pages[torch.arange(n) // page].to(DEVICE), (torch.arange(n) % page).to(DEVICE)
        for store in (keys, values):
            store[cells] = torch.randn(n, key_heads, size, device=DEVICE).to(DTYPE)
    q = torch.randn(len(lengths), heads, size, device=DEVICE).to(DTYPE)
    return q, keys, values, table.to(DEVICE), torch.tensor(lengths, dtype=torch.int32, device=DEVICE)


def check_decode_kernel(report: Report, small: bool) -> None:
    """Compare the paged kernel with float64, and its bandwidth with a copy's."""
    from engine.paged_attention import has_paged_attention, paged_attention

    if not has_paged_attention(DEVICE, DTYPE):
        return report.missing("paged kernel", "it needs CUDA and Triton")
    lengths, worst, path = [1, 7, 256, 257, 1000, 40_000], 0.0, "Triton paged kernel"
    for page in (16, 256):
        with report.part(f"pages of {page}: relative error"):
            for heads, key_heads in HEADS:
                for size in (32, 64, 128):
                    torch.manual_seed(size)
                    q, keys, values, table, counts = paged_case(lengths, heads, key_heads, size, page)
                    found = paged_attention(q, keys, values, table, counts)
                    for row, n in enumerate(lengths):
                        cells = table[row].long()
                        k, v = (x[cells].flatten(0, 1)[:n].double().transpose(0, 1) for x in (keys, values))
                        k, v = (x.repeat_interleave(heads // key_heads, 0) for x in (k, v))  # (H, n, D)
                        scores = (k @ q[row].double()[:, :, None]).squeeze(2) * size**-0.5
                        wanted = (scores.softmax(1)[:, None] @ v).squeeze(1)
                        worst = max(worst, relative(found[row], wanted))
            report(f"pages of {page}: relative error", worst, "", "< 0.01", path)
    with report.part("same bits alone and among 64 rows, and again"):
        lengths = [1 + (i * 997) % 9000 for i in range(64)]
        case = paged_case(lengths, 32, 8, 128, 256)
        found, again = paged_attention(*case), paged_attention(*case)
        q, keys, values, table, counts = case
        rows = [slice(i, i + 1) for i in range(64)]
        alone = torch.cat([paged_attention(q[i], keys, values, table[i], counts[i]) for i in rows])
        report("rows with the same bits alone as among 64", (alone == found).all(2).all(1).float().mean(), "", ">= 1")
        report("rows with the same bits in a second call", (again == found).all(2).all(1).float().mean(), "", ">= 1")
    bandwidth = copy_bandwidth()
    for context in (512, 4096, 16_384):
        with report.part(f"64 rows x {context:,}"):
            pages, layers = 64 * context // 256, 4  # caches rotate, so that the L2 cache holds none of them
            stores = [torch.randn(2, pages, 256, 8, 128, device=DEVICE, dtype=DTYPE) for _ in range(layers)]
            table = torch.randperm(pages, device=DEVICE).int().view(64, -1)
            counts = torch.full((64,), context, dtype=torch.int32, device=DEVICE)
            q = torch.randn(64, 32, 128, device=DEVICE, dtype=DTYPE)

            def step(stores: list = stores, rest: tuple = (table, counts), q: Tensor = q) -> None:
                for store in stores:
                    paged_attention(q, *store, *rest)

            step()
            eager = event_seconds(step, 5) / layers
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            graph.replay()
            taken = event_seconds(graph.replay, 10) / layers
            rate = stores[0].nbytes / taken
            more = f"{taken * 1e6:.0f} us a call, {eager * 1e6:.0f} without a graph, {rate / 1e9:.0f} GB/s"
            report(f"64 rows x {context:,}: share of a copy's bandwidth", rate / bandwidth, "", ">= 0.7",
                   f"{path}, CUDA graph", more)  # fmt: skip
            del stores


def scale_logits(model: Transformer, entropy: float) -> float:
    """Scale the last norm so that the mean entropy of next tokens is about `entropy` nats; return the factor."""
    tokens = torch.randint(model.config.vocab_size, (256,), device=DEVICE)
    with torch.no_grad():
        logits = model.logits(model.hidden(tokens, models.Packed([64] * 4, DEVICE))).float()
    low, high = 0.0, 100.0
    for _ in range(30):
        middle = (low + high) / 2
        logprobs = (logits * middle).log_softmax(1)
        found = float(-(logprobs.exp() * logprobs).sum(1).mean())
        low, high = (middle, high) if found > entropy else (low, middle)
    model.model.norm.weight.mul_(low)
    return low


def check_agreement(report: Report, small: bool) -> None:
    """Compare the sampler's log-probs with the trainer's, on logits as peaked as a trained model's."""
    model = random_model("qwen3-0.6b", small, tie_word_embeddings=False)  # tied random weights repeat their input
    report("last norm scaled, for an entropy of 2 nats, by", scale_logits(model, 2.0))
    new = 24 if small else 512
    prompts, limits = make_prompts(8, 8, model.config.vocab_size), CacheLimits(80 * 1024, 256, 64)
    for float32_head in (True, False):
        name = "float32 head" if float32_head else "rounded head"
        with report.part(name):
            model.float32_head = float32_head
            with paths() as calls:
                found, _ = sample(model, Sampling(1.0, new, (), 0), prompts, limits)
            differences, from_exact, sampled = [], [], named(calls)
            exact = copy.deepcopy(model).float()
            with paths() as calls, torch.no_grad():
                for start in range(0, 64, 16):
                    batch = pack(sequences_of(found[start : start + 16]), DEVICE)
                    row = batch.tokens, batch.context, batch.predict, batch.targets, batch.temperature
                    logprobs, wanted = model(*row), exact(*row)
                    differences.append((logprobs - batch.old_logprobs).double())
                    from_exact.append([float((x - wanted).abs().mean()) for x in (logprobs, batch.old_logprobs)])
            trained, sampled_error = np.mean(from_exact, 0)
            more = "the same bfloat16 weights in float32 arithmetic"
            report(f"{name}: trainer from float32, mean", trained, "nats", note=more)
            report(f"{name}: sampler from float32, mean", sampled_error, "nats")
            path, all_of_them = f"sampler {sampled}; trainer {named(calls)}", torch.cat(differences)
            report(f"{name}: mean |log-prob difference|", all_of_them.abs().mean(), "nats", "< 0.005", path)
            logprob = np.mean([r.logprobs.mean() for r in found])
            more = f"ratio {float(all_of_them.exp().mean()):.5f}, log-prob {logprob:.2f}"
            report(f"{name}: largest |log-prob difference|", all_of_them.abs().max(), "nats", "", path, f"mean {more}")


def check_graphs(report: Report, small: bool) -> None:
    """Compare graphs with single steps, and the memory before and after sampling."""
    model, new = random_model("qwen3-0.6b", small, tie_word_embeddings=False), 16 if small else 128
    scale_logits(model, 2.0)
    limits, ragged = CacheLimits(64 * 1024, 256, 64), [new // 8 * (i + 1) for i in range(8)]
    captures: list[float] = []
    capture = decode.capture_graph

    def timed(*arguments, **options):
        begun = time.perf_counter()
        found = capture(*arguments, **options)
        captures.append(time.perf_counter() - begun)
        return found

    for temperature, lengths in ((0.0, None), (1.0, None), (1.0, ragged)):
        name = f"temperature {temperature:g}, {'ragged' if lengths else 'equal'} lengths"
        with report.part(name), replaced(decode, capture_graph=timed):
            prompts, sampling = make_prompts(8, 8, model.config.vocab_size, lengths), Sampling(temperature, new, (), 0)
            captures.clear()
            begun = time.perf_counter()
            with paths() as calls:
                found, _ = sample(model, sampling, prompts, limits)
            seconds, recorded = time.perf_counter() - begun, len(captures)
            with replaced(rollout, step_graphs=lambda *_, **__: None), paths() as single:
                begun = time.perf_counter()
                expected, _ = sample(model, sampling, prompts, limits)
                slow = time.perf_counter() - begun
            if not recorded or len(captures) > recorded:
                why = "no graph was recorded" if not recorded else "single steps were recorded too"
                report.missing(f"{name}: graphs against single steps", f"{why} ({named(calls)}; {named(single)})")
                continue
            path = f"{recorded} graphs, {named(calls)}, against single steps, {named(single)}"
            report(f"{name}: same tokens", equal_share(found, expected), "", "" if lengths else ">= 1", path)
            more = f"{sum(captures) / recorded:.3f} each; sampled in {seconds:.2f}, without graphs in {slow:.2f}"
            report(f"{name}: recording graphs", sum(captures), "s", path=path, note=more)
    if not CUDA:
        return report.missing("memory after sampling", "no CUDA")
    with report.part("memory after sampling"):
        free_memory()
        before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        sample(model, Sampling(1.0, 32, (), 1), make_prompts(8, 8, 500), limits)
        free_memory()
        report("allocated after sampling, more than before", (torch.cuda.memory_allocated() - before[0]) / 2**20,
               "MiB", "< 16")  # fmt: skip
        report("reserved after sampling, more than before", (torch.cuda.memory_reserved() - before[1]) / 2**20,
               "MiB", "< 64")  # fmt: skip


def check_decode_time(report: Report, small: bool) -> None:
    """Time decode steps over a cache of random values, by context, and compare with reading weights and cache once."""
    bandwidth = copy_bandwidth()
    report("copy bandwidth, read + written", bandwidth / 1e9, "GB/s")
    for shape in ("qwen3-0.6b", "qwen3-4b"):
        model = random_model(shape, small)
        weights = sum(p.nbytes for n, p in model.named_parameters() if "embed_tokens" not in n)
        weights += model.lm_head.weight.nbytes if model.config.tie_word_embeddings else 0
        per_token = cache_bytes_per_token(model.config, DTYPE)
        for context in (32, 64) if small else (512, 2048, 4096, 8192, 16_384):
            name = f"{shape}, context {context:,}"
            with report.part(name), torch.no_grad(), paths() as calls:
                free = torch.cuda.mem_get_info()[0] if CUDA else GIB
                longest = context + 256
                fitting = int((free - 4 * GIB * CUDA) * 0.9 / (per_token * longest))
                rows = max(1, min(64, fitting // 8 * 8 or fitting))
                sampler = made_sampler(model, rows, context, 64)
                step = functools.partial(decode_once, sampler)
                step()
                step()
                before, times = sampler.stats.decode_steps, 2 if small else 4
                taken = event_seconds(step, times) * times / (sampler.stats.decode_steps - before)
                size = weights + rows * context * per_token
                path = named(calls)
                more = f"{rows} rows, {rows / taken:,.0f} tokens/s, reads {size / 1e9:.2f} GB"
                report(f"{name}: a step", taken * 1e3, "ms", path=path, note=more)
                report(f"{name}: share of the roofline", size / bandwidth / taken, "", ">= 0.7", path)
                if context == 512:
                    report(f"{shape}: kernels a step", kernels_of(lambda s=sampler: single_step(s)), path="single step")
            sampler = step = None
            free_memory()
        model = None
        free_memory()


def made_sampler(model: Transformer, rows: int, context: int, new: int) -> object:
    """Make a sampler in the middle of its work: rows of `context` tokens, whose cache holds random values."""
    prompts = make_prompts(rows, 1, model.config.vocab_size)
    draw = np.random.default_rng(0)
    prompts = [Prompt(p.problem_id, draw.integers(0, model.config.vocab_size, context).tolist(), 1) for p in prompts]
    pages = rows * (-(-(context + new) // 256)) + 2
    sampler = rollout._Sampler(
        model, prompts, Sampling(1.0, new, (), 0), CacheLimits(pages * 256, 256, rows), SamplerStats()
    )
    for store in (sampler.cache.keys, sampler.cache.values):
        for layer in store:  # one layer at a time: normal_ may need a copy
            layer.normal_()
    random.Random(0).shuffle(sampler.cache.free)
    sampler._prefill = lambda prefills: None
    sampler._admit()
    return sampler


def decode_once(sampler: object) -> None:
    """Draw the next tokens of every row, as many steps as the sampler makes between two synchronisations."""
    sampler._retire(*sampler._decode())


def single_step(sampler: object) -> None:
    """Make one step without a graph."""
    sampler._step(len(sampler.rows), sampler.pages_per_row * sampler.page_size)


def kernels_of(work: Callable[[], object]) -> int:
    """Count the kernels that a piece of work starts on the GPU, or the operators on a CPU."""
    from torch.profiler import ProfilerActivity, profile

    work()
    with profile(activities=[ProfilerActivity.CUDA] if CUDA else [ProfilerActivity.CPU]) as profiler:
        work()
        if CUDA:
            torch.cuda.synchronize()
    kind = torch.autograd.DeviceType.CUDA if CUDA else torch.autograd.DeviceType.CPU
    return sum(event.device_type == kind for event in profiler.events())


def check_train(report: Report, small: bool) -> None:
    """Kill train.py in the middle of a small run and resume it."""
    from bench.interrupt import ROOT, SMALL
    from lab.metrics import read_metrics

    with tempfile.TemporaryDirectory() as folder:
        words = [word for setting in SMALL for word in ("--set", setting)]
        command = [sys.executable, str(ROOT / "train.py"), *words, "--out", folder]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}

        def rows() -> list[dict]:
            return [row for path in Path(folder).glob("*/metrics.jsonl") for row in read_metrics(path.parent)]

        begun = time.monotonic()
        process = subprocess.Popen(command, env=environment)
        while process.poll() is None and not any(row["kind"] == "rl" for row in rows()):
            time.sleep(0.1)
        first, ended = time.monotonic() - begun, process.poll()
        process.kill()
        process.wait()
        report("train.py until its first step of RL", first, "s")
        if ended is not None:
            raise RuntimeError(f"train.py ended with {ended} before its first step of RL")
        killed_after, begun = len(rows()), time.monotonic()
        status = subprocess.run([*command, "--resume"], env=environment).returncode
        report("resumed to the end", time.monotonic() - begun, "s")
        if status:
            raise RuntimeError(f"train.py --resume ended with {status}")
        found = rows()
        report("rows of metrics at the kill", killed_after)
        report("rows of metrics at the end", len(found))
        rl, sft = ([row for row in found if row["kind"] == kind] for kind in ("rl", "sft"))
        report("seconds of a step of fine-tuning", float(np.median([row["seconds"] for row in sft])), "s")
        report("seconds of a step of RL", float(np.median([row["seconds"] for row in rl])), "s")
        differences = [row["logprob_diff_mean"] for row in rl if row.get("logprob_diff_mean") is not None]
        report("mean |log-prob difference|", float(np.mean(differences)), "nats", "< 0.005")
        report("loss of fine-tuning, last over first", sft[-1]["loss"] / sft[0]["loss"], "", "< 0.7")


def check_memory_24(report: Report, small: bool) -> None:
    """Sample and update in the memory of a 24 GB card, with a full cache and with memory that runs out."""
    model, new = random_model("qwen3-0.6b", small, tie_word_embeddings=False), 32 if small else 384
    scale_logits(model, 2.0)
    if CUDA:
        torch.cuda.set_per_process_memory_fraction(CARD_BYTES / torch.cuda.mem_get_info()[1])
    page = 16 if small else 256
    prompts, sampling = make_prompts(8, 8, model.config.vocab_size), Sampling(1.0, new, (), 0)
    longest = -(-(300 + new) // page) * page
    full = CacheLimits(64 * longest, page, 64)
    with paths() as calls:
        whole, stats = sample(model, sampling, prompts, full)
    path = named(calls)
    report("unconstrained: preemptions", stats.preemptions, path=path)

    def compare(name: str, limits: CacheLimits) -> None:
        free_memory()
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        with paths() as calls:
            found, stats = sample(model, sampling, prompts, limits)
        path = named(calls)
        report(f"{name}: preemptions", stats.preemptions, "", ">= 1" if name == "full cache" else "", path)
        report(f"{name}: retries", stats.memory_retries, path=path)
        report(f"{name}: same tokens as unconstrained", equal_share(whole, found), path=path)
        report(f"{name}: mean log-prob difference before a token differs", common_difference(whole, found), "nats",
               "< 0.02", path)  # fmt: skip
        if CUDA:
            report(f"{name}: peak", torch.cuda.max_memory_allocated() / GIB, "GiB", "< 23.6", path)

    with report.part("full cache"):
        compare("full cache", CacheLimits((12 if small else 16) * longest, page, 64))
    if not CUDA:
        return report.missing("forced out-of-memory", "no CUDA")
    with report.part("memory runs out in sampling"):
        free_memory()
        kept = 1.5 * GIB  # for the cache and decoding; the cache asked for takes more
        hog = torch.empty(int(CARD_BYTES - torch.cuda.memory_reserved() - kept), dtype=torch.uint8, device=DEVICE)
        compare("memory runs out in sampling", full)
        del hog
    model.requires_grad_(True)
    for layer in model.model.layers:
        layer.recompute = True
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    sequences = sequences_of(whole)

    def update(micro_batch_tokens: int = 48 * 1024) -> object:
        free_memory()
        torch.cuda.reset_peak_memory_stats()
        return optimizer_step(model, optimizer, sequences, PolicyLoss(), micro_batch_tokens)

    with report.part("memory runs out in the update"), paths() as calls:
        update()  # makes the moments
        free_memory()
        expected = update()
        peak = torch.cuda.max_memory_allocated()
        report("update, unconstrained: peak", peak / GIB, "GiB", "< 23.6", named(calls))
        update(4096)
        least = torch.cuda.max_memory_allocated()
        free_memory()
        kept = least + 0.3 * (peak - least) + 0.2 * GIB  # room for fragments
        hog = torch.empty(int(CARD_BYTES - kept), dtype=torch.uint8, device=DEVICE)
        found = update()
        report("update, out of memory: retries", found.memory_retries, "", ">= 1", named(calls))
        report("update, out of memory: micro-batch", found.micro_batch_tokens, "tokens")
        report("update, out of memory: peak", (torch.cuda.max_memory_allocated() - hog.nbytes) / GIB, "GiB")
        report("update, out of memory: relative change of the gradient's norm",
               abs(found.grad_norm / expected.grad_norm - 1), "", "< 0.02")  # fmt: skip
        report("update, out of memory: change of the loss", abs(found.loss - expected.loss), "", "< 0.001")


def check_evening(report: Report, small: bool) -> None:
    """Make a step of the recipes for a 24 GB card on random weights, whose responses all reach the limit."""
    from types import SimpleNamespace

    from engine.run import Run
    from engine.sharding import gathered, shard
    from lab.plan_memory import Shape, plan_stage, size_cache
    from lab.recipe import load_recipe

    if not CUDA:
        return report.missing("steps of the recipes", "no CUDA")
    torch.cuda.set_per_process_memory_fraction(CARD_BYTES / torch.cuda.mem_get_info()[1])
    processes = distributed.start()
    for name, shape, share in (("first-hour-24gb", "qwen3-0.6b", 1), ("overnight-24gb", "qwen3-1.7b", 4)):
        with report.part(name):
            recipe = load_recipe(Path(__file__).resolve().parent.parent / "recipes" / f"{name}.toml")
            config = parse_config(SHAPES[shape])
            recipe = size_cache(Shape(config), recipe, 1, CARD_BYTES)  # mem_get_info would report the whole card
            stage = recipe.stage[0]
            with DEVICE:
                model = Transformer(config)
            initialise(model, 0)
            for layer in model.model.layers:
                layer.recompute = recipe.recompute_activations
            shard(model, processes.mesh, processes.compute_dtype)
            run = SimpleNamespace(model=model, resume_from=None, recipe=recipe, state=SimpleNamespace())
            run.metrics = SimpleNamespace(position=[0, 0])
            Run.begin_steps(run, stage)
            prompts = make_prompts(stage.batch_problems // share, stage.group_size, 500)
            sampling = Sampling(stage.temperature, stage.max_response_tokens, (), 0)
            limits = CacheLimits(recipe.sampler.cache_tokens, recipe.sampler.page_tokens, recipe.sampler.rows)
            plan, stats = plan_stage(Shape(config), recipe, 0, 1), SamplerStats()
            with gathered(model), torch.no_grad(), paths() as calls:
                begun = time.perf_counter()
                found = list(generate(model, prompts, sampling, limits, stats))
                sampled = time.perf_counter() - begun
            tokens, path = sum(len(rollout.tokens) for rollout in found), named(calls)
            more = f"{len(found)} rollouts of {stage.max_response_tokens:,} tokens, {stats.preemptions} preemptions"
            report(f"{name}: sampling, tokens per second", tokens / sampled, "", "", path, more)
            report(f"{name}: sampling, peak", torch.cuda.max_memory_allocated() / GIB, "GiB", "< 23.6", path,
                   f"planned {sum(plan.sampling.values()) / GIB:.1f}, of it 1.25 for CUDA itself")  # fmt: skip
            sequences = sequences_of(found)
            step = functools.partial(optimizer_step, model, run.optimizer, sequences, PolicyLoss())
            free_memory()
            torch.cuda.reset_peak_memory_stats()
            step(recipe.micro_batch_tokens)
            taken = seconds_of(functools.partial(step, recipe.micro_batch_tokens), DEVICE)
            report(f"{name}: update, tokens per second", sum(len(s.tokens) for s in sequences) / taken)
            report(f"{name}: update, peak", torch.cuda.max_memory_allocated() / GIB, "GiB", "< 23.6", "",
                   f"planned {sum(plan.update.values()) / GIB:.1f}, of it 1.25 for CUDA itself")  # fmt: skip
            report(f"{name}: a step of {len(found)} rollouts, no grading", sampled + taken, "s", "", "",
                   f"{sampled:.1f} s of it sampling")  # fmt: skip
        del model, layer, run, step  # the last layer's FSDP state holds all weights
        free_memory()
    distributed.stop()


def check_update(report: Report, small: bool) -> None:
    """Measure updates of one micro-batch, and compare their memory with the plan's."""
    from lab.plan_memory import Shape, Update, update_moments

    cases = [("qwen3-0.6b", "recompute", 18_432, 2), ("qwen3-4b", "lora, recompute", 16_384, 2),
             ("qwen3-4b", "lora, recompute", 40_960, 1)]  # fmt: skip
    for shape, feature, tokens, rounds in [("smollm2-135m", "recompute", 256, 1)] if small else cases:
        name = f"{shape}, {feature}, {tokens:,} tokens"
        with report.part(name), paths() as calls:
            # the path is found by one call in this process: the measurement has a process of its own
            q, k = (torch.zeros(8, n, 128, device=DEVICE, dtype=DTYPE) for n in (16, 8))
            packed_attention(q, k, k, PackedLayout([8], DEVICE))
            path, case = named(calls), {"shape": shape, "feature": feature, "tokens": tokens, "sequence": 0}
            found = in_own_process("update", case | {"rounds": rounds, "cpu_time": False})
            if "failed" in found:
                raise RuntimeError(found["failed"])
            report(f"{name}: tokens per second", found["tokens_per_s"], path=path)
            report(f"{name}: utilisation", found["utilisation"], "", "" if small else ">= 0.45", path)
            report(f"{name}: matrix rate beside it", found["matrix_rate"] / 1e12, "TFLOP/s", path=path)
            sizes, rank = Shape(parse_config(SHAPES[shape])), 32 * ("lora" in feature)
            settings = Update(tokens, tokens - 1, DTYPE, CUDA, lora_rank=rank)
            plan = max(sum(moment.values()) for moment in update_moments(sizes, settings).values())
            plan += 4 * (rank * sizes.layers * sizes.adapter or sizes.parameters)  # gradients, float32
            report(f"{name}: peak above weights and optimizer", found["live_bytes"] / GIB, "GiB", path=path)
            report(f"{name}: measured over planned memory", found["live_bytes"] / plan, "", path=path)


def check_generate(report: Report, small: bool) -> None:
    """Sample the ragged case of bench/sampler.py, longer, beside transformers on the same weights."""
    from transformers import AutoModelForCausalLM

    model, mean = random_model("qwen3-0.6b", small), 12 if small else 64
    draw = np.random.default_rng(0)
    lengths = np.minimum(4 * mean, draw.geometric(1 / mean, (16, 8)))
    prompts = [draw.integers(5, 500, n).tolist() for n in draw.integers(64, 257, 16)]
    case = Case("ragged", prompts, lengths.tolist(), 64)
    with report.part("ours"), paths() as calls:
        run_ours(model, case)
        ours = min(run_ours(model, case)[0] for _ in range(2))
        path = named(calls)
        report("ours: tokens per second", case.tokens / ours, path=path)
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder, "model"), DTYPE)
        reference = AutoModelForCausalLM.from_pretrained(Path(folder, "model"), dtype=DTYPE).to(DEVICE).eval()
    with report.part("beside generate"):
        path = f"transformers, {reference.config._attn_implementation}"
        report("beside generate", run_generate(reference, case) / ours, "times", "" if small else ">= 8", path)
    with report.part("beside continuous batching"):
        report("beside continuous batching", run_continuous(reference, case) / ours, "times", "" if small else ">= 2")
