"""Kill, stop and damage a run at random moments; it must end with the same result as an uninterrupted run.

    python bench/interrupt.py --out /tmp/interrupt                       # all kinds, 20 SIGKILLs at random moments
    python bench/interrupt.py --out /tmp/interrupt --only stop worker    # some of them
    python bench/interrupt.py --out /tmp/interrupt --forked              # without the time of imports
    python bench/interrupt.py --saving                                   # time of saving and checking a checkpoint
    python bench/interrupt.py --same runs/tiny other/runs/tiny           # are two finished runs equal, bit for bit?

A small world is trained once without interruption. Then the same command with --resume is started repeatedly, and this
script ends it: by SIGKILL at a moment drawn from the seed, by SIGKILL while a checkpoint is written, by SIGTERM,
SIGINT or SIGHUP, or by killing one of two workers under torchrun --max-restarts; or it flips a bit of the newest
checkpoint, or truncates a metrics line, after a SIGKILL. A run has survived if it finished; it is equal if every tensor
of its last model, every deterministic key of its metrics (glossary.DETERMINISTIC) and every byte of rollouts.jsonl are
those of the uninterrupted run.
"""

import argparse
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lab.glossary import DETERMINISTIC  # noqa: E402
from lab.metrics import read_metrics  # noqa: E402

# the full recipe in seconds: 0.1M parameters, 150 steps of fine-tuning, 7 of RL in three stages, a checkpoint every
# other step
SMALL = [
    "name=small", "world.sft_problems=2400", "world.sft_terms=[2, 3]", "world.train_terms=[3]",
    "world.held_out_terms=[3]", "world.beyond_terms=[3]", "world.train_problems=32", "world.held_out_problems=16",
    "world.beyond_problems=8", "world.hidden_size=64", "world.layers=2", "stage.0.steps=150",
    "stage.0.batch_sequences=16", "stage.1.steps=3", "stage.1.batch_problems=8", "stage.2.steps=2",
    "stage.2.batch_problems=8", "stage.3.steps=2", "stage.3.batch_problems=8", "search.problems=8", "search.samples=2",
    "search.most=1.1", "eval.samples=2", "eval.every_steps=2", "final.samples=2", "reward.format=0.1",
    "reward.steps=0.5", "run.checkpoint_every_steps=2", "stage.1.informative_share=0.0",
    "stage.2.informative_share=0.0", "stage.3.informative_share=0.0",
]  # fmt: skip
KINDS = ("kill", "saving", "stop", "damage", "worker")
MOST_SECONDS = 900.0  # of one launch; after that it counts as lost


@dataclass
class Forked:
    """A run forked from this process, with imports done; the part of subprocess.Popen's interface that is used."""

    pid: int
    returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit status, or None while the run is alive."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float = math.inf) -> int:
        """Wait for the end and return the exit status."""
        limit = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > limit:
                raise subprocess.TimeoutExpired("train.py", timeout)
            time.sleep(0.002)
        return self.returncode


Process = subprocess.Popen | Forked


def launch(
    out: Path,
    overrides: Sequence[str] = SMALL,
    resume: bool = True,
    starter: Sequence[str] = (),
    words: Sequence[str] = (),
    forked: bool = False,
) -> Process:
    """Start the command in a new process group, so that signals reach only it; its output goes to OUT.log."""
    words = [*words, *(word for override in overrides for word in ("--set", override)), "--out", str(out)]
    command = [str(ROOT / "train.py"), *words, *["--resume"] * resume]
    with (out.parent / f"{out.name}.log").open("ab") as log:
        if forked and not starter:
            return Forked(fork(command, log.fileno()))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        return subprocess.Popen(
            [sys.executable, *starter, *command], env=environment, stdout=log, stderr=log, start_new_session=True
        )


def fork(command: list[str], log: int) -> int:
    """Fork, run train.main in the child, and return its process id."""
    import torch

    import train
    from lab.options import training_arguments

    torch.set_num_threads(1)
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv, status = command, 0
    try:
        train.main(training_arguments(None))
    except SystemExit as stopped:
        status = stopped.code if isinstance(stopped.code, int) else 1
        print(stopped.code, file=sys.stderr)
    finally:
        sys.stdout.flush()
        os._exit(status or 0)


