"""A folder's tokenizer and special tokens, with the token ids that transformers gives for the same folder.

Files: tokenizer.json, or vocab.json and merges.txt; beside them tokenizer_config.json, added_tokens.json and
special_tokens_map.json. Their meaning follows transformers 5 (AutoTokenizer, GPT2Tokenizer).
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from minift.errors import UserError, tokenizer_faults
from minift.files.atomic import read_json

FILES = (  # all that a saved folder must have to be tokenized as its base is
    "tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json", "tokenizer_config.json",
    "special_tokens_map.json", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
GPT2_END = "<|endoftext|>"  # GPT2Tokenizer's default for the first three
CONTROL = re.compile(r"<.+>|\[.+\]")  # how a control token is written


@dataclass
class Settings:
    """What the small files say of a tokenizer. Tokens of `added` are listed by the id in the file."""

    options: dict[str, Any] = field(default_factory=dict)  # tokenizer_config.json
    named: dict[str, AddedToken | None] = field(default_factory=dict)  # such as eos_token; None: null there
    extra: list[AddedToken] = field(default_factory=list)  # special tokens without a name
    added: dict[int, AddedToken] = field(default_factory=dict)

    @property
    def is_gpt2(self) -> bool:
        """Whether transformers takes its GPT2Tokenizer, and not tokenizer.json as it is."""
        name = str(self.options.get("tokenizer_class") or "GPT2Tokenizer")
        return name.removesuffix("Fast") == "GPT2Tokenizer"


def load_tokenizer(folder: Path, config: dict[str, Any], vocab_size: int
                   ) -> tuple[Tokenizer | None, Settings, list[str]]:
    """The tokenizer, or None when the folder has none; its settings; notes to print.

    `config` is the parsed config.json. Raises UserError.
    """
    with tokenizer_faults(f"{folder}: the tokenizer's files cannot be read"):
        settings = read_settings(folder)
        settings.options.setdefault("tokenizer_class", config.get("tokenizer_class"))
        tokenizer = read_vocabulary(folder, settings)
    if tokenizer is None:
        return None, settings, []
    highest = max(tokenizer.get_vocab(with_added_tokens=False).values(), default=-1)
    if highest >= vocab_size:
        raise UserError(f"{folder}: the tokenizer has token {highest}, and config.json a vocabulary of "
                        f"{vocab_size}: they do not belong together")
    with tokenizer_faults(f"{folder}: the tokenizer's files cannot be read"):
        left_out = add_tokens(tokenizer, settings, vocab_size)
        add_template(tokenizer, folder, settings)
        tokenizer.encode_special_tokens = settings.options.get("split_special_tokens") is True
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.decode(tokenizer.encode("It works.").ids)
    notes = []
    if left_out:
        some = ", ".join(f"{text!r:.40}" for text in left_out[:5])
        notes = [f"{folder}: {len(left_out)} tokens of the tokenizer are left out, since the vocabulary of "
                 f"{vocab_size} has no place for them: {some}"]
    return tokenizer, settings, notes


def read_settings(folder: Path) -> Settings:
    """The small files. Raises UserError, or any error of malformed values."""
    options = read_optional(folder / "tokenizer_config.json")
    decoder = options.get("added_tokens_decoder")
    declared = dict(options)
    if decoder is None:  # the older files count only where the newer field is absent
        declared |= read_optional(folder / "special_tokens_map.json")
    extra = declared.get("extra_special_tokens") or declared.get("additional_special_tokens") or []
    if isinstance(extra, dict):
        extra = list(extra.values())
    settings = Settings(options, extra=[make_token(token, special=True) for token in extra])
    for name in NAMED:
        if name in declared:
            token = declared[name]
            settings.named[name] = None if token is None else make_token(token, special=True)

    if decoder is not None:
        settings.added = {int(number): make_token(token) for number, token in decoder.items()}
        return settings
    special = {token.content for token in [*settings.named.values(), *settings.extra] if token is not None}
    for text, number in read_optional(folder / "added_tokens.json").items():
        is_special = text in special
        settings.added[int(number)] = AddedToken(text, special=is_special, normalized=not is_special)
    for token in read_optional(folder / "tokenizer.json").get("added_tokens") or []:
        settings.added[int(token["id"])] = make_token(token)
    return settings


def read_optional(path: Path) -> dict[str, Any]:
    return read_json(path, dict) if path.is_file() else {}


def make_token(token: Any, special: bool = False) -> AddedToken:
    """A token from a string, or from an object with its content and flags."""
    if isinstance(token, str):
        return AddedToken(token, special=True)
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    flags = {name: token[name] for name in names if name in token}
    if special:
        flags["special"] = True
    return AddedToken(token["content"], **flags)


def read_vocabulary(folder: Path, settings: Settings) -> Tokenizer | None:
    """The tokenizer without added tokens."""
    space = settings.options.get("add_prefix_space") is True
    raw = read_optional(folder / "tokenizer.json")
    if raw:
        raw["added_tokens"] = []
        model = raw.get("model") or {}
        if settings.is_gpt2 and model.get("type", "BPE") == "BPE":
            # GPT2Tokenizer takes vocabulary, merges and template from the file, and else its own settings
            raw["normalizer"] = None
            raw["pre_tokenizer"] = byte_level = {"type": "ByteLevel", "add_prefix_space": space,
                                                 "trim_offsets": True, "use_regex": True}
            raw["decoder"] = byte_level
            raw["model"] = {"type": "BPE", "vocab": model["vocab"], "merges": model["merges"]}
        return Tokenizer.from_str(json.dumps(raw))
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if not vocab.is_file() or not merges.is_file():
        return None
    tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def add_tokens(tokenizer: Tokenizer, settings: Settings, vocab_size: int) -> list[str]:
    """Add the control tokens that the files list. Those whose ids exceed the vocabulary are left out, and
    returned."""
    by_text = {token.content: token for token in settings.added.values()}
    tokens = [token for _, token in sorted(settings.added.items())]
    for token in [*settings.named.values(), *settings.extra]:
        if token is not None and token.content not in by_text:
            tokens.append(token)
            by_text[token.content] = token
    if settings.is_gpt2 and GPT2_END not in by_text and tokenizer.token_to_id(GPT2_END) is not None:
        tokens.append(AddedToken(GPT2_END, special=True))

    left_out, possible = [], {}
    next_id = tokenizer.get_vocab_size(with_added_tokens=False)
    for token in tokens:
        if token.content not in possible and tokenizer.token_to_id(token.content) is None:
            if next_id >= vocab_size:
                left_out.append(token.content)
                continue
            next_id += 1
        possible[token.content] = token
    tokenizer.add_tokens(list(possible.values()))
    return left_out


def add_template(tokenizer: Tokenizer, folder: Path, settings: Settings) -> None:
    """Let the tokenizer put BOS and EOS around a text where tokenizer_config.json says so."""
    if (folder / "tokenizer.json").is_file():  # has its own template, and the two options are not read
        return
    pieces, special = ["$A"], []
    for name, place in (("bos_token", 0), ("eos_token", 2)):
        text, number = named_token(tokenizer, settings, name)
        if settings.options.get(f"add_{name}") is True and number is not None:
            pieces.insert(place, text)
            special.append((text, number))
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(single=pieces, special_tokens=special)


def named_token(tokenizer: Tokenizer, settings: Settings, name: str) -> tuple[str, int | None]:
    """Text and id of a special token such as eos_token; the id is None when there is none."""
    if name in settings.named:
        token = settings.named[name]
        text = "" if token is None else token.content
    else:
        text = GPT2_END if settings.is_gpt2 else ""
    return text, tokenizer.token_to_id(text)


def begin_of_text(tokenizer: Tokenizer) -> int | None:
    """The token that the tokenizer puts before every text, or None."""
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    full = tokenizer.encode("a").ids
    if len(full) > len(plain) and full[1 : 1 + len(plain)] == plain:
        return full[0]
    return None


def end_of_text(folder: Path, config: dict[str, Any], tokenizer: Tokenizer | None, settings: Settings,
                vocab_size: int) -> tuple[int | None, list[str]]:
    """The end-of-text that the base was trained with, or None; and a note if the files disagree.

    A config.json often keeps the default of another tokenizer, so it comes last, unless the token that it
    names is a control token. `config` is the parsed config.json. Raises UserError.
    """
    generation = read_optional(folder / "generation_config.json")
    copied = generation.get("_from_model_config") is True  # says nothing that config.json does not say
    sources = [
        ("generation_config.json", token_ids(generation, folder / "generation_config.json")),
        ("config.json", token_ids(config, folder / "config.json")),
    ]
    ranked = []  # (rank, source, id)
    for source, ids in sources:
        for number in ids:
            text = tokenizer.id_to_token(number) if tokenizer is not None else None
            certain = source == "generation_config.json" and not copied
            control = text is not None and is_control_token(tokenizer, number, text)
            ranked.append((1 if certain else 2 if control else 4, source, number))
    if tokenizer is not None:
        declared = settings.named.get("eos_token") is not None
        number = named_token(tokenizer, settings, "eos_token")[1]
        if number is not None:
            ranked.append((0 if declared else 3, "the tokenizer", number))
    elif not ranked and "eos_token_id" not in config:
        ranked.append((5, "GPT-2's default", 50256))

    possible = sorted((one for one in ranked if 0 <= one[2] < vocab_size), key=lambda one: one[0])
    if not possible:
        return None, []
    chosen = possible[0][2]
    agreeing = {source for _, source, number in ranked if number == chosen}
    others = {source: number for _, source, number in ranked if source not in agreeing}
    if not others:
        return chosen, []

    def show(number: int) -> str:
        text = tokenizer.id_to_token(number) if tokenizer is not None and number >= 0 else None
        return f"{number} ({text!r:.40})" if text is not None else str(number)

    said = ", ".join(f"{source} has {show(number)}" for source, number in others.items())
    note = f"{folder}: end-of-text is {show(chosen)}, from {possible[0][1]}; eos_token_id differs: {said}"
    return chosen, [note]


def token_ids(raw: dict[str, Any], path: Path) -> list[int]:
    """eos_token_id as a list: it may be a number, a list or null. Raises UserError."""
    value = raw.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(number) is int and abs(number) < 2**31 for number in ids):
        raise UserError(f"{path}: eos_token_id is {value!r:.80}, and must be a token id")
    return ids


def is_control_token(tokenizer: Tokenizer, number: int, text: str) -> bool:
    return number in tokenizer.get_added_tokens_decoder() or CONTROL.fullmatch(text) is not None
