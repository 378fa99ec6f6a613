"""Speed, utilisation and memory of the update by length, with each memory feature on and off.

    python bench/update.py                                      # the shape of SmolLM2-135M, 1K to 8K tokens, float32
    python bench/update.py --lengths 1024 2048 --cpu-time       # smaller, and for a shared machine
    python bench/update.py --logprobs                           # log-probs alone: 152K tokens of vocabulary
    python bench/update.py --shape qwen3-4b --lengths 16384 40960 --sequence 0 --features recompute    # on a GPU

Every case runs in a separate process and calls grpo.optimizer_step with one micro-batch on random weights (the
arithmetic is the same as with trained ones), with the device and dtype that train.py would choose.

Useful FLOPs are 6 per weight and token (4 if frozen; the head: per predicted token) and 6 per pair of tokens, head and
head dimension of causal attention; recomputation does not count. Utilisation is their rate over the rate of a large
matrix product of the same dtype in the same process, measured before and after. Memory is the peak of one step above
weights and optimizer: `live` counts bytes of tensors exactly (CUDA: the allocator's peak), `resident` the process's.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model as models  # noqa: E402
from bench.machine import measure_machine, peak_of, seconds_of  # noqa: E402
from engine.adapter import Lora, add_lora, initialise_lora  # noqa: E402
from engine.batches import TrainingSequence  # noqa: E402
from engine.offload import Offload  # noqa: E402
from engine.sharding import shard  # noqa: E402
from grpo import PolicyLoss, optimizer_step  # noqa: E402
from lab.benchmarks import text_table  # noqa: E402
from model import ModelConfig, Transformer, initialise, parse_config  # noqa: E402

QWEN3 = {
    "model_type": "qwen3", "vocab_size": 151_936, "num_key_value_heads": 8, "head_dim": 128, "rope_theta": 1e6,
    "max_position_embeddings": 40_960, "tie_word_embeddings": True,
}  # fmt: skip
SHAPES = {
    "smollm2-135m": {
        "model_type": "llama", "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "qwen3-0.6b": QWEN3 | {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
    },
    "qwen3-1.7b": QWEN3 | {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
    },
    "qwen3-4b": QWEN3 | {
        "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
    },
}  # fmt: skip
# the settings of each case; `none` keeps activations and computes log-probs in chunks. A new feature is a line in this
# table and a switch in measure_update
FEATURES = {
    "none": {},
    "recompute": {"recompute": True},
    "plain log-probs": {"plain_logprobs": True},
    "offload activations": {"recompute": True, "offload_activations": True},
    "offload optimizer": {"offload_optimizer": True},
    "lora": {"lora": True},
    "lora, recompute": {"lora": True, "recompute": True},
}
GIB = 2**30


class PlainLogprobs:
    """The baseline for chunked log-probs: all logits at once, and autograd's gradient."""

    @staticmethod
    def apply(hidden, weight, targets, temperature, float32_head):
        """hidden (N, C), weight (V, C), targets (N,), temperature (N,) -> (N,)."""
        scaled = torch.nn.functional.linear(hidden.float(), weight.float()) / temperature[:, None]  # (N, V)
        return scaled.log_softmax(1).gather(1, targets[:, None]).squeeze(1)


@contextmanager
def logprobs_by(way: type) -> Iterator[None]:
    """Make the model compute its log-probs with this class."""
    ours, models.TokenLogprobs = models.TokenLogprobs, way
    try:
        yield
    finally:
        models.TokenLogprobs = ours


@dataclass
class Case:
    """One line of the table, measured in a separate process."""

    shape: str
    feature: str
    tokens: int
    sequence: int  # tokens of each sequence; 0: one sequence of all tokens
    rounds: int
    cpu_time: bool


def useful_flops(config: ModelConfig, lengths: list[int], predicted: int, frozen: bool = False) -> float:
    """Return the FLOPs of one update, forward and backward, without recomputation; frozen weights need no gradient."""
    each = 4 if frozen else 6
    queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    layer = config.hidden_size * (2 * queries + 2 * keys + 3 * config.intermediate_size)
    attention = queries * sum(n * n for n in lengths)  # 2 x 2 for scores and values, half of it causal, 3 x backward
    body = config.num_hidden_layers * (each * layer * sum(lengths) + 6 * attention)
    return body + each * config.vocab_size * config.hidden_size * predicted


