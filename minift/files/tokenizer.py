"""A folder's tokenizer, with the token ids that transformers gives for the same folder.

Files: tokenizer.json, or vocab.json and merges.txt, or vocab.txt (BERT's); beside them tokenizer_config.json,
added_tokens.json and special_tokens_map.json. Their meaning follows transformers 5 (AutoTokenizer), also where it is
surprising: a base must be given the token ids that it was trained on.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from minift.errors import UserError, tokenizer_faults
from minift.files.atomic import read_json

FILES = (  # are copied into a saved folder, so that it has the same tokens as its base
    "tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json", "tokenizer_config.json",
    "special_tokens_map.json", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
DEFAULTS = {  # special tokens that no file has to name, by transformers' class
    "GPT2Tokenizer": {name: "<|endoftext|>" for name in ("bos_token", "eos_token", "unk_token")},
    "BertTokenizer": {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]",
                      "mask_token": "[MASK]"},
}


@dataclass
class Settings:
    """The content of the small files beside a vocabulary."""

    options: dict[str, Any] = field(default_factory=dict)  # tokenizer_config.json
    named: dict[str, AddedToken | None] = field(default_factory=dict)  # such as eos_token; None: null in the file
    extra: list[AddedToken] = field(default_factory=list)  # special tokens without a name
    added: dict[int, AddedToken] = field(default_factory=dict)  # by the id in the file
    built_in: list[AddedToken] = field(default_factory=list)  # of a tokenizer.json that is taken as it is
    notes: list[str] = field(default_factory=list)  # lines to print

    @property
    def kind(self) -> str:
        """The tokenizer's class in transformers."""
        return str(self.options.get("tokenizer_class") or "GPT2Tokenizer").removesuffix("Fast")

    def text(self, name: str) -> str | None:
        """A special token's text by its name, such as eos_token."""
        if name in self.named:
            token = self.named[name]
            return None if token is None else token.content
        return DEFAULTS.get(self.kind, {}).get(name)


def load_tokenizer(folder: Path, config: dict[str, Any], vocab_size: int
                   ) -> tuple[Tokenizer | None, Settings]:
    """The tokenizer, or None when the folder has none, and its settings.

    `config` is the parsed config.json. Raises UserError.
    """
    with tokenizer_faults(f"{folder}: the tokenizer's files cannot be read"):
        settings = read_settings(folder, config)
        tokenizer = read_vocabulary(folder, settings)
    if tokenizer is None:
        return None, settings
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
        tokenizer.decode(tokenizer.encode("It works.").ids)  # damage shows here, and not in the middle of a run
    if left_out:
        some = ", ".join(f"{text!r:.40}" for text in left_out[:5])
        settings.notes.append(f"{folder}: {len(left_out)} tokens of the tokenizer are left out, since the "
                              f"vocabulary of {vocab_size} has no place for them: {some}")
    return tokenizer, settings


def read_settings(folder: Path, config: dict[str, Any]) -> Settings:
    """The small files. Raises UserError, or for malformed values any error: the caller turns it into one."""
    options = read_optional(folder / "tokenizer_config.json")
    options.setdefault("tokenizer_class", config.get("tokenizer_class"))
    declared = dict(options)
    if options.get("added_tokens_decoder") is None:  # the older file counts only without this newer field
        declared |= read_optional(folder / "special_tokens_map.json")
    settings = Settings(options)
    for name in NAMED:
        if name in declared:
            token = declared[name]
            settings.named[name] = None if token is None else make_token(token, special=True)
    settings.extra = [make_token(token, special=True) for token in extra_tokens(options, declared)]

    read_added_tokens(folder, settings)

    # A token may be listed twice, with an id and by its name: the flags beside the id count. A named one is special.
    by_text = {token.content: token for token in settings.added.values()}
    for name, token in settings.named.items():
        if token is not None:
            settings.named[name] = by_text.get(token.content, token)
    roles = {settings.text(name) for name in NAMED}
    for token in settings.added.values():
        token.special = token.special or token.content in roles
    return settings


def read_added_tokens(folder: Path, settings: Settings) -> None:
    """Fill settings.added and settings.built_in.

    Added tokens are listed in tokenizer_config.json since 2023, before that in added_tokens.json.
    """
    raw = read_optional(folder / "tokenizer.json")
    built_in = {int(token["id"]): make_token(token) for token in raw.get("added_tokens") or []}
    if not takes_vocabulary_only(settings, raw):
        settings.built_in = [token for _, token in sorted(built_in.items())]
    decoder = settings.options.get("added_tokens_decoder")
    if decoder is not None:
        settings.added = {int(number): make_token(token) for number, token in decoder.items()}
        return
    roles = [token for token in [*settings.named.values(), *settings.extra] if token is not None]
    special = {token.content for token in roles}
    for text, number in read_optional(folder / "added_tokens.json").items():
        is_special = text in special
        settings.added[int(number)] = AddedToken(text, special=is_special, normalized=not is_special)
    settings.added |= built_in


