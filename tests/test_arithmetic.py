"""lab/arithmetic.py: answers are right, sets share no sum, the tokenizer is lossless, transformers loads the model."""

import json
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import model as models
from engine.tokenizer import encode, load_tokenizer, read_chat, stop_tokens
from lab import arithmetic
from lab.arithmetic import FILLER, World, make_problems, make_terms, make_tokenizer, solve, write_sum, write_world
from lab.data_files import DataError
from lab.problems import read_problems
from reward import last_boxed, step_reward

SETS = ("train", "held-out", "beyond-window", "sft")
SMALL = World(
    sft_problems=3000, train_problems=200, held_out_problems=80, beyond_problems=60, hidden_size=64, layers=2,
    trained_tokens=72, beyond_tokens=(50, 60), window=128,
)  # fmt: skip


def expression(text):
    """Return the sum after the filler."""
    return text.replace(FILLER, "").strip()


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worlds") / "world"
    write_world(SMALL, folder)
    return folder


@pytest.fixture(scope="module")
def sets(world):
    return {name: read_problems(world / f"{name}.jsonl") for name in SETS}


# ----------------------------------------------------------------------------------------------- problems


def test_the_sets_have_their_sizes_and_cycle_through_the_terms(sets):
    assert [len(sets[name]) for name in SETS] == [200, 80, 60, 3000]
    j_shape = [3, 4, 5, 4, 3, 6, 4, 3, 7, 4, 3, 4, 5, 3, 4, 6, 3, 4, 7, 8]  # mostly easy, some beyond fine-tuning
    terms = {"train": j_shape, "held-out": [3, 4, 5, 6, 7], "beyond-window": [3, 4, 5, 6], "sft": [2, 3, 4, 5, 6]}
    for name, cycle in terms.items():
        sizes = [len(expression(problem.text).split()) // 2 + 1 for problem in sets[name]]
        assert sizes == (cycle * len(sizes))[: len(sizes)]
        assert [problem.type for problem in sets[name]] == [f"{size} terms" for size in sizes]
        assert [problem.id for problem in sets[name]] == [f"{name}/{i}" for i in range(len(sizes))]


def test_every_answer_is_the_sum_of_its_problem(sets):
    for problems in sets.values():
        for problem in problems:
            assert re.fullmatch(r"[1-9]( [+-] [1-9])+", expression(problem.text))
            assert problem.answers == (str(eval(expression(problem.text))),)


def test_running_sums_stay_between_0_and_19():
    random = np.random.default_rng(0)
    seen = set()
    for count in range(1, 12):
        for _ in range(200):
            terms = make_terms(random, count)
            assert len(terms) == count and terms[0] > 0 and all(1 <= abs(term) <= 9 for term in terms)
            seen |= set(np.cumsum(terms).tolist())
    assert seen == set(range(20))  # within the bounds, and up to both of them


def test_a_sum_and_its_solution():
    assert write_sum([7, 5, -3]) == " 7 + 5 - 3"
    assert solve([7, 5, -3], np.random.default_rng(0), 0.0) == " 7 + 5 = 12 ; 12 - 3 = 9</think> \\boxed{9}"


def test_a_solution_without_noise_is_right_in_every_step(sets):
    for name in set(SETS) - {"sft"}:
        for problem in sets[name]:
            assert step_reward(problem.solution) == 1.0
            assert (last_boxed(problem.solution, thinking=True),) == problem.answers
            assert problem.solution.count("=") == int(problem.type.split()[0]) - 1


def test_noise_makes_its_share_of_steps_wrong_and_later_steps_continue_from_them(sets):
    wrong, steps = Counter(), Counter()
    for problem in sets["sft"]:
        written = re.findall(r"(-?\d+) ([+-]) (\d+) = (-?\d+)", problem.solution)
        signed = re.findall(r"[+-]? ?\d", expression(problem.text))
        start = int(signed[0])
        assert len(written) == len(signed) - 1
        for (left, sign, right, result), term in zip(written, signed[1:], strict=True):
            assert int(left) == start and f"{sign} {right}" == term
            steps[len(signed)] += 1
            wrong[len(signed)] += eval(f"{left} {sign} {right}") != int(result)
            start = int(result)
        assert last_boxed(problem.solution, thinking=True) == str(start)
    assert steps.total() > 8000
    for terms, share in {2: 0.003, 3: 0.003, 4: 0.0075, 5: 0.075, 6: 0.2}.items():  # careless with long sums only
        assert abs(wrong[terms] / steps[terms] - share) < 4 * (share * (1 - share) / steps[terms]) ** 0.5


def test_no_sum_of_one_set_is_in_another(sets):
    """Guards: problems beyond the window were drawn after those of fine-tuning and shared most of their sums."""
    sums = {name: [expression(problem.text) for problem in problems] for name, problems in sets.items()}
    for name in set(SETS) - {"sft"}:
        assert len(set(sums[name])) == len(sums[name])
        for other in set(SETS) - {name}:
            assert not set(sums[name]) & set(sums[other]), (name, other)


def test_filler_precedes_its_share_of_problems(sets):
    for name in ("train", "held-out", "sft"):
        filler = [problem.text.count(FILLER) for problem in sets[name]]
        share, error = SMALL.filler_share, (SMALL.filler_share * (1 - SMALL.filler_share) / len(filler)) ** 0.5
        assert abs(np.mean([count > 0 for count in filler]) - share) < 4 * error
    beyond = [problem.text.count(FILLER) for problem in sets["beyond-window"]]
    assert (min(beyond), max(beyond)) == SMALL.beyond_tokens


def test_filler_moves_the_end_of_solved_problems_up_to_the_trained_window(sets):
    """Guards: training ended near 100 of 128 tokens, so that late positions inside the window were hardly trained."""
    chat = read_chat(make_tokenizer())
    for name in ("train", "held-out", "sft"):
        ends = [
            len(chat.prompt([{"role": "user", "content": p.text}])) + len(encode(chat.tokenizer, p.solution)) + 1
            for p in sets[name]
            if " = -" not in p.solution  # a wrong step below 0 has a token more
        ]
        assert SMALL.trained_tokens * 0.95 < max(ends) <= SMALL.trained_tokens
        moved = [end for end in ends if end > 65]  # no sum of up to 8 terms ends there by itself
        assert max(np.diff(sorted(moved))) <= (1 if name == "sft" else 4)


def test_fine_tuning_solutions_without_noise(tmp_path):
    """Guards: the sums of two terms ran out, and write_world never ended."""
    write_world(replace(SMALL, sft_problems=600, sft_noise=(0.0,)), tmp_path / "world")
    assert all(step_reward(problem.solution) == 1.0 for problem in read_problems(tmp_path / "world/sft.jsonl"))


def test_more_problems_than_there_are_sums_are_refused():
    """Guards: the search for another sum never ended."""
    with pytest.raises(DataError, match="train"):
        make_problems("train", 200, (2,), SMALL, set())


# -------------------------------------------------------------------------------------------------- seeds


def test_a_seed_fixes_every_byte_and_another_changes_every_file(world, tmp_path):
    write_world(SMALL, tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(world)
    write_world(replace(SMALL, seed=1), tmp_path / "other")
    one, other = files_of(world), files_of(tmp_path / "other")
    for name in (*(f"{name}.jsonl" for name in SETS), "model/model.safetensors"):
        assert one[name] != other[name], name


# ---------------------------------------------------------------------------------------------- tokenizer


@pytest.fixture(scope="module", params=["made", "loaded"])
def tokenizer(request, world):
    return make_tokenizer() if request.param == "made" else AutoTokenizer.from_pretrained(world / "model")


def test_every_problem_and_solution_survives_the_tokenizer(tokenizer, sets):
    for problems in sets.values():
        for text in [text for problem in problems for text in (problem.text, problem.solution)]:
            tokens = tokenizer(text, add_special_tokens=False).input_ids
            assert tokenizer.decode(tokens) == tokenizer.decode(tokens, skip_special_tokens=True) == text
            assert tokenizer.unk_token_id not in tokens


def test_one_token_per_number_and_sign(tokenizer):
    text = " . 7 + 5 = 12 ; 12 - 3 = 9</think> \\boxed{9}"
    words = " .| 7| +| 5| =| 12| ;| 12| -| 3| =| 9|</think>| \\boxed{|9|}".split("|")
    assert [tokenizer.decode(token) for token in tokenizer(text, add_special_tokens=False).input_ids] == words


def test_any_ascii_text_survives_the_tokenizer(tokenizer):
    text = "".join(map(chr, range(32, 127))) + "\n 100 007 x<9 <think>a</think>"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_eos_is_the_padding_token(tokenizer):
    assert tokenizer.eos_token == tokenizer.pad_token == "<|end|>"
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0


def test_the_closing_tag_is_one_token_that_decoding_keeps(tokenizer):
    tokens = tokenizer(" 9</think> \\boxed{9}<|end|>", add_special_tokens=False).input_ids
    assert tokens.count(tokenizer.convert_tokens_to_ids("</think>")) == 1
    assert tokenizer.decode(tokens, skip_special_tokens=True) == " 9</think> \\boxed{9}"


def test_the_chat_template_opens_the_thinking_block(tokenizer):
    tokens = read_chat(tokenizer).prompt([{"role": "user", "content": " 7 + 5"}])
    assert tokenizer.decode(tokens) == "<|user|> 7 + 5<|end|><|assistant|><think>"
    messages = [{"role": "user", "content": " 7 + 5"}, {"role": "assistant", "content": " 7 + 5 = 12</think>"}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole == "<|user|> 7 + 5<|end|><|assistant|><think> 7 + 5 = 12</think><|end|>"


# -------------------------------------------------------------------------------------------------- model


def test_transformers_loads_the_model(world):
    ours = models.load(world / "model")
    theirs = AutoModelForCausalLM.from_pretrained(world / "model").eval()
    tokens = torch.tensor([1, 20, 70, 30, 0, 2, 3])
    with torch.no_grad():
        logits = ours.logits(ours.hidden(tokens, models.Packed([7])))
        torch.testing.assert_close(logits, theirs(tokens[None]).logits[0], rtol=1e-4, atol=1e-5)
    assert theirs.config.max_position_embeddings == SMALL.window
    assert (theirs.config.hidden_size, theirs.config.num_hidden_layers) == (64, 2)
    assert theirs.config.vocab_size == len(make_tokenizer())


def test_tokenizer_and_model_agree_on_where_a_response_ends(world):
    model = models.load(world / "model")
    assert stop_tokens(read_chat(load_tokenizer(world / "model", model)), model, world / "model") == (0,)


def test_the_command_line_writes_a_world_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(arithmetic, "World", lambda seed: replace(SMALL, sft_problems=10, seed=seed))
    monkeypatch.setattr("sys.argv", ["arithmetic.py", str(tmp_path / "out"), "--seed", "5"])
    arithmetic.main()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*(f"{n}.jsonl" for n in SETS), "model", "tokenizer"}
    assert json.loads((tmp_path / "out/model/config.json").read_text())["model_type"] == "qwen3"
    with pytest.raises(SystemExit, match="exists already; give another name"):
        arithmetic.main()
