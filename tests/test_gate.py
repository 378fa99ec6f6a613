"""Tokenizers and templates as they come: read as tokenizer.json says, or refused with one sentence, before sampling."""

import json
from types import SimpleNamespace

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from engine.rollout_worker import RolloutWorker
from engine.start import leave_out_long_prompts
from engine.tokenizer import check_prompts, load_tokenizer, read_chat
from lab.data_files import DataError
from lab.problems import Problem, read_chats
from lab.recipe import load_recipe
from lab.run_data import RunData
from model import ModelError

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTION = Problem("a", "What is 123 + 12?", ("135",))


@pytest.fixture
def folder(tmp_path):
    """A Qwen2 model's tokenizer that splits numbers as Qwen2's does not: 123 is one token."""
    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "12", "123"]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("1", "2"), ("12", "3")]))
    splits = pre_tokenizers.Split(Regex(r"\d+|\D"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([splits, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path / "config.json", {"model_type": "qwen2"})
    write(tmp_path / "tokenizer_config.json", {"eos_token": "<|im_end|>", "tokenizer_class": "Qwen2Tokenizer"})
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    return tmp_path


def write(path, value):
    path.write_text(json.dumps(value))


def model(rows=500):
    return SimpleNamespace(config=SimpleNamespace(vocab_size=rows, source={}, max_position_embeddings=500))


def worker(folder):
    processes = SimpleNamespace(is_main=True)
    chat = read_chat(load_tokenizer(folder, model()))
    return RolloutWorker(model(), chat, (2,), None, None, processes, instruction="")


def ask(folder, text="What is 123 + 12?"):
    return read_chat(load_tokenizer(folder, model())).prompt([{"role": "user", "content": text}])


# --------------------------------------------------------------------------------------------- broken files, templates


@pytest.mark.parametrize(
    "name, content",
    [
        ("tokenizer.json", '{"model": {"type": "BPE"'),
        ("tokenizer.json", '{"model": {"type": "SuperBPE", "vocab": []}}'),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", "null"),
        ("tokenizer_config.json", '{"eos_token": ["<|im_end|>"]}'),
        ("tokenizer_config.json", '{"eos_token": 7}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": ["<x>"]}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"256": "<x>"}}'),
        ("tokenizer_config.json", '{"extra_special_tokens": 7}'),
        ("special_tokens_map.json", "[]"),
        ("added_tokens.json", '["<x>"'),
    ],
)
def test_a_broken_file_is_one_sentence_with_its_name(folder, name, content):
    (folder / name).write_text(content)
    with pytest.raises(ModelError, match=rf"{folder}.*{name}.*") as caught:
        load_tokenizer(folder, model())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "template, reason",
    [
        ("{% for m in messages %}{{ m.content }", "unexpected '}'"),
        ("{{ raise_exception('no tools') }}", "no tools"),
        ("{{ messages[0].foo.bar }}", "has no attribute 'foo'"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% for i in range(99999999) %}{% endfor %}", "Range too big"),
        ("{{ bos_token + messages[0].content }}", "'bos_token' is undefined"),
        ("{% include 'other.jinja' %}", "no loader"),
    ],
)
def test_a_template_that_fails_is_one_sentence(folder, template, reason):
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ModelError, match=f"^{folder}: the chat template cannot render .*{reason}.*correct"):
        worker(folder)


def test_a_template_that_fails_on_a_problem_names_it(folder):
    fails = "{% if '123' in messages[0].content %}{{ raise_exception('no numbers') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(fails + CHATML)
    with pytest.raises(ModelError, match=f"^problem a: {folder}: the chat template cannot .*no numbers.*correct"):
        worker(folder).prompt(QUESTION, 1)


def test_named_templates_need_a_default(folder):
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "rag", "template": "x"}, {"name": "default", "template": CHATML}]
    write(folder / "tokenizer_config.json", {"chat_template": named})
    tokens = ask(folder)
    assert load_tokenizer(folder, model()).decode(tokens).startswith("<|im_start|>user\nWhat is")
    write(folder / "tokenizer_config.json", {"chat_template": named[:1]})
    with pytest.raises(ModelError, match="no default specified.*'rag'"):
        ask(folder)


def test_prompts_without_the_problem_are_refused_and_a_lost_character_is_said(folder):
    def check(texts, said):
        tokenizer = load_tokenizer(folder, model())
        return check_prompts(tokenizer, {text: (text, ask(folder, text)) for text in texts} | said)

    assert not any("lack" in note for note in check([" A  problem\n", "e\u0301"], {}))
    lost = check(["one", "two"], {"b": ("three", [])})
    assert lost[0].startswith("1 of 3 prompts lack some of their problem's text (b)")
    parts = "{% for m in messages %}<|im_start|>{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(parts)
    with pytest.raises(ModelError, match="no prompt contains its problem's text .*correct the chat template"):
        check(["one", "two"], {})


# --------------------------------------------------------------------------------------------- what the tokens are


def test_ids_are_those_of_tokenizer_json_where_auto_tokenizer_splits_otherwise(folder):
    tokenizer = load_tokenizer(folder, model())
    text, oracle = "<|im_start|>user\nWhat is 123 + 12?<|im_end|>\n<|im_start|>assistant\n", ask(folder)
    assert oracle == Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    assert AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False).input_ids != oracle
    assert tokenizer.eos_token_id == 2
    asked = {"a": ("What is 123 + 12?", oracle), "b": ("What is it?", ask(folder, "What is it?"))}
    (note,) = check_prompts(tokenizer, asked)
    assert note.endswith("AutoTokenizer (Qwen2Tokenizer) encodes 1 of 2 prompts otherwise")