def end(process: Process, number: int) -> None:
    """Send a signal to the run and its children."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass


def finish(process: Process, status: int = 0) -> bool:
    """Whether a launch ended without interference, by default with success."""
    try:
        return process.wait(MOST_SECONDS) == status
    except subprocess.TimeoutExpired:
        end(process, signal.SIGKILL)
        process.wait()
        return False


def wait_for(process: Process, happened: Callable[[], bool], seconds: float = MOST_SECONDS) -> bool:
    """Wait for an event; return whether it happened before the launch ended."""
    limit = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < limit:
        if happened():
            return True
        time.sleep(0.002)
    return False


def same(folder: Path, expected: Path, last: str = "stage-3") -> bool:
    """Whether two runs ended with the same result, bit for bit."""
    import torch
    from safetensors.torch import load_file

    def figures(run: Path) -> list[dict]:
        return [{key: row[key] for key in DETERMINISTIC if key in row} for row in read_metrics(run)]

    weights, wanted = (load_file(run / last / "model.safetensors") for run in (folder, expected))
    rollouts, wanted_rollouts = ((run / "rollouts.jsonl").read_bytes() for run in (folder, expected))
    return (
        weights.keys() == wanted.keys()
        and all(torch.equal(weights[name], wanted[name]) for name in wanted)
        and json.dumps(figures(folder)) == json.dumps(figures(expected))  # NaN equals itself as text
        and rollouts == wanted_rollouts
    )


def newest(out: Path) -> Path | None:
    """Return the run's newest checkpoint."""
    found = list(out.glob("*/checkpoints/step-*[0-9]"))
    return max(found, key=lambda path: int(path.name.removeprefix("step-")), default=None)


def flip_a_byte(out: Path, draw: random.Random) -> None:
    """Flip one bit of one file of the newest checkpoint."""
    if checkpoint := newest(out):
        path = draw.choice(sorted(path for path in checkpoint.iterdir() if path.stat().st_size))
        place = draw.randrange(path.stat().st_size)
        with path.open("r+b") as file:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ (1 << draw.randrange(8))]))


def cut_a_line(out: Path, draw: random.Random) -> None:
    """Truncate the metrics in a line, as if killed while writing it, or drop a line that had not reached the disk."""
    for path in out.glob("*/metrics.jsonl"):
        size = path.stat().st_size
        os.truncate(path, max(0, size - draw.randrange(1, 200)))


# ------------------------------------------------------------------------------------------------------ the kinds


Start = Callable[..., Process]


def killed(
    start: Start, out: Path, kills: int, first: float, last: float, draw: random.Random, harms: Sequence = ()
) -> tuple[int, bool]:
    """SIGKILL at random moments between two ages of a launch; return how often, and whether the run then finished.

    Harm is done while it is down. A run that ends before its killer comes is not killed again.
    """
    for number in range(kills):
        process = start(out)
        time.sleep(draw.uniform(first, last))
        if process.poll() is not None:
            return number, process.poll() == 0
        end(process, signal.SIGKILL)
        process.wait()
        if harms:
            harms[number % len(harms)](out, draw)
    return kills, finish(start(out))


def killed_while_saving(start: Start, out: Path, kills: int, draw: random.Random) -> tuple[int, bool]:
    """SIGKILL while a checkpoint is written; return how often it was hit, and whether the run survived."""
    hit = 0
    for _ in range(kills):
        process = start(out)
        skipped = draw.randrange(3)  # checkpoints left undisturbed
        seen: set[Path] = set()

        def writing(skipped: int = skipped, seen: set[Path] = seen) -> bool:
            seen.update(out.glob("*/checkpoints/*.unfinished"))
            return len(seen) > skipped

        if not wait_for(process, writing):
            return hit, finish(process)
        time.sleep(draw.uniform(0.0, 0.06))
        end(process, signal.SIGKILL)
        process.wait()
        hit += 1
    return hit, finish(start(out))


def stopped(
    start: Start, out: Path, number: int, stops: int, first: float, last: float, draw: random.Random
) -> tuple[float, bool]:
    """Stop by a signal at random moments; return the longest time to a clean exit, and whether the run survived."""
    slowest = 0.0
    for _ in range(stops):
        launched, process = time.time(), start(out)

        def begins(launched: float = launched) -> bool:  # before that a run exits at once and loses nothing
            return any(path.stat().st_mtime > launched for path in out.glob("*/metrics.jsonl"))

        wait_for(process, begins)
        time.sleep(draw.uniform(first, last))
        begun = time.monotonic()
        end(process, number)
        in_order = finish(process, -number)
        slowest = max(slowest, time.monotonic() - begun)
        if any(out.glob("*/finished")):  # too late to stop it
            return slowest, in_order or process.wait(MOST_SECONDS) == 0
        if not in_order or not any(out.glob("*/resume-me")):
            return slowest, False
    return slowest, finish(start(out))


