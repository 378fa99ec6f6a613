"""Does the layout change the result? The first RL steps with several world sizes and micro-batch sizes.

    python bench/layouts.py                          # 5 minutes on two idle cores
    python bench/layouts.py --steps 4 --processes 1 2 --out runs/layouts

Every layout starts from the same model of 0.1M parameters, made by a short fine-tuning in float32. The problems of each
step, every sampled token, the loss and the gradient norm must equal those of the first layout. 2 processes split a
batch of 6 problems into complete groups as long as no length is known; 4 processes split groups. Only waiting differs:
`idle` is the share of the processes' time spent waiting for the slowest, measured in sampling, estimated in the update.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lab.metrics import read_metrics  # noqa: E402

START = """name = "start"
model = "world/model"
instruction = ""
recompute_activations = false
[world]
sft_problems = 2400
sft_terms = [2, 3]
train_problems = 32
train_terms = [3]
held_out_problems = 1
beyond_problems = 1
hidden_size = 64
layers = 2
[[stage]]
kind = "sft"
data = "world/sft.jsonl"
steps = 150
batch_sequences = 16
max_tokens = 256
learning_rate = 3e-3
adam_beta2 = 0.98
warmup_steps = 30
decay_share = 0.3
"""
LEARN = """name = "rl"
model = "{start}/stage-0"
instruction = ""
recompute_activations = false
reward = {{ format = 0.1, steps = 0.5, workers = 1 }}
sampler = {{ page_tokens = 16, cache_tokens = 20000 }}
[[stage]]
kind = "rl"
data = "{start}/world/train.jsonl"
steps = {steps}
batch_problems = 6
temperature = 1.0
max_prompt_tokens = 64
max_response_tokens = 48
informative_share = 0.0
learning_rate = 1e-3
"""


@dataclass(frozen=True)
class Layout:
    """How the work is divided."""

    processes: int
    micro_batch_tokens: int
    rows: int  # decoded at once, by each process


LARGE, SMALL = (16384, 64), (120, 5)
LAYOUTS = [Layout(1, *LARGE), Layout(1, *SMALL), Layout(2, *LARGE), Layout(2, *SMALL), Layout(4, *LARGE)]


def launch(recipe: Path, out: Path, processes: int, *settings: str) -> list[dict]:
    """Run train.py and return its metrics; a single process is started without torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else []), str(ROOT / "train.py"), str(recipe)]
    command += ["--out", str(out), *(word for setting in settings for word in ("--set", setting))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(f"layouts.py: {' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return read_metrics(out / recipe.stem)


def compare(layout: Layout, rows: list[dict], reference: list[dict]) -> dict:
    """Return one line of the table: a layout's steps compared with the first layout's."""

    def largest(key: str) -> float:
        pairs = [(row[key], other[key]) for row, other in zip(rows, reference, strict=True) if not other["skipped"]]
        return max(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs)

    def mean(key: str) -> float:
        return sum(row.get(key, 0.0) for row in rows) / len(rows)

    return vars(layout) | {
        "steps": len(rows),
        "same_problems": sum(a["problems_hash"] == b["problems_hash"] for a, b in zip(rows, reference, strict=True)),
        "same_tokens": sum(a["tokens_hash"] == b["tokens_hash"] for a, b in zip(rows, reference, strict=True)),
        "loss": largest("loss"),
        "grad_norm": largest("grad_norm"),
        "idle_share": mean("idle_share"),
        "update_idle_share": mean("update_idle_share"),
    }


def main() -> None:
    """Run the layouts one after the other and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2, 4], help="world sizes to run")
    parser.add_argument("--out", type=Path, help="keep the runs here (default: a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = (arguments.out or Path(temporary)).resolve()
        out.mkdir(parents=True, exist_ok=True)
        (out / "start.toml").write_text(START)
        launch(out / "start.toml", out, 1)
        recipe = out / "rl.toml"
        recipe.write_text(LEARN.format(start=out / "start", steps=arguments.steps))
        found, reference = [], None
        for number, layout in enumerate(LAYOUTS):
            if layout.processes not in arguments.processes and number:
                continue
            settings = f"micro_batch_tokens={layout.micro_batch_tokens}", f"sampler.rows={layout.rows}"
            rows = launch(recipe, out / f"layout-{number}", layout.processes, *settings)
            rows = [row for row in rows if row["kind"] == "rl"]
            reference = reference or rows
            found.append(compare(layout, rows, reference))
            print(f"{layout}: done", file=sys.stderr, flush=True)
    head = ["processes", "micro-batch, tokens", "rows", "same problems", "same tokens", "loss differs by"]
    table = [[*head, "gradient norm by", "idle in sampling", "in the update"]]
    for line in found:
        shares = [f"{line[key]}/{line['steps']} steps" for key in ("same_problems", "same_tokens")]
        differences = [f"{line[key]:.1e}" if line is not found[0] else "-" for key in ("loss", "grad_norm")]
        idle = [f"{line[key]:.0%}" for key in ("idle_share", "update_idle_share")]
        pieces = [f"{line[key]:,}" for key in ("processes", "micro_batch_tokens", "rows")]
        table.append([*pieces, *shares, *differences, *idle])
    lines = [f"| {' | '.join(cells)} |" for cells in table]
    print("\n".join([lines[0], "|---" * len(table[0]) + "|", *lines[1:]]))
    print(json.dumps({"layouts": found}))


if __name__ == "__main__":
    main()
