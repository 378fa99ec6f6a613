"""The tokenizer of a model folder: loading, encoding of chats, and the tokens that end a response."""

import json
from collections.abc import Sequence
from pathlib import Path

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from model import ModelError, Transformer

MOST_PADDING = 1024  # unused rows that an embedding may have (Qwen2.5: 399)


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


def stop_tokens(tokenizer: PreTrainedTokenizerBase, model: Transformer, folder: Path) -> tuple[int, ...]:
    """Return all tokens that end a response: the template's, the tokenizer's, the config's, the generation config's."""
    generation = folder / "generation_config.json"
    generation_config = json.loads(generation.read_text(encoding="utf-8")) if generation.exists() else {}
    found = {end_of_turn(tokenizer), tokenizer.eos_token_id}
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
    """
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "the reply"}]
    try:
        _, reply, after = tokenizer.apply_chat_template(messages, tokenize=False).rpartition("the reply")
    except (TemplateError, TypeError, ValueError, KeyError):  # of a template that renders prompts alone
        reply = after = ""
    first, added = encode(tokenizer, after.strip())[:1] if reply else [], tokenizer.added_tokens_decoder
    return first[0] if first and first[0] in added and added[first[0]].special else tokenizer.eos_token_id


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Encode text without special tokens: the chat template has already written them."""
    return tokenizer(text, add_special_tokens=False).input_ids


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict]) -> list[int]:
    """Encode a chat up to the start of the assistant's reply."""
    return encode(tokenizer, tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
