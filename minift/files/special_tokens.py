"""The tokens that a base was trained to see at the beginning and at the end of a text."""

import re
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from minift.errors import UserError
from minift.files.tokenizer import Settings, read_optional

CONTROL = re.compile(r"<.+>|\[.+\]")  # how a control token is written


def end_of_text(folder: Path, config: dict[str, Any], tokenizer: Tokenizer | None, settings: Settings,
                vocab_size: int) -> tuple[int | None, list[str]]:
    """The end-of-text that the base was trained with, or None; and a note if the files disagree.

    A config.json often keeps the id that another tokenizer has, so it comes last, unless it names a control
    token. `config` is the parsed config.json. Raises UserError.
    """
    generation = read_optional(folder / "generation_config.json")
    found = []  # (rank, file, id): the lowest rank counts
    for number in token_ids(generation, folder / "generation_config.json"):
        copied = generation.get("_from_model_config") is True  # from config.json, by transformers
        rank = 1 if not copied else 2 if is_control_token(tokenizer, number) else 4
        found.append((rank, "generation_config.json", number))
    for number in token_ids(config, folder / "config.json"):
        found.append((2 if is_control_token(tokenizer, number) else 4, "config.json", number))
    number = None if tokenizer is None else tokenizer.token_to_id(settings.text("eos_token") or "")
    if number is not None:
        is_default = settings.named.get("eos_token") is None  # of the tokenizer's class, in no file
        found.append((3 if is_default else 0, "the tokenizer", number))
    if tokenizer is None and not found and "eos_token_id" not in config:
        found.append((5, "GPT-2's default", 50256))

    possible = [one for one in found if 0 <= one[2] < vocab_size]
    if not possible:
        return None, []
    _, source, chosen = min(possible, key=lambda one: one[0])
    agreeing = {file for _, file, number in found if number == chosen}
    said = ""
    for _, file, number in found:
        if file not in agreeing:
            said += f"; {file} has {show_token(tokenizer, number)}"
    note = f"{folder}: the end-of-text is {show_token(tokenizer, chosen)}, as {source} says{said}"
    return chosen, [note] if said else []


def show_token(tokenizer: Tokenizer | None, number: int) -> str:
    text = None if tokenizer is None or number < 0 else tokenizer.id_to_token(number)
    return str(number) if text is None else f"{number} ({text!r:.40})"


def token_ids(raw: dict[str, Any], path: Path) -> list[int]:
    """eos_token_id as a list: it may be a number, a list or null. Raises UserError."""
    value = raw.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(number) is int and abs(number) < 2**31 for number in ids):
        raise UserError(f"{path}: eos_token_id is {value!r:.80}, and must be a token id")
    return ids


def is_control_token(tokenizer: Tokenizer | None, number: int) -> bool:
    """Whether a token looks like one that marks a place, and not like a part of a text."""
    text = None if tokenizer is None or number < 0 else tokenizer.id_to_token(number)
    if text is None:
        return False
    return number in tokenizer.get_added_tokens_decoder() or CONTROL.fullmatch(text) is not None
