"""Try bad inputs: train.py, eval.py and lab/page.py must stop with one sentence and a nonzero exit status.

    python bench/bad_inputs.py                  # about a minute on a CPU, nothing is downloaded
    python bench/bad_inputs.py --only resume

Each command runs as from a shell, in a separate process (a fork, so that imports are done once). A world with a model
of one layer, a few problems and a finished run of one step is made first, and the good recipe must pass. The last
column shows the checks: exit status, no traceback, exactly one sentence, within the time limit.
"""

import argparse
import contextlib
import json
import os
import runpy
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # no input may be looked up on the hub

import torch  # noqa: E402

import eval as evaluation  # noqa: E402, F401
import train  # noqa: E402, F401
from lab import page  # noqa: E402, F401
from lab.arithmetic import World, write_world  # noqa: E402

MOST_SECONDS = 60
RECIPE = """name = "small"
model = "world/model"
instruction = ""
micro_batch_tokens = 300
sampler = { rows = 20, page_tokens = 16, cache_tokens = 4000 }
eval = { data = "world/held-out.jsonl", samples = 1, max_response_tokens = 8 }
[[stage]]
kind = "sft"
data = "world/sft.jsonl"
steps = 1
batch_sequences = 2
[[stage]]
kind = "rl"
data = "world/train.jsonl"
steps = 2
batch_problems = 2
group_size = 2
temperature = 1.0
max_prompt_tokens = 64
max_response_tokens = 8
"""
GOOD = {"problem": " 1 + 1", "answer": "2"}
RL, SFT, EVAL, RESUME = (
    "stage.1.data",
    "stage.0.data",
    "world/model --no-thinking --out e --data",
    "--resume runs/small",
)
EXCLUDE = "--set guard.contamination=exclude"
# the fault and its command; runs/small is a finished run, make_inputs writes the rest
CASES = [
    ("no such recipe", "train.py absent.toml"),
    ("a folder for a recipe", "train.py world"),
    ("a recipe that is not UTF-8", "train.py latin1.toml"),
    ("a recipe that is cut off", "train.py cut.toml"),
    ("a recipe without stages", "train.py no-stages.toml"),
    ("an empty recipe", "train.py empty.toml"),
    ("an unknown key", "train.py small.toml --set stage.1.temprature=1.2"),
    ("an unknown kind of stage", "train.py small.toml --set stage.1.kind=ppo"),
    ("a word for a number", "train.py small.toml --set seed=many"),
    ("a learning rate that is nan", "train.py small.toml --set stage.1.learning_rate=nan"),
    ("an infinite temperature", "train.py small.toml --set stage.1.temperature=inf"),
    ("a number beyond 64 bits", "train.py small.toml --set seed=99999999999999999999"),
    ("beta2 of 1", "train.py small.toml --set stage.1.adam_beta2=1.0"),
    ("a group of 1", "train.py small.toml --set stage.1.group_size=1"),
    ("temperature 0", "train.py small.toml --set stage.1.temperature=0"),
    ("--set without a value", "train.py small.toml --set seed"),
    ("--set of a stage that is not there", "train.py small.toml --set stage.7.steps=1"),
    ("an unknown word for the guard", "train.py small.toml --set guard.duplicates=drop"),
    ("an unknown benchmark", 'train.py small.toml --set guard.benchmarks=["aime2"]'),
    ("a name with a path", "train.py small.toml --set name=../small"),
    ("no such data", f"train.py small.toml --set {RL}=absent.jsonl"),
    ("a model's folder for data", f"train.py small.toml --set {RL}=./world/model"),
    ("data of another kind", f"train.py small.toml --set {RL}=rows.csv"),
    ("a malformed row", f"train.py small.toml --set {RL}=malformed.jsonl"),
    ("a truncated last row", f"train.py small.toml --set {RL}=cut.jsonl"),
    ("a row without an answer", f"train.py small.toml --set {RL}=unanswered.jsonl"),
    ("a row with half a surrogate", f"train.py small.toml --set {RL}=surrogate.jsonl"),
    ("columns of no schema", f"train.py small.toml --set {RL}=columns.jsonl"),
    ("empty data", f"train.py small.toml --set {RL}=empty.jsonl"),
    ("data that is not UTF-8", f"train.py small.toml --set {RL}=latin1.jsonl"),
    ("a broken parquet file", f"train.py small.toml --set {RL}=broken.parquet"),
    ("data of a world that is not made", f"train.py small.toml --set {RL}=world/train.jsonl"),
    ("too few problems for a batch", f"train.py small.toml --set {RL}=one.jsonl"),
    ("held-out data of no sense", "train.py small.toml --set eval.data=columns.jsonl"),
    ("every problem excluded", f"train.py small.toml --set {RL}=./world/held-out.jsonl {EXCLUDE}"),
    ("solutions that are missing", f"train.py small.toml --set {SFT}=good.jsonl"),
    ("a chat that ends with the user", f"train.py small.toml --set {SFT}=chats.jsonl"),
    ("a solution longer than max_tokens", "train.py small.toml --set stage.0.max_tokens=8"),
    ("a prompt longer than its limit", "train.py small.toml --set stage.1.max_prompt_tokens=2"),
    ("responses longer than the window", "train.py small.toml --set stage.1.max_response_tokens=500"),
    ("a cache smaller than one sequence", "train.py small.toml --set sampler.cache_tokens=16"),
    ("no such model", "train.py small.toml --set model=absent"),
    ("a model without a tokenizer", "train.py small.toml --set model=no-tokenizer"),
    ("weights of another width", "train.py small.toml --set model=wrong-width"),
    ("weights that are cut off", "train.py small.toml --set model=cut-weights"),
    ("a config that is no JSON", "train.py small.toml --set model=no-config"),
    ("--out that is a file", "train.py small.toml --out empty.toml"),
    ("--out in a read-only place", "train.py small.toml --out /sys/runs"),
    ("resume of no folder", "train.py --resume absent"),
    ("resume of a folder that is no run", "train.py --resume world"),
    ("resume with an unknown key", f"train.py {RESUME} --set sead=1"),
    ("resume with another model", f"train.py {RESUME} --set model=wide/model"),
    ("resume with other data", f"train.py {RESUME} --set {RL}=good.jsonl"),
    ("resume with broken metrics", "train.py --resume runs/broken-metrics"),
    ("resume where every run.pt is cut", "train.py --resume runs/broken-state"),
    ("resume with a checkpoint's part gone", "train.py --resume runs/broken-part"),
    ("plan of a card of nan", "train.py small.toml --set model=Qwen/Qwen3-4B --plan --device nanGB"),
    ("plan of no cards", "train.py small.toml --set model=Qwen/Qwen3-4B --plan --gpus 0"),
    ("plan of an unknown model", "train.py small.toml --set model=no/such --plan"),
    ("evaluation of no such model", "eval.py absent --data good.jsonl --out e"),
    ("evaluation without data", "eval.py world/model --out e"),
    ("evaluation on no such benchmark", f"eval.py {EVAL} aime2"),
    ("evaluation on a malformed row", f"eval.py {EVAL} malformed.jsonl"),
    ("evaluation beyond the window", f"eval.py {EVAL} good.jsonl --max-tokens 5000"),
    ("evaluation at temperature nan", f"eval.py {EVAL} good.jsonl --max-tokens 8 --temperature nan"),
    ("evaluation of 0 samples", f"eval.py {EVAL} good.jsonl -n 0"),
    ("comparison of no evaluations", "eval.py --compare world wide"),
    ("regrading of no evaluation", "eval.py --regrade world --out e"),
    ("a page of no run", "lab/page.py world"),
    ("a page of broken metrics", "lab/page.py runs/broken-metrics"),
]  # fmt: skip


