"""The recipes for one card of 24 GB: every key takes effect, their data is read, a Base model's template works."""

import json
import signal
import sys
import tomllib
from dataclasses import is_dataclass
from pathlib import Path

import pytest
from conftest import tiny_reference
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import engine.grader
import lab.recipe
import train
from engine.rollout_worker import RolloutWorker
from engine.tokenizer import end_of_turn, load_tokenizer, read_chat, stop_tokens
from lab.options import training_arguments
from lab.problems import INSTRUCTION, read_problems
from model import load

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["first-hour-24gb", "overnight-24gb", "own-data-24gb", "countdown-24gb"]
# what Qwen3's template writes for a user's message, and its switch for an empty thinking block
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
QUICK = {
    "stage.0.steps": 2, "eval.every_steps": 1, "stage.0.max_response_tokens": 6, "eval.max_response_tokens": 5,
    "search.problems": 1,
}  # fmt: skip
COPY = "What is $6 - 5$?"


@pytest.fixture(scope="module")
def base_model(tmp_path_factory):
    """A tiny Qwen3 with a token per byte, and the special tokens and template of a Qwen3 Base model."""
    folder = tmp_path_factory.mktemp("models") / "qwen3-base"
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=special[1:],
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    sizes = {"vocab_size": len(words), "max_position_embeddings": 32_768, "eos_token_id": 0}
    tiny_reference("qwen3", **sizes).save_pretrained(folder)
    return folder


def write_rows(path, rows):
    """Write JSON lines."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def train_file(folder, name):
    """Write 33 training problems with the columns of the recipe's data; one is the benchmark's."""
    texts = [COPY, *(f"What is ${i + 1} - {i}$?" for i in range(10, 42))]
    if name in ("own-data-24gb", "countdown-24gb"):
        rest = {"numbers": [4, 3], "target": 1} if name == "countdown-24gb" else {"answer": "1"}
        return write_rows(folder / "my-problems.jsonl", [{"problem": text} | rest for text in texts])
    columns = {"level": "Level 2", "type": "Algebra", "solution": r"It is $\boxed{1}$.", "answer": "1"}
    rows = [{"problem": text} | columns | {"unique_id": i} for i, text in enumerate(texts)]
    return write_rows(folder / "math_full_minus_math500.jsonl", rows)


def held_out_file(folder, name):
    """Write two held-out problems with the columns of the recipe's data."""
    texts = ["What is $4 - 3$?", COPY]
    if name in ("own-data-24gb", "countdown-24gb"):
        rest = {"numbers": [4, 3], "target": 1} if name == "countdown-24gb" else {"answer": "1"}
        return write_rows(folder / "my-held-out.jsonl", [{"problem": text} | rest for text in texts])
    columns = {"solution": r"It is $\boxed{1}$.", "answer": "1", "subject": "Algebra", "level": 2}
    rows = [{"problem": text} | columns | {"unique_id": f"test/algebra/{i}.json"} for i, text in enumerate(texts)]
    return write_rows(folder / "test.jsonl", rows)


def leaves(table, prefix=""):
    """Yield (dotted key, value) of parsed TOML, stages numbered."""
    for key, value in table.items():
        if key == "stage":
            for i, stage in enumerate(value):
                yield from leaves(stage, f"stage.{i}.")
        elif isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def record_reads(monkeypatch):
    """Return the set of (class, key) of settings that code outside lab/recipe.py will have read."""
    reads = set()
    for kind in vars(lab.recipe).values():
        if is_dataclass(kind):

            def read(self, name, kind=kind):
                if sys._getframe(1).f_globals["__name__"] not in ("lab.recipe", "dataclasses"):  # it writes all of them
                    reads.add((kind, name))
                return object.__getattribute__(self, name)

            monkeypatch.setattr(kind, "__getattribute__", read)
    return reads


def run(recipe, folder, overrides, monkeypatch):
    """Run train.py in this process."""
    words = [word for key, value in overrides.items() for word in ("--set", f"{key}={value}")]
    monkeypatch.setattr(sys, "argv", ["train.py", str(recipe), "--out", str(folder), *words])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        train.main(training_arguments(None))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("name", NAMES)
