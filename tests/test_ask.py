"""ask.py: one answer as it is sampled, several with their majority, question after question."""

import io
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ask
from lab.command import run_command
from lab.options import question_arguments
from rollout import Rollout


@pytest.fixture
def talk(small_world, monkeypatch):
    """Run ask.py as a user calls it, in this process, with lines of input."""

    def run(*words, lines=""):
        monkeypatch.setattr(sys, "argv", ["ask.py", str(small_world / "model"), *map(str, words)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
        run_command("ask.py", ask.command, question_arguments(None))

    return run


@pytest.fixture
def says(small_world, monkeypatch):
    """Make the sampler give these texts, one token per decode where it is watched."""

    def set_texts(*texts, between=lambda: None):
        tokenizer = AutoTokenizer.from_pretrained(small_world / "model")

        def generate(model, prompts, sampling, limits, live):
            for i, text in enumerate(texts):
                tokens = np.array([*tokenizer(text, add_special_tokens=False).input_ids, 0])
                for end in range(1 if live else len(tokens), len(tokens) + 1):
                    reason = "stop" if end == len(tokens) else ""
                    yield Rollout("q", i, np.array([1]), tokens[:end], np.zeros(end), reason, 1.0)
                    between()

        monkeypatch.setattr(ask, "generate", generate)

    return set_texts


def test_a_greedy_answer_is_the_one_of_transformers(talk, small_world, capsys):
    talk("4 + 8 - 6", "--temperature", 0, "--max-tokens", 12, "--instruction", "", "--show-thinking")
    printed = capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(small_world / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(small_world / "model")
    # the world's numbers have a space before them
    prompt = tokenizer("<|user|> 4 + 8 - 6<|end|><|assistant|><think>", return_tensors="pt").input_ids
    with torch.no_grad():
        found = model.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
    text = tokenizer.decode(found, skip_special_tokens=True)
    assert printed.startswith(text.lstrip()) and f", {len(found)} tokens" in printed and len(text) > 5


def test_one_answer_is_shown_as_it_is_sampled_with_its_thinking_folded(talk, says, capsys):
    seen = []
    says(" 4 + 8 = 12</think> It is \\boxed{12}", between=lambda: seen.append(capsys.readouterr()))
    talk("4 + 8", "--answer", 12)
    shown = ["".join(part.out for part in seen[:count]) for count in range(len(seen) + 1)]
    assert shown[6] == "" and all(later.startswith(earlier) for earlier, later in zip(shown, shown[1:], strict=False))
    assert len({len(text) for text in shown}) > 5  # it grows by tokens
    assert shown[-1].splitlines() == ["It is \\boxed{12}", "answer: 12 (right), 16 tokens"]
    assert "thinking: 5 words" in "".join(part.err for part in seen)
    assert "= 12" not in shown[-1]
    talk("4 + 8", "--show-thinking")
    assert "4 + 8 = 12</think> It is" in "".join(part.out for part in seen)


def test_equal_values_are_one_vote_and_a_tie_names_both(talk, says, capsys):
    says(*(f"</think> \\boxed{{{box}}}" for box in ("3", "1/2", "0.5")), "</think> none")
    talk("half of 1", "-n", 4, "--answer", "0.5")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("answer 1 of 4: 3 (wrong), ") and lines[-2].startswith("answer 4 of 4: no box (no answer)")
    assert lines[-1] == "majority: 0.5 (right), 2 of 4"
    says("</think> \\boxed{3}", "</think> \\boxed{4}")
    talk("7 / 2", "-n", 2)
    assert capsys.readouterr().out.splitlines()[-1] == "majority: 3 and 4, 1 of 2"


def test_ctrl_c_stops_the_answer_and_not_the_program(talk, says, capsys):
    presses = iter([None, KeyboardInterrupt])

    def press():
        if key := next(presses, None):
            raise key

    says(" 1 + 1</think> \\boxed{2}", between=press)
    talk(lines="first\n\nsecond\n")
    printed = capsys.readouterr()
    assert "\nstopped" in printed.err and printed.out.count("answer: 2") == 1
    presses = iter([KeyboardInterrupt])
    with pytest.raises(SystemExit, match="130"):
        talk("the only question")


def test_a_question_that_cannot_be_asked_is_one_sentence_and_the_next_is_answered(talk, capsys):
    options = "--max-tokens", 10, "--instruction", "", "--thinking", "false"
    talk(*options, lines=f"{'1 + ' * 60}1\n4 + 8\n")
    printed = capsys.readouterr()
    assert "ask.py: problem question 1: prompt of 125 tokens + 10 new exceeds the model's window" in printed.err
    assert printed.out.count("answer: ") == 1