def measure_update(case: Case) -> dict:
    """Run one case in this process."""
    from engine import distributed
    from engine.run import Run
    from lab.recipe import RlStage

    processes, clock = distributed.start(), time.process_time if case.cpu_time else time.perf_counter
    settings = FEATURES[case.feature]
    with processes.device:
        model = Transformer(parse_config(SHAPES[case.shape]))
    initialise(model, seed=0)
    if settings.get("lora"):
        add_lora(model, Lora(rank=32, alpha=32.0, base=""))
        initialise_lora(model, seed=0)
    stream = torch.cuda.Stream() if processes.device.type == "cuda" else None
    offload = Offload(stream) if settings.get("offload_activations") else None
    for layer in model.model.layers:
        layer.recompute, layer.offload = settings.get("recompute", False), offload
    shard(model, processes.mesh, processes.compute_dtype)
    recipe = SimpleNamespace(offload_optimizer=settings.get("offload_optimizer", False))
    run = SimpleNamespace(model=model, resume_from=None, recipe=recipe, state=SimpleNamespace())
    run.metrics = SimpleNamespace(position=[0, 0])
    Run.begin_steps(run, RlStage())
    optimizer = run.optimizer

    random, length = np.random.default_rng(0), case.sequence or case.tokens
    lengths = [length] * (case.tokens // length)
    sequences = [
        TrainingSequence(
            random.integers(0, model.config.vocab_size, n).astype(np.int32), 1, float(random.normal()),
            random.normal(-11, 0.5, n - 1).astype(np.float32),
        )
        for n in lengths
    ]  # fmt: skip
    predicted = sum(sequence.response_length for sequence in sequences)
    step = partial(optimizer_step, model, optimizer, sequences, PolicyLoss(), case.tokens)
    with logprobs_by(PlainLogprobs if settings.get("plain_logprobs") else models.TokenLogprobs):
        step()  # creates the optimizer's state
        peak = peak_of(step, processes.device)
        measure = partial(measure_machine, processes.device, processes.compute_dtype, 3, clock)
        rates, times = [measure()[1]], []
        for _ in range(case.rounds):
            times.append(seconds_of(step, processes.device, clock))
            rates.append(measure()[1])
    distributed.stop()
    flops = useful_flops(model.config, lengths, predicted, settings.get("lora", False))
    return {
        "feature": case.feature, "tokens": sum(lengths), "tokens_per_s": sum(lengths) / min(times),
        "utilisation": flops / min(times) / max(rates), "matrix_rate": max(rates), "live_bytes": peak.live,
        "resident_bytes": peak.resident,
    }  # fmt: skip


def measure_logprobs(way: str, positions: int, vocabulary: int, hidden_size: int) -> dict:
    """Measure the memory of log-probs and their gradient, above hidden states and head, in this process."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(positions, hidden_size, generator=generator).requires_grad_()
    weight = (0.02 * torch.randn(vocabulary, hidden_size, generator=generator)).requires_grad_()
    targets = torch.randint(vocabulary, (positions,), generator=generator)
    temperature = torch.full((positions,), 1.4)
    compute: Callable = (PlainLogprobs if way == "plain" else models.TokenLogprobs).apply
    peak = peak_of(lambda: compute(hidden, weight, targets, temperature, True).sum().backward())
    return {"way": way, "positions": positions, "live_bytes": peak.live, "resident_bytes": peak.resident}


def in_own_process(*values: object) -> dict:
    """Measure a case in a fresh process; a failure is returned for the table."""
    command = [sys.executable, __file__, "--one", json.dumps(values)]
    child = subprocess.run(command, capture_output=True, text=True)
    if child.returncode:
        reason = (child.stderr.strip() or f"ended by signal {-child.returncode}").splitlines()[-1]
        return {"failed": reason}
    return json.loads(child.stdout.splitlines()[-1])


def gib(size: int | None) -> str:
    """Format bytes as GiB."""
    return "-" if size is None else f"{size / GIB:.2f}"


def update_table(arguments: argparse.Namespace) -> tuple[list[list[str]], list[dict]]:
    """Measure every feature at every length."""
    rows = [["feature", "tokens", "tok/s", "utilisation", "live GiB", "resident GiB"]]
    results = []
    for feature in arguments.features:
        for tokens in arguments.lengths:
            case = Case(
                arguments.shape, feature, tokens, min(arguments.sequence, tokens), arguments.rounds, arguments.cpu_time
            )
            found = in_own_process("update", vars(case))
            if "failed" in found:
                row = ["failed", "-", "-", "-"]
                print(f"{feature}, {tokens:,} tokens: {found['failed']}", file=sys.stderr)
            else:
                row = [f"{found['tokens_per_s']:,.0f}", f"{found['utilisation']:.0%}",
                       gib(found["live_bytes"]), gib(found["resident_bytes"])]  # fmt: skip
                print(f"{feature}, {tokens:,} tokens: {row[0]} tok/s, {row[1]} of {found['matrix_rate'] / 1e9:,.0f} "
                      f"GFLOP/s", flush=True)  # fmt: skip
            rows.append([feature, f"{tokens:,}", *row])
            results.append({"feature": feature, "tokens": tokens} | found)
    return rows, results


def logprobs_table(arguments: argparse.Namespace) -> tuple[list[list[str]], list[dict]]:
    """Measure plain log-probs at two lengths, extrapolate linearly, and compare with chunks up to the longest."""
    rows, results = [["way", "positions", "live GiB", "resident GiB"]], []
    wanted = [("plain", n) for n in arguments.plain] + [("ours", n) for n in (*arguments.plain, arguments.longest)]
    for way, positions in wanted:
        found = in_own_process("logprobs", way, positions, 151_936, 1024)
        if "failed" in found:
            sys.exit(f"update.py: {way} at {positions:,} positions: {found['failed']}")
        print(f"{way}, {positions:,} positions: {gib(found['live_bytes'])} GiB", flush=True)
        results.append(found)
        rows.append([way, f"{positions:,}", gib(found["live_bytes"]), gib(found["resident_bytes"])])
    few, many = results[0], results[1]
    slope = (many["live_bytes"] - few["live_bytes"]) / (many["positions"] - few["positions"])
    start, longest = few["live_bytes"] - slope * few["positions"], results[-1]
    law = start + slope * arguments.longest
    rows.append(["plain, by its law", f"{arguments.longest:,}", gib(law), "-"])
    print(f"plain: {start / GIB:.2f} GiB + {slope / 2**20:.2f} MiB a position; ours is 1/"
          f"{law / longest['live_bytes']:.1f} of it at {arguments.longest:,} positions")  # fmt: skip
    return rows, [*results, {"way": "plain, by its law", "positions": arguments.longest, "live_bytes": law}]


def main() -> None:
    """Run the cases and print the table, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192], help="tokens of an update")
    parser.add_argument("--sequence", type=int, default=256, help="tokens of each sequence; 0: one of all tokens")
    parser.add_argument("--features", nargs="+", choices=FEATURES, default=list(FEATURES))
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each case; the best counts")
    parser.add_argument("--cpu-time", action="store_true", help="seconds of the processor, for a crowded machine")
    parser.add_argument("--logprobs", action="store_true", help="memory of log-probs and their gradient alone")
    parser.add_argument("--plain", type=int, nargs=2, default=[2048, 4096], help="positions of the plain way")
    parser.add_argument("--longest", type=int, default=32_768, help="positions of ours alone")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        kind, *values = json.loads(arguments.one)
        print(json.dumps(measure_update(Case(**values[0])) if kind == "update" else measure_logprobs(*values)))
        return
    rows, results = (logprobs_table if arguments.logprobs else update_table)(arguments)
    print(text_table(rows))
    print(json.dumps({"shape": None if arguments.logprobs else arguments.shape, "torch": torch.__version__,
                      "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
                      "threads": torch.get_num_threads(), "cases": results}))  # fmt: skip


if __name__ == "__main__":
    main()