def test_every_key_of_a_recipe_takes_effect(name, base_model, tmp_path, monkeypatch):
    path, prompts, thinking = ROOT / "recipes" / f"{name}.toml", set(), set()
    written = dict(leaves(tomllib.loads(path.read_text())))
    data = {"model": base_model, "stage.0.data": train_file(tmp_path, name), "eval.data": held_out_file(tmp_path, name)}
    if "reward.function" in written:  # the recipe's own needs a model that knows something
        (tmp_path / "mine.py").write_text("def score(text, row): return row['target'] * len(text) % 2\n")
        data["reward.function"] = tmp_path / "mine.py:score"
    ask, reads = RolloutWorker.prompt, record_reads(monkeypatch)

    def asked(self, *arguments):
        prompt = ask(self, *arguments)
        prompts.add(self.chat.tokenizer.decode(prompt.tokens))
        return prompt

    def boxed(text, is_thinking):  # half of the responses of a model that knows nothing are right
        thinking.add(is_thinking)
        return str(1 + len(text) % 2)

    monkeypatch.setattr(RolloutWorker, "prompt", asked)
    monkeypatch.setattr(engine.grader, "last_boxed", boxed)
    run(path, tmp_path, QUICK | data, monkeypatch)

    folder = tmp_path / name
    assert (folder / "finished").exists()
    expected = written | QUICK | {key: str(value) for key, value in data.items()}
    used = dict(leaves(tomllib.loads((folder / "recipe.toml").read_text())))
    assert {key: used[key] for key in expected} == expected
    tables = {"stage.0": lab.recipe.RlStage, "": lab.recipe.Recipe, "eval": lab.recipe.EvalSettings}
    tables |= {"lora": lab.recipe.LoraSettings, "guard": lab.recipe.GuardSettings, "run": lab.recipe.RunSettings}
    tables |= {"sampler": lab.recipe.SamplerSettings, "reward": lab.recipe.RewardSettings}
    assert not [key for key in written if (tables[key.rpartition(".")[0]], key.rpartition(".")[2]) not in reads]

    # the data: 33 problems, of which one is the benchmark's and left out
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    guard = next(row for row in rows if row["kind"] == "guard")
    copy = next(p.id for p in read_problems(data["stage.0.data"], rewarded=True) if p.text == COPY)
    assert (guard["rows"], guard["excluded_ids"]) == (33, [copy])
    user = f"<|im_start|>user\n{COPY} {INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert len(prompts) == 34 and user in prompts and thinking <= {False}

    # two steps, with an evaluation before, within and after
    steps, evaluations = ([row for row in rows if row["kind"] == kind] for kind in ("rl", "eval"))
    assert [(row["groups"], row["lr"], row["temperature"], row["max_response_tokens"]) for row in steps] == [
        (written["stage.0.batch_problems"], written["stage.0.learning_rate"], written["stage.0.temperature"], 6)
    ] * 2
    assert all(row["grad_norm"] > 0 and row["micro_batch_tokens"] == written["micro_batch_tokens"] for row in steps)
    assert [(row["step"], row["n"], row["problems"], row["temperature"]) for row in evaluations] == [
        (step, written["eval.samples"], 2, written["eval.temperature"]) for step in (0, 1, 2)
    ]
    adapter = folder / "stage-0" / "adapter_config.json"
    assert adapter.exists() == ("lora.rank" in written)
    if adapter.exists():
        assert json.loads(adapter.read_text())["r"] == written["lora.rank"]


def test_a_base_models_response_ends_where_its_template_ends_a_turn(base_model):
    """Regression: the tokenizer and the config name <|endoftext|> alone, so that responses ran on to their limit."""
    model = load(base_model)
    tokenizer = load_tokenizer(base_model, model)
    assert stop_tokens(read_chat(tokenizer), model, base_model) == (0, 2)
    assert tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer)) == "<|im_end|>"
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert end_of_turn(tokenizer) == tokenizer.eos_token_id
    tokenizer.chat_template = "<|im_start|>{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    assert end_of_turn(tokenizer) == tokenizer.eos_token_id
    tokenizer.chat_template = "{{ raise_exception('prompts alone') }}"
    assert end_of_turn(tokenizer) == tokenizer.eos_token_id
