"""engine/tokenizer.py: how a response begins and ends, by the templates of public models in short.

The oracle is transformers' apply_chat_template, and the text that each template is known to write.
"""

from types import SimpleNamespace

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from engine.start import sft_sequences
from engine.tokenizer import read_chat
from lab.arithmetic import World, make_problems, make_tokenizer
from lab.data_files import DataError
from lab.recipe import SftStage
from model import ModelError

ASK = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
QUESTION = [{"role": "user", "content": "Why?"}]
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
START = "{% if add_generation_prompt %}<|im_start|>assistant\n"
EMPTY = "<think>\n\n</think>\n\n"
# an assistant's turn of Qwen3: the thinking of the last one is kept, an empty block where it has none
QWEN3 = """{%- for m in messages -%}
<|im_start|>{{ m.role }}{{ '\n' }}
{%- if m.role == 'assistant' and loop.last -%}
{%- set parts = m.content.split('</think>') -%}
{%- set thought = parts[0].split('<think>')[-1].strip('\n') if parts|length > 1 else '' -%}
<think>{{ '\n' + thought + '\n' }}</think>{{ '\n\n' + parts[-1].lstrip('\n') }}
{%- else -%}
{{ m.content.split('</think>')[-1] }}
{%- endif -%}
<|im_end|>{{ '\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant{{ '\n' }}%s{%- endif -%}"""
OFF = "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
# the thinking of all turns is dropped, and the prompt opens the next: DeepSeek-R1
R1 = (
    "{% for m in messages %}{% if m.role == 'user' %}<User>{{ m.content }}{% else %}"
    "<Assistant>{{ m.content.split('</think>')[-1] }}<|endoftext|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<Assistant><think>\n{% endif %}"
)
V31 = (
    "{% if not thinking is defined %}{% set thinking = false %}{% endif %}{% for m in messages %}{{ m.content }}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}{{ '<think>' if thinking else '</think>' }}{% endif %}"
)
TEMPLATES = {
    "qwen2": CHATML + START + "{% endif %}",
    "qwen3": QWEN3.replace("%s", OFF),
    "qwen3-thinking": QWEN3.replace("%s", "<think>{{ '\n' }}"),
    "opens, verbatim": CHATML + START + "<think>\n{% endif %}",
    "deepseek-r1": R1,
    "deepseek-v3.1": V31,
    "exaone4": CHATML + START + "{{ '<think>\n' if enable_thinking else '<think>\n\n</think>\n\n' }}{% endif %}",
    "smollm3": "{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}<|im_start|>system\n"
    "{{ '/think' if enable_thinking else '/no_think' }}<|im_end|>\n" + CHATML + START + "{% endif %}",
    "closes": CHATML + START + EMPTY + "{% endif %}",
}


