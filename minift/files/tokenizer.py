"""A folder's tokenizer and special tokens, with the token ids that transformers gives for the same folder.

Files: tokenizer.json, or vocab.json and merges.txt, or vocab.txt (BERT's); beside them tokenizer_config.json,
added_tokens.json and special_tokens_map.json. Their meaning follows transformers 5 (AutoTokenizer).
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from minift.errors import UserError, tokenizer_faults
from minift.files.atomic import read_json

FILES = (  # all that a saved folder must have to be tokenized as its base is
    "tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json", "tokenizer_config.json",
    "special_tokens_map.json", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
DEFAULTS = {  # by transformers' class
    "GPT2Tokenizer": {name: "<|endoftext|>" for name in ("bos_token", "eos_token", "unk_token")},
    "BertTokenizer": {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]",
                      "mask_token": "[MASK]"},
}
CONTROL = re.compile(r"<.+>|\[.+\]")  # how a control token is written


@dataclass
class Settings:
    """What the small files say of a tokenizer. Tokens of `added` are listed by the id in the file."""

    options: dict[str, Any] = field(default_factory=dict)  # tokenizer_config.json
    named: dict[str, AddedToken | None] = field(default_factory=dict)  # such as eos_token; None: null there
    extra: list[AddedToken] = field(default_factory=list)  # special tokens without a name
    added: dict[int, AddedToken] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The class that transformers takes."""
        return str(self.options.get("tokenizer_class") or "GPT2Tokenizer").removesuffix("Fast")

    def text(self, name: str) -> str | None:
        """A special token's text by its name, such as eos_token."""
        if name in self.named:
            token = self.named[name]
            return None if token is None else token.content
        return DEFAULTS.get(self.kind, {}).get(name)


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
        if settings.kind == "GPT2Tokenizer" and model.get("type", "BPE") == "BPE":
            # GPT2Tokenizer takes vocabulary, merges and template from the file, and else its own settings
            raw["normalizer"] = None
            raw["pre_tokenizer"] = byte_level = {"type": "ByteLevel", "add_prefix_space": space,
                                                 "trim_offsets": True, "use_regex": True}
            raw["decoder"] = byte_level
            raw["model"] = {"type": "BPE", "vocab": model["vocab"], "merges": model["merges"]}
        return Tokenizer.from_str(json.dumps(raw))
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if settings.kind == "BertTokenizer" and (folder / "vocab.txt").is_file():
        return read_word_pieces(folder / "vocab.txt", settings)
    if not vocab.is_file() or not merges.is_file():
        return None
    tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def read_word_pieces(path: Path, settings: Settings) -> Tokenizer:
    """BERT's tokenizer, which many Chinese GPT-2s have. A line of the file is a token."""
    options = settings.options
    lines = path.read_text(encoding="utf-8").split("\n")
    vocab = {text: number for number, text in enumerate(lines) if text or number < len(lines) - 1}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=settings.text("unk_token")))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=options.get("tokenize_chinese_chars", True),
        strip_accents=options.get("strip_accents"),
        lowercase=options.get("do_lower_case", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
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
    for name in NAMED:  # a default counts only if the vocabulary has it
        text = settings.text(name)
        if text is not None and text not in by_text and tokenizer.token_to_id(text) is not None:
            tokens.append(AddedToken(text, special=True))

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
    """Let the tokenizer put special tokens around a text, where its class or the settings say so."""
    if (folder / "tokenizer.json").is_file():  # has its own template, and the two options are not read
        return
    first = last = ""
    if settings.kind == "BertTokenizer":
        first, last = "cls_token", "sep_token"
    if settings.options.get("add_bos_token") is True:
        first = "bos_token"
    if settings.options.get("add_eos_token") is True:
        last = "eos_token"
    pieces, special = ["$A"], []
    for name, place in ((first, 0), (last, 2)):
        text = settings.text(name)
        number = None if text is None else tokenizer.token_to_id(text)
        if number is not None:
            pieces.insert(place, text)
            special.append((text, number))
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(single=pieces, special_tokens=special)


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
