"""The tokenizer of a model folder, and how its chat template begins and ends a response."""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from itertools import groupby
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from engine.errors import first_names
from engine.huggingface import end_tokens, named, read_optional_json, regular_file
from engine.terminal import note
from model import ModelError, Transformer

TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")  # of a chat template
FIXED_DAY = datetime(2025, 1, 1)  # written for today, so that a run has the same prompts on every day
COMPARED = 1000  # prompts that AutoTokenizer encodes too
THINK, END_THINK = "<think>", "</think>"
QUESTION, REPLY = {"role": "user", "content": "a question"}, {"role": "assistant", "content": "a reply"}


@contextmanager
def explained(what: str, remedy: str) -> Iterator[None]:
    """Raise a ModelError of one sentence for whatever the libraries below, or a template, raise."""
    try:
        yield
    except Exception as error:  # tokenizers raises Exception itself
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise ModelError(f"{what} ({reason[:300].rstrip('.')}): {remedy}") from None


def load_tokenizer(folder: Path, model: Transformer) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder. ModelError if it is broken or does not fit the model.

    The model may have more rows, which pad its embedding: 399 in Qwen2.5, 2,385 in DeepSeek's distilled models.
    """
    tokenizer, rows = read_tokenizer(folder), model.config.vocab_size
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= rows:
        raise ModelError(
            f"{folder}: the tokenizer has {largest + 1} tokens, the model {rows}: use the model's tokenizer"
        )
    if largest + 1 < rows / 2:
        note(f"{folder}: only {largest + 1:,} of the model's {rows:,} rows are tokens: is this its own tokenizer?")
    return tokenizer


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Read tokenizer.json as it stands, with the special tokens and the chat template of the files beside it.

    AutoTokenizer rebuilds it by a class that it finds in a config, and may split otherwise. It is the fallback.
    """
    file = folder / "tokenizer.json"
    if file.exists():
        regular_file(file)
        with explained(f"{file} is no tokenizer", "download it again"):
            Tokenizer.from_file(str(file))
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        read_optional_json(folder / name)
    if file.exists():
        remedy = "correct tokenizer_config.json or the chat template, or download them again"
        with explained(f"{folder}: the tokenizer cannot be loaded", remedy):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    else:
        remedy = "add a tokenizer.json; code that comes with a model is not run"
        with explained(f"{folder}: there is no tokenizer.json, and AutoTokenizer cannot make one", remedy):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not tokenizer.chat_template:
        raise ModelError(f"{folder}: the tokenizer has no chat template; add a chat_template.jinja to the folder")
    return tokenizer


@dataclass(frozen=True)
class Chat:
    """How a model's chat template begins and ends a response: see `read_chat`."""

    tokenizer: PreTrainedTokenizerBase
    thinking: bool  # passed to the template; whether a response must close a thinking block
    prompt_tag: str  # the last thinking tag of every prompt: <think> (left open), </think> (of a closed block) or ""
    end: int | None  # the token that ends a turn
    hidden: frozenset[int]  # tokens that a grader does not read: the end, and all special ones but the thinking tags
    account: str  # of the above, in one line

    def prompt(self, messages: Sequence[dict]) -> list[int]:
        """Encode a chat up to the start of the assistant's reply."""
        return encode_rendered(self.tokenizer, messages, render(self.tokenizer, messages, thinking=self.thinking))

    def example(self, messages: Sequence[dict], reply: str) -> tuple[list[int], list[int]]:
        """Encode a chat up to a reply, and the reply with the token that ends it, as the template writes them.

        The reply stays as it is where the template does not continue the prompt with it, or leaves out its thinking.
        One without thinking closes the block that a prompt has opened.
        """
        prompt, whole, text = render(self.tokenizer, messages, thinking=self.thinking), "", reply
        if self.prompt_tag == THINK and reply.lstrip().startswith(THINK):
            text = reply.lstrip().removeprefix(THINK).lstrip("\n")
        with suppress(ModelError):  # of a template that renders prompts alone
            chat = [*messages, {"role": "assistant", "content": reply}]
            whole = render(self.tokenizer, chat, False, self.thinking)
        after = whole.removeprefix(prompt) if whole.startswith(prompt) else ""
        if "".join(text.split()) in "".join(after.split()):  # templates change the white space around thinking
            text = after.rpartition(self.tokenizer.convert_ids_to_tokens(self.end))[0] or after
        if self.prompt_tag == THINK and END_THINK not in text:
            text = f"\n{END_THINK}\n\n{text}"
        return encode_rendered(self.tokenizer, messages, prompt), [*encode(self.tokenizer, text), self.end]

    def decode(self, tokens: Iterable[int]) -> str:
        """Decode a response for the grader, with its thinking tags even where they are special tokens."""
        return decode(self.tokenizer, [token for token in map(int, tokens) if token not in self.hidden])