def tokenizer_of(template, tags=""):
    """A token per byte, and the special tokens of ChatML; `tags`: "special" or "added" thinking tags."""
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if tags:
        tokenizer.add_tokens([AddedToken(tag, special=tags == "special") for tag in ("<think>", "</think>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        additional_special_tokens=words[1:3],
        chat_template=TEMPLATES.get(template, template),
    )


@pytest.mark.parametrize(
    "template, tags, thinking, tag",
    [
        ("qwen2", "", False, ""),
        ("qwen2", "special", True, ""),
        ("qwen2", "added", False, ""),  # Qwen3-Instruct-2507: in the vocabulary, and never written
        ("qwen3", "added", True, ""),
        ("qwen3-thinking", "added", True, "<think>"),
        ("opens, verbatim", "", True, "<think>"),
        ("deepseek-r1", "", True, "<think>"),
        ("deepseek-v3.1", "", False, "</think>"),
        ("exaone4", "", False, "</think>"),
        ("smollm3", "", True, ""),
        ("closes", "", False, "</think>"),
        (CHATML.replace("m.content", "m.content.split('</think>')[-1]"), "", True, ""),
        # Unsloth's for Qwen3-Instruct writes the thinking of a reply as it finds it
        (CHATML.replace("m.content", "m.content.split('</think>') | join('</think>')"), "", False, ""),
        (CHATML.replace("m.content", "m.content.split('</think>') | join('</think>')"), "special", True, ""),
    ],
)
def test_auto_is_what_the_template_does_by_itself(template, tags, thinking, tag):
    tokenizer = tokenizer_of(template, tags)
    chat = read_chat(tokenizer)
    assert (chat.thinking, chat.prompt_tag) == (thinking, tag)
    assert chat.account.startswith(f"thinking = {str(thinking).lower()} (auto): ") and "warning" not in chat.account
    plain = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(chat.prompt(QUESTION)) == plain  # the switch changes nothing


@pytest.mark.parametrize(
    "template, thinking, prompt",
    [
        ("qwen3", True, ASK),
        ("qwen3", False, ASK + EMPTY),
        ("exaone4", True, f"{ASK}<think>\n"),
        ("exaone4", False, ASK + EMPTY),
        ("deepseek-v3.1", True, "Why?<|im_end|><think>"),
        ("deepseek-v3.1", False, "Why?<|im_end|></think>"),
        ("smollm3", False, f"<|im_start|>system\n/no_think<|im_end|>\n{ASK}"),
    ],
)
def test_the_setting_reaches_the_template(template, thinking, prompt):
    """Regression: thinking = false never reached the template, so that Qwen3 thought all the same."""
    tokenizer = tokenizer_of(template)
    chat = read_chat(tokenizer, thinking)
    assert tokenizer.decode(chat.prompt(QUESTION)) == prompt and chat.thinking is thinking
    assert chat.account.startswith(f"thinking = {str(thinking).lower()}: the template has a switch")


@pytest.mark.parametrize(
    "template, tags, thinking, account",
    [
        ("qwen2", "", True, "warning: thinking = true: no template or special token has </think>, and no switch"),
        ("closes", "", True, "warning: thinking = true: the template closes the thinking block in every prompt"),
        ("opens, verbatim", "", False, "warning: thinking = false: the template opens the thinking block in every"),
        ("qwen2", "special", False, "warning: thinking = false: </think> is a special token, and no switch: a box"),
        ("qwen2", "", False, "thinking = false: no template or special token has </think>; <|im_end|> ends a turn"),
    ],
)
def test_a_setting_that_the_template_cannot_do_is_said(template, tags, thinking, account):
    found = read_chat(tokenizer_of(template, tags), thinking).account
    assert found.startswith(account) and found.endswith("; <|im_end|> ends a turn")


THOUGHT = "<think>\nAs 3 + 4 = 7.\n</think>\n\n\\boxed{7}"


@pytest.mark.parametrize(
    "template, thinking, reply, prompt, response",
    [
        ("qwen2", False, "7", ASK, "7<|im_end|>"),
        ("qwen2", True, THOUGHT, ASK, f"{THOUGHT}<|im_end|>"),
        ("qwen3", True, THOUGHT, ASK, f"{THOUGHT}<|im_end|>"),
        ("qwen3", True, "<think>As.</think>7", ASK, "<think>\nAs.\n</think>\n\n7<|im_end|>"),
        ("qwen3", True, "7", ASK, f"{EMPTY}7<|im_end|>"),
        ("qwen3", False, "7", ASK + EMPTY, "7<|im_end|>"),
        ("qwen3-thinking", True, THOUGHT, f"{ASK}<think>\n", f"{THOUGHT[8:]}<|im_end|>"),
        ("qwen3-thinking", True, "7", f"{ASK}<think>\n", "\n</think>\n\n7<|im_end|>"),
        ("opens, verbatim", True, THOUGHT, f"{ASK}<think>\n", f"{THOUGHT[8:]}<|im_end|>"),
        ("opens, verbatim", True, "<think>As.</think>7", f"{ASK}<think>\n", "As.</think>7<|im_end|>"),
        ("opens, verbatim", True, "As.</think>7", f"{ASK}<think>\n", "As.</think>7<|im_end|>"),
        ("opens, verbatim", True, "7", f"{ASK}<think>\n", "\n</think>\n\n7<|im_end|>"),
        # the template drops thinking from turns that are over: the solution itself, or nothing would be learned of it
        ("deepseek-r1", True, THOUGHT, "<User>Why?<Assistant><think>\n", f"{THOUGHT[8:]}<|endoftext|>"),
        ("deepseek-r1", True, "7", "<User>Why?<Assistant><think>\n", "\n</think>\n\n7<|endoftext|>"),
        ("qwen2", False, "I write <|im_end|> here.", ASK, "I write <|im_end|> here.<|im_end|>"),
    ],
)
def test_a_worked_example_is_learned_as_the_template_writes_it(template, thinking, reply, prompt, response):
    """Regression: a template that opens <think> made fine-tuning learn the tag twice."""
    tokenizer = tokenizer_of(template)
    encoded = read_chat(tokenizer, thinking).example(QUESTION, reply)
    assert tuple(map(tokenizer.decode, encoded)) == (prompt, response)
    assert (prompt + response).count("<think>") <= 1
    whole = tokenizer.apply_chat_template(
        [*QUESTION, {"role": "assistant", "content": reply}], tokenize=False, enable_thinking=thinking
    )
    if whole.startswith(prompt) and "</think>" in whole:
        assert prompt + response == whole.rstrip("\n")


def sequences_of(chat, *examples):
    """The sequences that fine-tuning learns from (prompt, reply) pairs, as (all tokens, tokens of the prompt)."""
    data = SimpleNamespace(worked_examples=lambda stage: ((f"row {i}", *pair) for i, pair in enumerate(examples, 1)))
    worker = SimpleNamespace(chat=chat, processes=SimpleNamespace(say=print))
    worker.message = lambda problem: {"role": "user", "content": problem.text}
    sequences = sft_sequences(data, SftStage(data="my.jsonl", steps=1, batch_sequences=1, max_tokens=900), worker, {})
    return [(sequence.tokens.tolist(), sequence.prompt_length) for sequence in sequences]


def test_thinking_after_a_closed_block_is_refused():
    chat, pairs = read_chat(tokenizer_of("qwen3"), False), [(QUESTION, "7"), (QUESTION, THOUGHT)]
    with pytest.raises(DataError, match="^row 2 in my.jsonl thinks, but the prompt has closed its thinking block: "):
        sequences_of(chat, *pairs)
    assert len(sequences_of(chat, *pairs[:1])) == 1


def test_solutions_that_do_not_think_are_counted_where_the_prompt_opens_thinking(capsys):
    sequences_of(read_chat(tokenizer_of("deepseek-r1")), (QUESTION, "7"), (QUESTION, THOUGHT), (QUESTION, "8"))
    sequences_of(read_chat(tokenizer_of("qwen3")), (QUESTION, "7"))
    assert capsys.readouterr().out == "my.jsonl: 2 of 3 solutions do not think: </think> added\n"


def test_the_laptop_world_learns_its_solutions_to_the_letter():
    """Its template opens <think> in the prompt and before every reply, and its solutions close it."""
    tokenizer, problems = make_tokenizer(), make_problems("sft", 20, (2, 3, 4), World(), set())
    found = sequences_of(read_chat(tokenizer), *((problem, problem.solution) for problem in problems))
    texts = [f"<|user|>{p.text}<|end|><|assistant|><think>{p.solution}<|end|>" for p in problems]
    assert [tokens for tokens, _ in found] == [tokenizer(text).input_ids for text in texts]
    assert {tokenizer.decode(tokens[:prompt])[-7:] for tokens, prompt in found} == {"<think>"}


@pytest.mark.parametrize(
    "after, end",
    [
        ("<|im_end|>\n", "<|im_end|>"),
        ("", "<|endoftext|>"),
        ("\n\nUser:", "<|endoftext|>"),
        ("<think></think><|im_end|>", "<|im_end|>"),  # not the first added token, but the special one
        ("</think>\n", "</think>"),  # an added token that is not special, right behind the reply
    ],
)
def test_the_token_that_ends_a_turn_is_what_the_template_writes_after_a_reply(after, end):
    reply = "{{ m.content }}{% if m.role == 'assistant' %}" + after + "{% endif %}"
    tokenizer = tokenizer_of("{% for m in messages %}" + reply + "{% endfor %}", "added")
    chat = read_chat(tokenizer)
    assert tokenizer.convert_ids_to_tokens(chat.end) == end and chat.account.endswith(f"; {end} ends a turn")


@pytest.mark.parametrize("tags", ["", "added", "special"])
def test_the_grader_sees_thinking_tags_and_no_other_special_token(tags):
    """Regression: where the tags are special tokens, no response ever closed its thinking block."""
    tokenizer = tokenizer_of("qwen2", tags)
    text = "<think>so\né</think>\\boxed{7}<|im_end|>"
    tokens = tokenizer(f"<|im_start|>{text}").input_ids
    assert read_chat(tokenizer).decode(tokens) == text.removesuffix("<|im_end|>")
    if tags != "special":
        assert read_chat(tokenizer).decode(tokens) == tokenizer.decode(tokens, skip_special_tokens=True)


def test_a_template_that_cannot_be_rendered_is_one_sentence():
    with pytest.raises(ModelError, match="the chat template cannot render this chat .*no questions"):
        read_chat(tokenizer_of("{{ raise_exception('no questions') }}"))
