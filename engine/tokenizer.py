"""The tokenizer of a model folder, and how its chat template begins and ends a response."""

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from model import ModelError, Transformer

MOST_PADDING = 1024  # unused rows that an embedding may have (Qwen2.5: 399)
THINK, END_THINK = "<think>", "</think>"
QUESTION, REPLY = {"role": "user", "content": "a question"}, {"role": "assistant", "content": "a reply"}


def load_tokenizer(folder: Path, model: Transformer) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder. ModelError if it does not fit the model."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: the tokenizer cannot be loaded ({str(error).splitlines()[0]})") from None
    tokens, rows = len(tokenizer), model.config.vocab_size
    if not tokens <= rows <= tokens + MOST_PADDING:
        raise ModelError(f"{folder}: the tokenizer has {tokens} tokens, the model {rows}: use the model's tokenizer")
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
        return encode(self.tokenizer, render(self.tokenizer, messages, thinking=self.thinking))

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
        return encode(self.tokenizer, prompt), [*encode(self.tokenizer, text), self.end]

    def decode(self, tokens: Iterable[int]) -> str:
        """Decode a response for the grader, with its thinking tags even where they are special tokens."""
        return self.tokenizer.decode([token for token in map(int, tokens) if token not in self.hidden])


def read_chat(tokenizer: PreTrainedTokenizerBase, thinking: bool | str = "auto") -> Chat:
    """Render a prompt and a reply to find how a template begins and ends a response, and what thinking = "auto" is.

    A template with a switch decides by its default. Without one, a model thinks if its prompts leave <think> open, or
    if its template or a special token has </think>. A plain added token proves nothing: Qwen3-Instruct has it as well.
    """
    default, on, off = (render(tokenizer, [QUESTION], thinking=state) for state in (None, True, False))
    special = {token: added.content for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    if on != off:
        auto, found = default != off, "the template has a switch"
    elif tag := _last_tag(default):
        auto = tag == THINK
        found = f"the template {'opens' if auto else 'closes'} the thinking block in every prompt"
    elif END_THINK in str(tokenizer.chat_template):
        auto, found = True, f"the template reads {END_THINK}"
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


def _last_tag(prompt: str) -> str:
    """Return the last thinking tag after the question of a rendered prompt, or ""."""
    tail = prompt.rpartition(QUESTION["content"])[2]
    opened, closed = tail.rfind(THINK), tail.rfind(END_THINK)
    return "" if opened == closed else THINK if opened > closed else END_THINK


def stop_tokens(chat: Chat, model: Transformer, folder: Path) -> tuple[int, ...]:
    """Return all tokens that end a response: the template's, the tokenizer's, the config's, the generation config's."""
    generation = folder / "generation_config.json"
    generation_config = json.loads(generation.read_text()) if generation.exists() else {}
    found = {chat.end, chat.tokenizer.eos_token_id}
    for config in (model.config.source, generation_config):
        ends = config.get("eos_token_id")
        found |= set(ends) if isinstance(ends, list) else {ends}
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


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Encode text without special tokens: the chat template has already written them."""
    return tokenizer(text, add_special_tokens=False).input_ids


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict], prompt: bool = True, thinking: bool | None = None
) -> str:
    """Render a chat, up to the start of the assistant's reply if it is a `prompt`. ModelError if the template cannot.

    Templates call the switch enable_thinking (Qwen3, GLM, SmolLM3) or thinking (DeepSeek-V3.1, Granite).
    """
    switch = {} if thinking is None else {"enable_thinking": thinking, "thinking": thinking}
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False, **switch)
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{tokenizer.name_or_path}: the chat template cannot render this chat ({reason})") from None