def read_chat(tokenizer: PreTrainedTokenizerBase, thinking: bool | str = "auto") -> Chat:
    """Render a prompt and a reply to find how a template begins and ends a response, and what thinking = "auto" is.

    A template with a switch decides by its default. Without one, a model thinks if its prompts leave <think> open, or
    if its template drops the thinking of a reply, or a special token is </think>. A plain added token proves nothing:
    Qwen3-Instruct has it as well; nor does a template that only writes thinking as it finds it.
    """
    default, on, off = (render(tokenizer, [QUESTION], thinking=state) for state in (None, True, False))
    special = {token: added.content for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    if on != off:
        auto, found = default != off, "the template has a switch"
    elif tag := _last_tag(default):
        auto = tag == THINK
        found = f"the template {'opens' if auto else 'closes'} the thinking block in every prompt"
    elif END_THINK in str(tokenizer.chat_template):
        auto = not _keeps_thinking(tokenizer) or END_THINK in special.values()
        found = f"the template {'drops' if auto else 'only copies'} the thinking of a reply"
    else:
        auto = END_THINK in special.values()
        found = f"{END_THINK} is a special token" if auto else f"no template or special token has {END_THINK}"
    chosen, end = auto if thinking == "auto" else thinking, end_of_turn(tokenizer)
    tag = _last_tag(on if chosen else off)
    account = f"thinking = {str(chosen).lower()}{' (auto)' * (thinking == 'auto')}: {found}"
    if chosen != auto and on == off:
        result = f"only a box after {END_THINK} counts" if chosen else "a box within thinking counts as well"
        account = f"warning: {account}, and no switch: {result}"
    if end is not None:
        account += f"; {tokenizer.convert_ids_to_tokens(end)} ends a turn"
    hidden = frozenset({token for token, text in special.items() if text not in (THINK, END_THINK)} | {end})
    return Chat(tokenizer, chosen, tag, end, hidden, account)


def _keeps_thinking(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a rendered chat still has the thinking of its last reply."""
    reply = {"role": "assistant", "content": f"{THINK}\nhalf\n{END_THINK}\n\nwhole"}
    with suppress(ModelError):  # of a template that renders prompts alone
        return "half" in render(tokenizer, [QUESTION, reply], False)
    return False


def _last_tag(prompt: str) -> str:
    """Return the last thinking tag after the question of a rendered prompt, or ""."""
    tail = prompt.rpartition(QUESTION["content"])[2]
    opened, closed = tail.rfind(THINK), tail.rfind(END_THINK)
    return "" if opened == closed else THINK if opened > closed else END_THINK


def stop_tokens(chat: Chat, model: Transformer, folder: Path) -> tuple[int, ...]:
    """Return all tokens that end a response: the template's, the tokenizer's, the config's, the generation config's."""
    generation, rows = folder / "generation_config.json", model.config.vocab_size
    found = {chat.end, chat.tokenizer.eos_token_id} | end_tokens(model.config.source, rows)
    with named(generation):
        found |= end_tokens(read_optional_json(generation), rows)
    found.discard(None)
    if not found:
        raise ModelError(f"{folder}: neither tokenizer nor config names an end-of-sequence token")
    return tuple(sorted(found))


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the special token that the chat template writes after a reply, or the tokenizer's end of sequence.

    They differ in many Base models: Qwen's template ends a turn with <|im_end|>, its tokenizer with <|endoftext|>.
    An added token that is not special counts only where the reply ends with it.
    """
    reply = after = ""
    with suppress(ModelError):  # of a template that renders prompts alone
        _, reply, after = render(tokenizer, [QUESTION, REPLY], prompt=False).rpartition(REPLY["content"])
    tokens, added = encode(tokenizer, after.strip()) if reply else [], tokenizer.added_tokens_decoder
    special = [token for token in tokens if token in added and added[token].special]
    return next(iter(special or [token for token in tokens[:1] if token in added]), tokenizer.eos_token_id)


def encode(tokenizer: PreTrainedTokenizerBase, text: str, as_text: bool = False) -> list[int]:
    """Encode text without adding special tokens: the chat template has already written them.

    `as_text` encodes the names of special tokens like any other text.
    """
    with explained(
        f"{tokenizer.name_or_path}: the tokenizer cannot encode {text[:80]!r}", "correct the tokenizer or the text"
    ):
        return tokenizer(text, add_special_tokens=False, split_special_tokens=as_text).input_ids


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict], prompt: bool = True, thinking: bool | None = None
) -> str:
    """Render a chat, up to the start of the assistant's reply if it is a `prompt`. ModelError if it cannot be.

    Templates call the switch enable_thinking (Qwen3, GLM, SmolLM3) or thinking (DeepSeek-V3.1, Granite).
    """
    switch = {} if thinking is None else {"enable_thinking": thinking, "thinking": thinking}
    remedy = "correct chat_template.jinja, or chat_template in tokenizer_config.json"
    with explained(f"{tokenizer.name_or_path}: the chat template cannot render this chat", remedy):
        template = TODAY.sub(lambda call: repr(FIXED_DAY.strftime(call[2])), tokenizer.get_chat_template())
        return tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=prompt, tokenize=False, **switch
        )