def workers_of(process: subprocess.Popen) -> list[int]:
    """Return the ids of torchrun's worker processes."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            words = (path.parent / "cmdline").read_bytes().split(b"\0")
        except (OSError, IndexError):
            continue
        if parent == process.pid and str(ROOT / "train.py").encode() in words:
            found.append(int(path.parent.name))
    return sorted(found)


def torchrun(processes: int, restarts: int = 0) -> list[str]:
    """Return the command that starts train.py on several processes of this machine."""
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*words, "--max-restarts", str(restarts), "--monitor-interval", "0.1"]


def worker_killed(
    out: Path, moments: Sequence[Callable[[], bool]], draw: random.Random, processes: int = 2,
    overrides: Sequence[str] = SMALL,
) -> bool:  # fmt: skip
    """Kill one worker at each moment of a launch; torchrun restarts the workers, which resume the run."""
    process = launch(out, overrides, resume=False, starter=torchrun(processes, len(moments)))
    for moment in moments:
        if wait_for(process, moment):
            os.kill(draw.choice(workers_of(process)), signal.SIGKILL)
            time.sleep(2.0)  # until torchrun has noticed
    return finish(process)


# ---------------------------------------------------------------------------------------------------------- main


def step_reached(out: Path, step: int) -> Callable[[], bool]:
    """Whether a run's metrics contain a step."""
    return lambda: any(f'"step": {step},' in path.read_text(errors="replace") for path in out.glob("*/metrics.jsonl"))


def interrupt(out: Path, kills: int, kinds: Sequence[str], seed: int, forked: bool) -> list[dict]:
    """Try every kind and compare with the uninterrupted run; return a row of the table for each attempt."""
    rows: list[dict] = []
    start = partial(launch, forked=forked)
    if forked:
        import train  # noqa: F401  before the clock runs
    begun = time.monotonic()
    first = start(out / "whole", resume=False)
    wait_for(first, lambda: any((out / "whole").glob("*/metrics.jsonl")))
    ready = time.monotonic() - begun
    if not finish(first):
        sys.exit(f"the uninterrupted run failed: see {out / 'whole.log'}")
    seconds = time.monotonic() - begun
    print(f"uninterrupted: {seconds:.0f} s, the first {ready:.0f} of them before training", flush=True)

    def record(kind: str, tried: int, survived: bool, where: Path, expected: Path, **more: object) -> None:
        equal = survived and same(where / "small", expected / "small")
        rows.append({"kind": kind, "tried": tried, "survived": tried * survived, "equal": tried * equal, **more})
        print(f"{kind}: {rows[-1]}", flush=True)

    draw = random.Random(seed)
    whole, early, late = out / "whole", 0.5 * ready, ready + 0.5 * (seconds - ready)
    if "kill" in kinds:
        done = 0
        for number in count():
            where = out / f"kill-{number}"
            tried, survived = killed(start, where, min(7, kills - done), early, late, draw)
            record("SIGKILL, random moment", tried, survived, where, whole)
            done += tried
            if done >= kills or not survived:
                break
    if "saving" in kinds:
        tried, survived = killed_while_saving(start, out / "saving", 5, draw)
        record("SIGKILL while a checkpoint is written", tried, survived, out / "saving", whole)
    if "stop" in kinds:
        for name in ("SIGTERM", "SIGINT", "SIGHUP"):
            where = out / name
            slowest, survived = stopped(start, where, getattr(signal, name), 3, 0.0, 0.5 * (seconds - ready), draw)
            record(name, 3, survived, where, whole, slowest_seconds=round(slowest, 1))
    if "damage" in kinds:
        for name, harm in {
            "a bit of the newest checkpoint flipped": flip_a_byte,
            "a metrics line cut": cut_a_line,
        }.items():
            where = out / name.split()[-1]
            tried, survived = killed(start, where, 3, ready + 0.3 * (seconds - ready), late, draw, [harm])
            record(f"SIGKILL, then {name}", tried, survived, where, whole)
    if "worker" in kinds:
        two, where = out / "whole-2", out / "worker"
        if not finish(launch(two, resume=False, starter=torchrun(2))):
            sys.exit(f"the uninterrupted run of two processes failed: see {out / 'whole-2.log'}")
        # before the first checkpoint, in fine-tuning, in RL
        moments = [lambda: any(where.glob("*/recipe.toml")), step_reached(where, 40), step_reached(where, 152)]
        survived = worker_killed(where, moments, draw)
        record("SIGKILL of one of two workers, torchrun --max-restarts 3", len(moments), survived, where, two)
    return rows


