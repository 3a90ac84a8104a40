"""Token ids and special tokens of many kinds of folder, beside transformers' AutoTokenizer."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, GenerationConfig

from minift.data.tokens import start_tokens
from minift.errors import UserError
from minift.files import weights

VOCAB_SIZE = 330  # the files have 320 tokens; 0 is <|endoftext|>
END = "<|endoftext|>"
CHAT = ["<USER>", "<ASSISTANT>", "<BOS>", "<EOS>"]
CONTROL_TEXTS = (
    "<USER>Hi<ASSISTANT>Hello<EOS>",
    "a <USER> b  <EOS> \n<BOS>",
    "A<|endoftext|> B <|endoftext|>",
    "[MASK] of [MASK] and a [SEP]word",
    "</s><s> </s>",
    "caf\u00e9 cafe\u0301 Two twos a\u4f60\u597db",
    "",
    " ",
    "  two\n\n",
)

Change = Callable[[Path], None]


def put(name: str, value: Any) -> Change:
    return lambda folder: (folder / name).write_text(json.dumps(value), encoding="utf-8")


def rename_end(folder: Path) -> None:
    vocab = json.loads((folder / "vocab.json").read_text())
    vocab["</s>"] = vocab.pop("<|endoftext|>")
    put("vocab.json", vocab)(folder)


def token(content: str, **flags: Any) -> dict[str, Any]:
    plain = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    return plain | flags | {"content": content}


def fast(change: Callable[[Tokenizer], None]) -> Change:
    """tokenizer.json in the place of vocab.json and merges.txt, after a change."""

    def write(folder: Path) -> None:
        backend = AutoTokenizer.from_pretrained(folder).backend_tokenizer
        change(backend)
        backend.save(str(folder / "tokenizer.json"))
        for file in ("vocab.json", "merges.txt"):
            (folder / file).unlink()

    return write


def word_level(folder: Path) -> None:
    words = {word: i for i, word in enumerate(["[UNK]", "a", "b", "two", "of", "and", "Hi", "[MASK]"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(folder / "tokenizer.json"))


def with_template(backend: Tokenizer) -> None:
    backend.add_special_tokens(["<s>"])
    number = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", number)])


def set_normalizer(backend: Tokenizer) -> None:
    backend.normalizer = normalizers.NFD()


def set_padding(backend: Tokenizer) -> None:
    """Settings that a file may carry, and that must not act."""
    backend.enable_padding(length=50)
    backend.enable_truncation(3)


def word_pieces(folder: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "two", "##s", "\u4f60", "\u597d", "cafe"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")


ADDED = put("added_tokens.json", {text: 320 + i for i, text in enumerate(CHAT)})
CHAT_MAP = put("special_tokens_map.json", {"bos_token": "<BOS>", "eos_token": "<EOS>", "pad_token": "<EOS>",
                                           "unk_token": "<|endoftext|>"})  # fmt: skip
UNUSED = "a normalizer, as GPT2Tokenizer"
FAST_CLASS = {"tokenizer_class": "PreTrainedTokenizerFast"}
SLOW: dict[str, list[Change]] = {
    "vocab.json and merges.txt": [],
    "add_prefix_space": [put("tokenizer_config.json", {"add_prefix_space": True})],
    "add_prefix_space off": [put("tokenizer_config.json", {"add_prefix_space": False})],
    "chat tokens": [ADDED, CHAT_MAP],
    "chat tokens that are not special": [ADDED],
    "a token that takes the space before it": [
        put("special_tokens_map.json", {"mask_token": token("[MASK]", lstrip=True), "sep_token": "[SEP]"})],
    "tokens in tokenizer_config.json": [put("tokenizer_config.json", {
        "added_tokens_decoder": {"0": token("<|endoftext|>"), "320": token("[MASK]", lstrip=True),
                                 "321": token("<USER>", special=False, normalized=True)},
        "mask_token": "[MASK]", "eos_token": "<|endoftext|>"}), CHAT_MAP],
    "additional special tokens": [
        put("special_tokens_map.json", {"additional_special_tokens": ["<USER>", "[SEP]"]})],
    "extra special tokens": [put("tokenizer_config.json", {"extra_special_tokens": ["<USER>", "[SEP]"]})],
    "named extra special tokens": [
        put("tokenizer_config.json", {"extra_special_tokens": {"user": "<USER>"}})],
    "BOS before every text": [put("tokenizer_config.json", {"add_bos_token": True})],
    "BOS and EOS around every text": [ADDED, CHAT_MAP, put("tokenizer_config.json", {
        "add_bos_token": True, "add_eos_token": True})],
    "an end of its own": [rename_end, put("special_tokens_map.json", {
        name: "</s>" for name in ("bos_token", "eos_token", "unk_token", "pad_token")})],
    "control tokens as text": [ADDED, CHAT_MAP, put("tokenizer_config.json", {"split_special_tokens": True})],
    "BERT's": [word_pieces, put("tokenizer_config.json", {"tokenizer_class": "BertTokenizer"})],
    "BERT's with capitals": [word_pieces, put("tokenizer_config.json", {
        "tokenizer_class": "BertTokenizerFast", "do_lower_case": False, "strip_accents": True,
        "tokenize_chinese_chars": False})],
    "tokens as objects": [put("tokenizer_config.json", {
        "eos_token": {"__type": "AddedToken"} | token("<EOS>"),
        "bos_token": {"__type": "AddedToken"} | token("<BOS>", lstrip=True),
        "tokenizer_class": "GPT2Tokenizer"})],
}  # fmt: skip
FAST: dict[str, list[Change]] = {
    "tokenizer.json alone": [fast(lambda backend: None)],
    "tokenizer.json with tokens": [fast(lambda backend: backend.add_special_tokens(CHAT))],
    "tokenizer.json with plain tokens": [fast(lambda backend: backend.add_tokens(CHAT))],
    "tokenizer.json with add_prefix_space": [
        fast(lambda backend: None), put("tokenizer_config.json", {"add_prefix_space": True})],
    "tokenizer.json with a template": [fast(with_template)],
    "the same as PreTrainedTokenizerFast": [fast(with_template), put("tokenizer_config.json", FAST_CLASS)],
    "a normalizer, as PreTrainedTokenizerFast": [
        fast(set_normalizer), put("tokenizer_config.json", FAST_CLASS)],
    UNUSED: [fast(set_normalizer)],
    "words": [
        word_level,
        put("tokenizer_config.json", FAST_CLASS | {"mask_token": "[MASK]", "unk_token": "[UNK]"})],
    "its class in config.json": [fast(set_normalizer), put("config.json", FAST_CLASS)],
    "padding and truncation": [fast(set_padding)],
}  # fmt: skip


@pytest.fixture
def make(tmp_path: Path, tokenizer_folder: Path, make_reference: Callable) -> Callable[..., Path]:
    """make(changes): a folder with a configuration and a tokenizer."""

    def build(changes: list[Change], name: str = "base", **config: Any) -> Path:
        folder = tmp_path / name
        make_reference(vocab_size=VOCAB_SIZE, eos_token_id=0, bos_token_id=0).config.save_pretrained(folder)
        raw = json.loads((folder / "config.json").read_text()) | config
        put("config.json", raw)(folder)
        for file in ("vocab.json", "merges.txt"):
            shutil.copy(tokenizer_folder / file, folder)
        for change in changes:
            change(folder)
        if "vocab_size" not in json.loads((folder / "config.json").read_text()):
            put("config.json", raw | json.loads((folder / "config.json").read_text()))(folder)
        return folder

    return build


def assert_same_ids(folder: Path, texts: tuple[str, ...]) -> weights.Base:
    base, theirs = weights.load_on_meta(str(folder)), AutoTokenizer.from_pretrained(folder)
    for text in (*texts, *CONTROL_TEXTS):
        for special in (True, False):
            wanted = theirs(text, add_special_tokens=special, padding=False, truncation=False)["input_ids"]
            assert base.tokenizer.encode(text, add_special_tokens=special).ids == wanted, text
    return base


@pytest.mark.parametrize("name", SLOW)
def test_ids_are_those_of_transformers(make: Callable, texts: tuple[str, ...], name: str) -> None:
    folder = make(SLOW[name])
    base, theirs = assert_same_ids(folder, texts), AutoTokenizer.from_pretrained(folder)
    assert base.eos_token_id == (theirs.eos_token_id or 0)  # 0: BERT's has none, and config.json has 0
    first = theirs("a")["input_ids"][0]
    assert start_tokens(base.tokenizer) == ([first] if first in (theirs.bos_token_id, theirs.cls_token_id) else [])

    theirs.save_pretrained(folder.parent / "saved")  # as tokenizer.json and tokenizer_config.json
    shutil.copy(folder / "config.json", folder.parent / "saved")
    assert assert_same_ids(folder.parent / "saved", texts).eos_token_id == base.eos_token_id


@pytest.mark.parametrize("name", SLOW | FAST)
def test_transformers_tokenizes_a_saved_folder_as_its_base(
    make: Callable, make_gpt: Callable, texts: tuple[str, ...], name: str
) -> None:
    folder = make((SLOW | FAST)[name])
    saved = folder.parent / "saved"
    weights.save_folder(weights.load_on_meta(str(folder)), make_gpt(vocab_size=VOCAB_SIZE), saved)
    theirs, again = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(saved)
    for text in (*texts, *CONTROL_TEXTS):
        assert theirs(text)["input_ids"] == again(text)["input_ids"]
    assert theirs.special_tokens_map == again.special_tokens_map


def test_a_saved_folder_says_the_end_of_text_of_the_training(make: Callable, make_gpt: Callable) -> None:
    generation = put("generation_config.json", {"eos_token_id": 300, "_from_model_config": True, "top_k": 5})
    folder = make([ADDED, CHAT_MAP, generation], eos_token_id=300)
    base, saved = weights.load_on_meta(str(folder)), folder.parent / "saved"
    weights.save_folder(base, make_gpt(vocab_size=VOCAB_SIZE), saved)
    assert base.eos_token_id == 323
    assert json.loads((saved / "config.json").read_text())["eos_token_id"] == 323
    settings = GenerationConfig.from_pretrained(saved)
    assert settings.eos_token_id == 323 and settings.top_k == 5
    for name in ("added_tokens.json", "special_tokens_map.json", "vocab.json", "merges.txt"):
        assert (saved / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("name", FAST)
def test_ids_of_a_tokenizer_json_are_those_of_transformers(
    make: Callable, texts: tuple[str, ...], name: str
) -> None:
    base = assert_same_ids(make(FAST[name]), texts)
    assert any("GPT2Tokenizer does not use" in note for note in base.notes) == (name == UNUSED)


def random_settings(rng: random.Random) -> list[Change]:
    """Control tokens spread over the files that can declare them, each with flags of its own."""
    names = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"]
    some = rng.sample([*CHAT, "[MASK]", "[SEP]", "<pad>", "lunch", END], 7)
    flags = {name: rng.random() < 0.3 for name in ("lstrip", "rstrip", "single_word")}
    objects = [token(text, **flags) for text in some]
    options: dict[str, Any] = {}
    files: dict[str, Any] = {"tokenizer_config.json": options}
    for name in ("add_prefix_space", "add_bos_token", "add_eos_token", "split_special_tokens"):
        if rng.random() < 0.3:
            options[name] = rng.random() < 0.7
    if rng.random() < 0.3:
        options["added_tokens_decoder"] = {str(320 + i): one for i, one in enumerate(objects[:3])}
    elif rng.random() < 0.5:
        files["added_tokens.json"] = {text: 320 + i for i, text in enumerate(some[:3])}
    roles = dict(zip(rng.sample(names, 4), some[1:3] + objects[3:5], strict=True))
    file = rng.choice(["tokenizer_config.json", "special_tokens_map.json"])
    if file == "tokenizer_config.json":
        for name in list(roles)[2:]:
            roles[name] |= {"__type": "AddedToken"}
    files.setdefault(file, {}).update(roles)
    if rng.random() < 0.5:
        files[file]["additional_special_tokens"] = some[5:]
    return [put(name, value) for name, value in files.items()]


@pytest.mark.parametrize("start", range(4))
def test_ids_of_generated_settings_are_those_of_transformers(
    make: Callable, texts: tuple[str, ...], start: int
) -> None:
    rng = random.Random(start)
    for trial in range(12):
        folder = make(random_settings(rng), f"{trial}")
        if rng.random() < 0.5:
            AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
            if rng.random() < 0.5:
                options = json.loads((folder / "tokenizer_config.json").read_text())
                put("tokenizer_config.json", options | FAST_CLASS)(folder)
        assert_same_ids(folder, texts)


EOS: dict[str, tuple[list[Change], dict[str, Any], int | None, str]] = {
    "all agree": ([], {"eos_token_id": 0}, 0, ""),
    "config.json says nothing": ([], {"eos_token_id": None}, 0, ""),
    "config.json kept another's default": ([], {"eos_token_id": 50256}, 0, "config.json has 50256"),
    "config.json names a word": ([], {"eos_token_id": 300}, 0, "config.json has 300"),
    "declared by the tokenizer": (
        [put("tokenizer_config.json", {"eos_token": END})], {"eos_token_id": 300}, 0, "config.json has 300"),
    "a control token that only config.json names": (
        [ADDED], {"eos_token_id": 323}, 323, "the tokenizer has 0"),
    "a list": ([ADDED, CHAT_MAP], {"eos_token_id": [0, 323]}, 323, ""),
    "generation_config.json knows better": (
        [put("generation_config.json", {"eos_token_id": 7})],
        {"eos_token_id": 300}, 7, "config.json has 300"),
    "generation_config.json is a copy of config.json": (
        [put("generation_config.json", {"eos_token_id": 300, "_from_model_config": True})],
        {"eos_token_id": 300}, 0, "generation_config.json has 300"),
    "an end of its own, declared nowhere": ([rename_end], {"eos_token_id": 0}, 0, ""),
    "no end anywhere": ([rename_end], {"eos_token_id": 50256}, None, ""),
    "without a tokenizer": (
        [lambda folder: (folder / "vocab.json").unlink()], {"eos_token_id": 300}, 300, ""),
    "without a tokenizer, outside": (
        [lambda folder: (folder / "vocab.json").unlink()], {"eos_token_id": 50256}, None, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", EOS)
def test_the_end_of_text_is_the_one_of_the_training(make: Callable, name: str) -> None:
    changes, config, wanted, note = EOS[name]
    base = weights.load_on_meta(str(make(changes, **config)))
    assert base.eos_token_id == wanted
    assert len(base.notes) == bool(note) and all(note in line for line in base.notes)


def test_a_vocabulary_with_its_own_end_gets_no_second_one(make: Callable) -> None:
    base = weights.load_on_meta(str(make([rename_end])))
    assert base.tokenizer.get_vocab_size() == 320 and base.tokenizer.token_to_id(END) is None


def test_tokens_outside_the_vocabulary_are_left_out_and_said(make: Callable, texts: tuple[str, ...]) -> None:
    folder = make([ADDED, CHAT_MAP], vocab_size=322)
    base = weights.load_on_meta(str(folder))
    assert base.tokenizer.get_vocab_size() == 322 and base.eos_token_id == 0
    assert any("2 tokens of the tokenizer are left out" in note and "<BOS>" in note for note in base.notes)
    assert max(base.tokenizer.encode("".join(CHAT)).ids) < 322
    (folder / "tokenizer.json").write_text(AutoTokenizer.from_pretrained(folder).backend_tokenizer.to_str())
    assert weights.load_on_meta(str(folder)).tokenizer.get_vocab_size() == 322


@pytest.mark.parametrize(
    "file, content",
    [(file, content) for file in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                                  "tokenizer.json", "generation_config.json") for content in ("{", "[]", "3")]
    + [("tokenizer_config.json", json.dumps(value)) for value in (
        {"added_tokens_decoder": [1]}, {"added_tokens_decoder": {"x": {}}},
        {"added_tokens_decoder": {"1": 5}},
        {"eos_token": 3}, {"eos_token": {"content": [1]}}, {"extra_special_tokens": 3},
        {"added_tokens_decoder": {"1": {"content": "a", "lstrip": "x"}}})]
    + [("tokenizer.json", json.dumps(value)) for value in (
        {"model": 3}, {"model": {"type": "BPE", "vocab": 3, "merges": []}}, {"added_tokens": [3]},
        {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}, {"added_tokens": 3})]
    + [("added_tokens.json", '{"a": "b"}'), ("added_tokens.json", '{"a": [1]}'),
       ("generation_config.json", '{"eos_token_id": "x"}'), ("config.json", '{"eos_token_id": 1e99}')],
)  # fmt: skip
def test_damaged_files_are_refused_in_one_line_that_names_the_folder(
    make: Callable, file: str, content: str
) -> None:
    folder = make([])
    if file == "config.json":
        content = json.dumps(json.loads((folder / file).read_text()) | json.loads(content))
    (folder / file).write_text(content)
    with pytest.raises(UserError) as caught:
        weights.load_on_meta(str(folder))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