def extra_tokens(options: dict[str, Any], declared: dict[str, Any]) -> list[Any]:
    """Special tokens that are not in NAMED: with a name that only this model has, or without a name."""
    tokens = []
    for name, value in declared.items():
        if name.endswith("_token") and name not in NAMED and isinstance(value, str | dict):
            tokens.append(value)
    # transformers 5 has extra_special_tokens, a list or an object; older versions have additional_special_tokens
    extra = options.get("extra_special_tokens") or []
    if isinstance(extra, dict):
        tokens += extra.values()
        extra = []
    if not extra:
        extra = options.get("additional_special_tokens") or []
    if not extra and options.get("extra_special_tokens") != []:
        extra = declared.get("additional_special_tokens") or []
    return tokens + list(extra)


def takes_vocabulary_only(settings: Settings, raw: dict[str, Any]) -> bool:
    """Whether transformers reads only vocabulary, merges and template of a tokenizer.json.

    Its GPT2Tokenizer sets up normalizer, pre-tokenizer and decoder itself.
    """
    return settings.kind == "GPT2Tokenizer" and (raw.get("model") or {}).get("type", "BPE") == "BPE"


def read_optional(path: Path) -> dict[str, Any]:
    """A JSON object, {} if the file is missing. Raises UserError."""
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
    """The tokenizer without added tokens, or None if the folder has no vocabulary."""
    space = settings.options.get("add_prefix_space") is True
    raw = read_optional(folder / "tokenizer.json")
    if raw:
        raw["added_tokens"] = []  # add_tokens adds them, in transformers' order
        if takes_vocabulary_only(settings, raw):
            model = raw["model"]
            if raw.get("normalizer") or (raw.get("pre_tokenizer") or {}).get("type") != "ByteLevel":
                settings.notes.append(
                    f"{folder}: transformers' GPT2Tokenizer does not use the normalizer and pre_tokenizer of "
                    "tokenizer.json; to use them, set tokenizer_class to PreTrainedTokenizerFast in "
                    "tokenizer_config.json")
            byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
            byte_level["add_prefix_space"] = space
            raw["normalizer"] = None
            raw["pre_tokenizer"] = byte_level
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
    """BERT's tokenizer, which many Chinese GPT-2s have. Each line of the file is a token, its number the id."""
    options = settings.options
    lines = path.read_text(encoding="utf-8").split("\n")
    if not lines[-1]:
        lines.pop()  # after the last line end; any other empty line is a token
    vocab = {text: number for number, text in enumerate(lines)}
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
    """Add the tokens that the files list, in transformers' order, which decides on the ids of new tokens.

    Returns the tokens that are left out, since `vocab_size` has no id for them.
    """
    tokens = list(settings.built_in)
    tokens += [token for _, token in sorted(settings.added.items()) if token not in settings.built_in]
    listed = {token.content for token in tokens}
    for name in NAMED:
        token = settings.named.get(name)
        text = settings.text(name)
        if token is None and text is not None and tokenizer.token_to_id(text) is not None:
            token = AddedToken(text, special=True)  # a default counts only if the vocabulary has it
        if token is not None and token.content not in listed and token not in tokens:
            tokens.append(token)
    tokens += [token for token in settings.extra if token.content not in listed]

    left_out: set[str] = set()
    possible: dict[str, AddedToken] = {}
    next_id = tokenizer.get_vocab_size(with_added_tokens=False)
    for token in tokens:
        # a token that the vocabulary has keeps its id there
        if token.content not in possible and tokenizer.token_to_id(token.content) is None:
            if next_id >= vocab_size:
                left_out.add(token.content)
                continue
            next_id += 1
        possible[token.content] = token  # of two tokens with the same text the later one counts
    tokenizer.add_tokens(list(possible.values()))
    return sorted(left_out)


def add_template(tokenizer: Tokenizer, folder: Path, settings: Settings) -> None:
    """Let the tokenizer put special tokens around a text, if its class or the settings say so."""
    if (folder / "tokenizer.json").is_file():
        return  # it holds a template already, and transformers does not read the two options then
    first = last = ""
    if settings.kind == "BertTokenizer":
        first, last = "cls_token", "sep_token"
    if settings.options.get("add_bos_token") is True:
        first = "bos_token"
    if settings.options.get("add_eos_token") is True:
        last = "eos_token"
    template, special = ["$A"], []  # $A is the text
    for name, index in ((first, 0), (last, 2)):
        text = settings.text(name)
        number = None if text is None else tokenizer.token_to_id(text)
        if number is not None:
            template.insert(index, text)  # index 2 is the end, with or without a first token
            special.append((text, number))
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