def table(rows: Sequence[dict]) -> str:
    """Return a Markdown table with one line per kind."""
    lines = ["| kind | tried | survived | equal, bit for bit |", "|---|---|---|---|"]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        of_kind = [row for row in rows if row["kind"] == kind]
        slowest = max((row.get("slowest_seconds", 0) for row in of_kind), default=0)
        sums = [str(sum(row[key] for row in of_kind)) for key in ("tried", "survived", "equal")]
        lines.append(f"| {kind}{f' (at most {slowest} s to the end)' if slowest else ''} | {' | '.join(sums)} |")
    return "\n".join(lines)


def saving() -> None:
    """Print the seconds to save and check a checkpoint, and of a step of the same model, for two sizes."""
    import torch

    from engine import distributed
    from engine.batches import TrainingSequence
    from engine.checkpoint import RunState, damage, load_weights_and_optimizer, save_checkpoint
    from engine.sharding import shard
    from grpo import optimizer_step, supervised_loss
    from model import Transformer, initialise, parse_config

    processes, tokens = distributed.start(), torch.arange(512).numpy().astype("int32")
    print("| parameters | checkpoint, MB | a step of 4,096 tokens, s | saving, s | checking, s | loading, s |")
    print("|---|---|---|---|---|---|")
    for hidden, layers in ((128, 4), (512, 8)):
        source = {
            "model_type": "qwen3", "vocab_size": 4096, "hidden_size": hidden, "intermediate_size": 3 * hidden,
            "num_hidden_layers": layers, "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 128,
            "head_dim": 64, "max_position_embeddings": 1024,
        }  # fmt: skip
        model = Transformer(parse_config(source))
        initialise(model, 0)
        shard(model, processes.mesh, processes.compute_dtype)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        batch = [TrainingSequence(tokens, 1)] * 8

        def seconds(work: Callable[[], object], times: int = 3) -> float:
            taken = []
            for _ in range(times):
                begun = time.perf_counter()
                work()
                taken.append(time.perf_counter() - begun)
            return sorted(taken)[len(taken) // 2]

        with tempfile.TemporaryDirectory() as folder:
            run, state = Path(folder), RunState()

            def save(run: Path = run, state: RunState = state, of: tuple = (model, optimizer)) -> None:
                state.step += 1
                save_checkpoint(run, *of, state, processes, 1)

            step = seconds(lambda of=(model, optimizer), batch=batch: optimizer_step(*of, batch, supervised_loss, 4096))
            saved = seconds(save)
            where = run / "checkpoints" / f"step-{state.step}"
            size = sum(path.stat().st_size for path in where.iterdir())
            checked = seconds(lambda where=where: damage(where))
            loaded = seconds(
                lambda where=where, of=(model, optimizer): load_weights_and_optimizer(where, *of, processes), times=1
            )
        count = sum(parameter.numel() for parameter in model.parameters())
        print(
            f"| {count:,} | {size / 1e6:,.1f} | {step:.2f} | {saved:.2f} | {checked:.3f} | {loaded:.2f} |", flush=True
        )
    distributed.stop()


def main() -> None:
    """Interrupt runs, or time checkpoints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a new folder for the runs (default: a temporary folder)")
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs at random moments")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--forked", action="store_true", help="fork runs from this process, with imports done")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--saving", action="store_true", help="time checkpoints instead")
    parser.add_argument("--same", nargs=2, type=Path, metavar=("A", "B"), help="compare two finished runs instead")
    arguments = parser.parse_args()
    if arguments.same:
        equal = same(*arguments.same)
        print(f"{' and '.join(map(str, arguments.same))}: {'equal, bit for bit' if equal else 'different'}")
        sys.exit(not equal)
    if arguments.saving:
        saving()
        return
    with tempfile.TemporaryDirectory() as scratch:
        out = arguments.out or Path(scratch) / "runs"
        out.mkdir(parents=True)
        rows = interrupt(out, arguments.kills, arguments.only, arguments.seed, arguments.forked)
    print(table(rows))
    print(json.dumps(rows))
    sys.exit(any(row["equal"] < row["tried"] for row in rows))


if __name__ == "__main__":
    main()