def encode_rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict], text: str) -> list[int]:
    """Encode a rendered chat; the special tokens are the template's, and their names in a user's message are text."""
    tokens = []
    for message in messages:
        content = message["content"].strip()
        if message["role"] == "user" and content in text and names_special(tokenizer, content):
            before, _, text = text.partition(content)
            tokens += encode(tokenizer, before) + encode(tokenizer, content, as_text=True)
    return tokens + encode(tokenizer, text)


@cache
def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return the text of all special tokens."""
    return tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)


def names_special(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether a text has the name of a special token in it."""
    return any(special in text for special in special_tokens(tokenizer))


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """Decode a response; an id that pads the embedding, which has no token, reads as U+FFFD."""
    runs = [(True, tokens)]
    if max(tokens, default=0) >= len(tokenizer):
        runs = groupby(tokens, lambda token: tokenizer.convert_ids_to_tokens(token) is not None)
    return "".join(
        tokenizer.decode(list(run), clean_up_tokenization_spaces=False) if known else "\ufffd" * len(list(run))
        for known, run in runs
    )


def check_prompts(tokenizer: PreTrainedTokenizerBase, prompts: dict[str, tuple[str, Sequence[int]]]) -> list[str]:
    """Return what a person should know of the prompts, given by name with the text asked and the tokens.

    ModelError if no prompt contains its text.
    """
    notes, folder = [], tokenizer.name_or_path
    rendered = tokenizer.batch_decode([list(tokens) for _, tokens in prompts.values()])
    lost = [
        name for name, whole in zip(prompts, rendered, strict=True) if _plain(prompts[name][0]) not in _plain(whole)
    ]
    if lost:
        of_all = f"{len(lost):,} of {len(prompts):,} prompts lack some of their problem's text ({first_names(lost)})"
        notes.append(f"{of_all}: see whether the tokenizer knows its characters")
    if lost and len(lost) == len(prompts):
        raise ModelError(
            f"{folder}: no prompt contains its problem's text ({lost[0]} is {rendered[0][:200]!r}): correct the chat "
            "template or the tokenizer"
        )
    if named := [name for name, (text, _) in prompts.items() if names_special(tokenizer, text)]:
        notes.append(f"the text of {first_names(named)} names special tokens: they are encoded as text")
    if TODAY.search(tokenizer.get_chat_template()):
        notes.append(f"the chat template writes today's date: it is given {FIXED_DAY:%d %B %Y}, to stay the same")
    auto, some = None, rendered[:COMPARED]
    with suppress(Exception):  # whoever loads by AutoTokenizer will see why it fails
        auto = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if auto is not None:
        ids = [own(some, add_special_tokens=False).input_ids for own in (tokenizer, auto)]
        if other := sum(ours != theirs for ours, theirs in zip(*ids, strict=True)):
            what = f"AutoTokenizer ({type(auto).__name__}) encodes {other:,} of {len(some):,} prompts otherwise"
            notes.append(f"tokenizer.json is read as it stands: {what}")
    return notes


def _plain(text: str) -> str:
    """Return a text without what a tokenizer may normalise: white space, case, the composition of characters."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())
