"""Compare the tokens per second of rollout.py with transformers' `generate` and with the machine's roofline.

    python bench/sampler.py --model SMOLLM2           # three cases; SMOLLM2: the folder bench/smollm2.py wrote
    python bench/sampler.py --case wide128            # needs no download: the 128-wide model with random weights

Cases: `equal` (64 prompts of 64 tokens, 64 new tokens each), `ragged` (16 prompts of 64 to 256 tokens, 8 responses
each, geometric lengths up to 4 times their mean, in 64 rows), `wide128` (256 rows, 4-layer Qwen3 of width 128).
Both samplers are forced to the same lengths; ours also returns log-probs. They alternate in one process, and the
fastest round of each is reported: on a shared machine only ratios are meaningful.

The roofline of a step is the larger of two times: its bytes (weights once, keys and values of every row) over the
bandwidth, and its FLOPs (2 per weight and row, plus attention) over the matrix rate, both measured at run time.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.machine import measure_machine  # noqa: E402
from engine.sharding import gathered  # noqa: E402
from lab.benchmarks import text_table  # noqa: E402
from model import Transformer, initialise, load, parse_config, save  # noqa: E402
from rollout import CacheLimits, Prompt, SamplerStats, Sampling, cache_bytes_per_token, generate  # noqa: E402

WIDE128 = {
    "vocab_size": 64, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 1024, "tie_word_embeddings": True,
}  # fmt: skip


@dataclass
class Case:
    """Prompts, the forced lengths of their responses, and the number of rows decoded at once."""

    name: str
    prompts: list[list[int]]
    lengths: list[list[int]]  # of each prompt's responses
    rows: int

    @property
    def tokens(self) -> int:
        """The total length of all responses."""
        return sum(map(sum, self.lengths))

    def requests(self) -> list[tuple[list[int], int]]:
        """Return the prompt and length of every response."""
        return [(prompt, n) for prompt, own in zip(self.prompts, self.lengths, strict=True) for n in own]


def make_case(name: str, vocabulary: int) -> Case:
    """Build the prompts and lengths of a case, from a fixed seed."""
    random = np.random.default_rng(0)

    def prompt(length: int) -> list[int]:
        return random.integers(5, vocabulary, length).tolist()

    if name == "ragged":
        # mean about 24, clipped at 4 times that
        lengths = np.minimum(96, random.geometric(1 / 25, (16, 8)))
        return Case(name, [prompt(n) for n in random.integers(64, 257, 16)], lengths.tolist(), 64)
    rows = 256 if name == "wide128" else 64
    return Case(name, [prompt(64) for _ in range(rows)], [[64]] * rows, rows)


def run_ours(model: Transformer, case: Case) -> tuple[float, SamplerStats]:
    """Sample all responses as train.py does; return the seconds and counters."""
    pairs = list(zip(case.prompts, case.lengths, strict=True))
    page = longest = max(len(p) + max(n) for p, n in pairs)
    if model.device.type == "cuda":
        page, longest = 256, -(-longest // 256) * 256
    prompts = [Prompt(str(i), p, len(n), limits=n) for i, (p, n) in enumerate(pairs)]
    limits = CacheLimits((case.rows + 2) * longest, page, case.rows)
    sampling, stats = Sampling(1.0, max(map(max, case.lengths)), (), seed=0), SamplerStats()
    begun = time.perf_counter()
    with gathered(model):
        found = list(generate(model, prompts, sampling, limits, stats))
    seconds = time.perf_counter() - begun
    assert sum(len(rollout.tokens) for rollout in found) == case.tokens
    return seconds, stats


def run_generate(reference: torch.nn.Module, case: Case) -> float:
    """Return the seconds for the same responses in batches, each of which runs until its longest response ends."""
    requests = case.requests()
    begun = time.perf_counter()
    for start in range(0, len(requests), case.rows):
        batch = requests[start : start + case.rows]
        longest = max(len(prompt) for prompt, _ in batch)
        tokens = [[0] * (longest - len(prompt)) + prompt for prompt, _ in batch]  # padded on the left
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt, _ in batch]
        tokens, mask = (torch.tensor(x, device=reference.device) for x in (tokens, mask))
        most = max(length for _, length in batch)
        with torch.no_grad():
            out = reference.generate(
                tokens, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                max_new_tokens=most, min_new_tokens=most, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        assert out.shape[1] == longest + most
    return time.perf_counter() - begun


def run_continuous(reference: torch.nn.Module, case: Case) -> float:
    """Return the seconds for the same responses through transformers' continuous batching."""
    from transformers import GenerationConfig

    config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=-1, pad_token_id=0)
    manager = reference.init_continuous_batching(generation_config=config)
    requests = case.requests()
    begun = time.perf_counter()
    manager.start()
    for prompt, length in requests:
        manager.add_request(prompt, max_new_tokens=length)
    tokens = 0
    for _ in requests:
        while (found := manager.get_result(timeout=60)) is None or not found.is_finished():
            assert manager.is_running(), "continuous batching stopped early"
        tokens += len(found.generated_tokens)
    seconds = time.perf_counter() - begun
    manager.stop(block=True)
    assert tokens == case.tokens
    return seconds