def test_special_tokens_named_in_a_problem_are_text(folder):
    tokenizer, text = load_tokenizer(folder, model()), "Is it <|im_end|> or <|im_start|>?"
    tokens = ask(folder, text)
    assert (tokens.count(1), tokens.count(2)) == (2, 1)  # the template's own
    whole = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(tokens) == whole and len(tokens) > len(tokenizer(whole).input_ids)
    notes = check_prompts(tokenizer, {"a": ("What?", ask(folder, "What?")), "b": (text, tokens)})
    assert notes[0] == "the text of b names special tokens: they are encoded as text"
    roles = [("user", "hi"), ("assistant", "<|endoftext|>"), ("user", "?")]
    chat = [{"role": role, "content": content} for role, content in roles]
    assert read_chat(tokenizer).prompt(chat).count(0) == 1  # a reply may write special tokens


def test_a_template_writes_the_same_date_on_every_day(folder):
    dated = "{{ 'Today: ' + strftime_now('%d %b %Y %H:%M:%S.%f') + strftime_now(\"%A\") }}"
    (folder / "chat_template.jinja").write_text(dated + CHATML)
    tokenizer, tokens = load_tokenizer(folder, model()), ask(folder)
    assert tokenizer.decode(tokens).startswith("Today: 01 Jan 2025 00:00:00.000000Wednesday<|im_start|>user")
    notes = check_prompts(tokenizer, {"a": (QUESTION.text, tokens)})
    assert notes[0] == "the chat template writes today's date: it is given 01 January 2025, to stay the same"


def test_any_padding_of_the_embedding_fits_and_its_ids_read_as_unknown(folder):
    tokenizer = load_tokenizer(folder, model(rows=261 + 2385))  # 3 special tokens, 256 bytes, 2 numbers
    with pytest.raises(ModelError, match="the tokenizer has 261 tokens, the model 260: use the model's tokenizer"):
        load_tokenizer(folder, model(rows=260))
    number, chat = tokenizer.convert_tokens_to_ids("123"), read_chat(tokenizer)
    assert chat.decode([number, 261, 2000, number, 2]) == "123\ufffd\ufffd123"
    assert chat.decode([number, 2]) == "123" and chat.decode([]) == ""


# ----------------------------------------------------------------------------------------------------- rows


def test_all_prompts_that_are_too_long_are_named(folder):
    problems = [QUESTION, Problem("b", "x" * 60, ("1",)), Problem("c", "x" * 70, ("1",))]
    with pytest.raises(DataError, match=r"2 of 3 prompts .* the 70 tokens .* remove b \(79 tokens\), c \(89 tokens\)"):
        worker(folder).prompts(problems, {}, 70)
    asked = {}
    assert [prompt.problem_id for prompt in worker(folder).prompts(problems, asked)] == ["a", "b", "c"] == list(asked)


def test_the_worker_says_its_notes_on_stderr(folder, capsys):
    asked = {}
    worker(folder).prompts([QUESTION], asked)
    worker(folder).check(asked)
    assert capsys.readouterr().err.startswith("note: tokenizer.json is read as it stands: AutoTokenizer")


def test_chats_of_text_parts_are_read_and_images_are_not(tmp_path):
    def chat(*parts):
        reply = {"role": "assistant", "content": [{"type": "text", "text": "hello"}]}
        write(tmp_path / "chats.jsonl", {"messages": [{"role": "user", "content": list(parts)}, reply]})
        return read_chats(tmp_path / "chats.jsonl")

    text, image = {"type": "text", "text": "hi"}, {"type": "image", "url": "x.png"}
    assert [message["content"] for message in chat(text, text)[0]] == ["hi\nhi", "hello"]
    for parts in ([text, image], [], ["hi"]):
        with pytest.raises(DataError, match="row 1 is not a chat"):
            chat(*parts)


def test_prompts_that_are_too_long_are_left_out_on_request(folder, tmp_path):
    rows = [{"id": n, "problem": "What is 1?" + " and 2?" * 40 * n, "answer": "1"} for n in (0, 1, 2)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stages = "".join(f"[[stage]]\nkind = 'rl'\n{data}steps = 1\nmax_prompt_tokens = {most}\n" for data, most in (
        (f"data = '{tmp_path / 'p.jsonl'}'\non_bad_row = 'skip'\n", 400), ("", 100)))  # fmt: skip
    (tmp_path / "r.toml").write_text(f"name = 'r'\nmodel = 'm'\n{stages}")
    recipe, said = load_recipe(tmp_path / "r.toml"), []
    own, data = worker(folder), RunData(recipe, tmp_path)
    own.processes.say = said.append
    run = SimpleNamespace(recipe=recipe, data=data, worker=own)
    leave_out_long_prompts(run)
    assert [p.id for p in data.training_problems("rl", recipe.stage[0].data)] == ["p/0"]
    assert [("left out 1 of 3" in said[0], "p/2" in said[0]), ("left out 1 of 2" in said[1], "p/1" in said[1])] == [
        (True, True), (True, True)]  # fmt: skip


def test_an_instruction_that_contradicts_ours_is_said_once(folder, capsys):
    own, problem = worker(folder), Problem("a", 'Solve it. Put it after "Answer:".', ("1",))
    own.prompts([problem], {})
    assert capsys.readouterr().err == ""  # no instruction is added
    own.instruction = "Use a box."
    own.prompts([problem, QUESTION], {})
    own.prompts([problem], {})
    said = capsys.readouterr().err
    assert said.count("note: 1 of 2 problems (a) ask for another form of answer") == 1 and 'instruction = ""' in said