def make_inputs() -> None:
    """Write the world, the finished run and the broken files into the current folder."""
    sizes = {"sft_problems": 4, "train_problems": 6, "held_out_problems": 3, "beyond_problems": 1, "trained_tokens": 30}
    write_world(World(**sizes, hidden_size=32, layers=1, window=96), Path("world"))
    write_world(World(**sizes, hidden_size=64, layers=1, window=96), Path("wide"))
    small = RECIPE.replace('"world/', f'"{Path.cwd()}/world/')
    write = {
        "small.toml": small, "no-stages.toml": small.partition("[[stage]]")[0], "cut.toml": small[:-40] + '"',
        "empty.toml": "", "rows.csv": "a,b", "malformed.jsonl": json.dumps(GOOD) + '\n{"problem": \n',
        "cut.jsonl": json.dumps(GOOD) + "\n" + json.dumps(GOOD)[:-9],
        "unanswered.jsonl": json.dumps(GOOD | {"answer": None}),
        "surrogate.jsonl": json.dumps(GOOD | {"problem": "1 \ud800"}), "columns.jsonl": '{"prob": "1", "ans": "1"}',
        "empty.jsonl": "", "broken.parquet": "PAR1 and no more", "one.jsonl": json.dumps(GOOD),
        "good.jsonl": "".join(f'{{"problem": " {n} + 1", "answer": "{n + 1}"}}\n' for n in range(6)),
        "chats.jsonl": json.dumps({"messages": [{"role": "user", "content": "1"}]}),
    }  # fmt: skip
    for name, text in write.items():
        Path(name).write_text(text)
    Path("latin1.toml").write_bytes(small.replace("small", "kl\xe9in").encode("latin1"))
    Path("latin1.jsonl").write_bytes(b'{"problem": "1 + \xe9", "answer": "2"}')
    for name in ("no-tokenizer", "wrong-width", "cut-weights", "no-config"):
        copy(Path("world/model"), Path(name))
    for file in Path("no-tokenizer").glob("tokenizer*"):
        file.unlink()
    copy(Path("wide/model/config.json"), Path("wrong-width/config.json"))
    weights = Path("cut-weights/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    Path("no-config/config.json").write_text("{")


def break_runs() -> None:
    """Copy the finished run, and break one thing in each copy."""
    for name in ("broken-metrics", "broken-state", "broken-part"):
        copy(Path("runs/small"), Path("runs") / name)
    broken = Path("runs/broken-metrics/metrics.jsonl")
    broken.write_text("{broken\n" + broken.read_text())
    for state in Path("runs/broken-state/checkpoints").glob("*/run.pt"):  # otherwise an older intact one would be used
        state.write_bytes(state.read_bytes()[:100])
    for part in Path("runs/broken-part/checkpoints").glob("*/*.distcp"):
        part.unlink()


def copy(source: Path, target: Path) -> None:
    """A file or a folder."""
    for path in [source, *sorted(source.rglob("*"))]:
        new = target / path.relative_to(source)
        new.mkdir(parents=True, exist_ok=True) if path.is_dir() else new.write_bytes(path.read_bytes())


def start(script: str, *arguments: str) -> tuple[int, str]:
    """Run a script in a fork of this process; return its exit status (124 on a timeout) and stderr."""
    with tempfile.TemporaryFile("w+", errors="replace") as errors, open(os.devnull, "w") as nothing:
        child = os.fork()
        if child == 0:
            signal.alarm(MOST_SECONDS)  # its default action ends the process
            os.dup2(nothing.fileno(), 1)
            os.dup2(errors.fileno(), 2)
            sys.argv, status = [script, *arguments], 0
            try:
                runpy.run_path(str(ROOT / script), run_name="__main__")
            except SystemExit as stopped:  # as the interpreter does
                status = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
                if isinstance(stopped.code, str):
                    print(stopped.code, file=sys.stderr)
            except BaseException:
                traceback.print_exc()
                status = 1
            with contextlib.suppress(OSError):
                sys.stderr.flush()
            os._exit(status)
        _, ended = os.waitpid(child, 0)
        errors.seek(0)
        return (124 if os.WIFSIGNALED(ended) else os.waitstatus_to_exitcode(ended)), errors.read()


def judge(script: str, status: int, errors: str) -> tuple[str, str]:
    """Return the sentence, and the failed checks or "ok"."""
    program = script.removesuffix(".py").replace("/", ".") if "/" in script else script
    said = [line for line in errors.splitlines() if line.startswith(f"{program}: ")]
    faults = ["exit 0"] * (status == 0) + ["hangs"] * (status == 124) + ["traceback"] * ("Traceback" in errors)
    if len(said) != 1 or errors.rstrip().splitlines()[-1:] != said:
        faults.append("not one sentence")
    sentence = said[-1] if said else (errors.strip().splitlines() or [""])[-1]
    return sentence.replace(f"{Path.cwd()}/", ""), ", ".join(faults) or "ok"


def main() -> None:
    """Try all inputs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="inputs whose description or command contains this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a fork must not wait for threads that it does not have
    begun, failed, tried = time.perf_counter(), [], 0
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        if os.fork() == 0:
            make_inputs()
            os._exit(0)
        os.wait()
        status, errors = start("train.py", "small.toml")
        if status:
            sys.exit(f"bad_inputs.py: the good recipe failed:\n{errors[-2000:]}")
        break_runs()
        print("| input | command | status | what it says | checks |\n|---|---|---|---|---|")
        for name, command in CASES:
            if arguments.only not in f"{name} {command}":
                continue
            script, *words = command.split()
            if script == "train.py" and "--out" not in words and "--resume" not in words:
                words += ["--out", "elsewhere"]
            status, errors = start(script, *words)
            sentence, verdict = judge(script, status, errors)
            cells = [name, f"`{command}`", str(status), sentence.replace("|", "\\|"), verdict]
            print(f"| {' | '.join(cells)} |", flush=True)
            tried += 1
            if verdict != "ok":
                failed.append(name)
                print(errors[-1500:], file=sys.stderr)
    seconds = round(time.perf_counter() - begun)
    print(json.dumps({"tried": tried, "ok": tried - len(failed), "failed": failed, "seconds": seconds}))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