def roofline_seconds(model: Transformer, case: Case, bandwidth: float, matrix_rate: float) -> float:
    """Return the least time in which the machine could sample the case, with one prefill per prompt."""
    config = model.config
    weights = sum(p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name)
    weights += model.lm_head.weight.numel() if config.tie_word_embeddings else 0
    dtype = model.lm_head.weight.dtype
    kv_bytes = cache_bytes_per_token(config, dtype)
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim  # FLOPs per key and row
    requests = case.requests()
    seconds = 2 * (weights - model.lm_head.weight.numel()) * sum(map(len, case.prompts)) / matrix_rate
    # no row is ever idle, and each token attends to its response's mean context
    contexts = sum(length * (len(prompt) + length / 2) for prompt, length in requests)
    steps = max(case.tokens / case.rows, max(length for _, length in requests))
    bytes_all = steps * dtype.itemsize * weights + contexts * kv_bytes
    flops_all = 2 * weights * case.tokens + contexts * attention
    return seconds + max(bytes_all / bandwidth, flops_all / matrix_rate)


def main() -> None:
    """Run the cases and print the table, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model folder, for the cases equal and ragged")
    parser.add_argument("--case", action="append", choices=["equal", "ragged", "wide128"], help="default: all")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each sampler")
    parser.add_argument("--ours-only", action="store_true", help="skip transformers")
    parser.add_argument("--continuous", action="store_true", help="also run transformers' continuous batching once")
    arguments = parser.parse_args()
    names = arguments.case or (["equal", "ragged", "wide128"] if arguments.model else ["wide128"])
    if arguments.model is None and set(names) != {"wide128"}:
        parser.error("the cases equal and ragged need --model")
    bandwidth, matrix_rate = measure_machine()
    print(f"bandwidth {bandwidth / 1e9:.1f} GB/s, matrix rate {matrix_rate / 1e9:.0f} GFLOP/s")
    results = {}
    rows = ["case,ours tok/s,generate tok/s,ratio,continuous tok/s,roofline tok/s,of roofline,prefilled".split(",")]
    for name in names:
        folder = write_wide128() if name == "wide128" else arguments.model
        model = load(folder)
        case = make_case(name, min(model.config.vocab_size, 40_000))
        reference = None
        if not arguments.ours_only:
            from transformers import AutoModelForCausalLM

            reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        ours, theirs = [], []
        for turn in range(arguments.rounds):
            seconds, stats = run_ours(model, case)
            ours.append(seconds)
            print(f"{name}, round {turn + 1}: ours {case.tokens / seconds:,.0f} tok/s", flush=True)
            if reference is not None:
                theirs.append(run_generate(reference, case))
                print(f"{name}, round {turn + 1}: generate {case.tokens / theirs[-1]:,.0f} tok/s", flush=True)
        continuous = run_continuous(reference, case) if arguments.continuous and reference is not None else None
        # measure again and keep the better: other load would make the machine look slow and the sampler fast
        bandwidth, matrix_rate = map(max, zip((bandwidth, matrix_rate), measure_machine(), strict=True))
        best, limit = min(ours), roofline_seconds(model, case, bandwidth, matrix_rate)
        other = min(theirs) if theirs else None
        results[name] = {
            "ours_tokens_per_s": case.tokens / best,
            "generate_tokens_per_s": case.tokens / other if other else None,
            "continuous_tokens_per_s": case.tokens / continuous if continuous else None,
            "roofline_tokens_per_s": case.tokens / limit,
            "prefilled_tokens": stats.prefilled_tokens,
        }
        rows.append([
            name, f"{case.tokens / best:,.0f}", f"{case.tokens / other:,.0f}" if other else "-",
            f"{other / best:.2f}" if other else "-", f"{case.tokens / continuous:,.0f}" if continuous else "-",
            f"{case.tokens / limit:,.0f}", f"{limit / best:.0%}", f"{stats.prefilled_tokens:,}",
        ])  # fmt: skip
    print(text_table(rows))
    print(json.dumps({"bandwidth": bandwidth, "matrix_rate": matrix_rate, "cases": results}))


def write_wide128() -> Path:
    """Write the 128-wide Qwen3 with random weights to a model folder that both samplers read."""
    folder = Path(tempfile.mkdtemp()) / "wide128"
    config = WIDE128 | {"model_type": "qwen3", "rope_theta": 10_000.0, "rms_norm_eps": 1e-6}
    model = Transformer(parse_config(config, "wide128"))
    initialise(model, seed=0)
    save(model, folder)
    return folder


if __name__ == "__main__":
    main()
