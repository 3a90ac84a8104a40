"""GPT-2 weights in and out: a Hugging Face folder, or a model of the Hub by name.

Loading compares names and shapes exactly, and an error names every difference. GPT-2's files have its matrices as
(in, out), from its layer Conv1D; the model's linear layers have (out, in). So the four kinds of CONV1D are transposed.
"""

import hashlib
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from minift.device import configure_process, release_pages
from minift.errors import UserError
from minift.files import atomic, safetensors
from minift.files.gpt2_config import read_config, saved_config
from minift.files.hub import PRESETS, find_folder
from minift.files.special_tokens import end_of_text, token_ids
from minift.files.tokenizer import FILES as TOKENIZER_FILES
from minift.files.tokenizer import load_tokenizer
from minift.model.gpt import GPT, GPTConfig, compare_shapes

CONV1D = re.compile(r"h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight")
MASK_BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # causal masks, which old files hold as tensors
TIED_HEADS = ("lm_head.weight", "lm_head.decoder.weight")  # names of the token embedding as output head
GPT2_MODULES = ("transformer", "wte", "wpe", "h", "ln_f", "lm_head")
OTHER_HEADS = ("multiple_choice_head", "score", "classifier", "qa_outputs", "v_head")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Base:
    """A loaded base: the model, and its source."""

    name: str  # as the user wrote it
    folder: Path | None  # None for a preset that was not fetched
    model: GPT  # frozen, in fp32, on the CPU or on the meta device
    tokenizer: Tokenizer | None
    fingerprint: str | None  # of the weights; None on the meta device
    eos_token_id: int | None = None  # ends every row; None if no file names a token of the vocabulary
    notes: tuple[str, ...] = ()  # lines to print


# ---- reading


def load(name: str) -> Base:
    """The base of a folder's path or a name of the Hub, see find_folder. Raises UserError."""
    configure_process()
    base = read_folder(name, find_folder(name))
    tensors, notes = use_gpt2_names(read_tensors(base.folder), str(base.folder))
    check_tensors(tensors, base.model, str(base.folder))
    for key in filter(CONV1D.fullmatch, list(tensors)):
        tensors[key] = tensors[key].T
    # assign: the parameters are the tensors mapped from the file, which copying would read into memory
    base.model.load_state_dict(tensors, assign=True)
    base.model.requires_grad_(False)
    return replace(base, fingerprint=fingerprint(base.model), notes=(*base.notes, *notes))


def with_eos(base: Base, token: str | None) -> Base:
    """The base with the token of --eos, given as its text or its number, as end-of-text; None keeps the base's.
    Raises UserError for a token that the base does not have."""
    if token is None:
        return base
    if token.isascii() and token.isdecimal() and len(token) < 10:
        number = int(token)
    else:
        number = None if base.tokenizer is None else base.tokenizer.token_to_id(token)
    if number is None or number >= base.model.config.vocab_size:
        raise UserError(f"--eos {token!r:.60}: {base.name} has no such token: give the text of a token, such as "
                        f"'</s>', or a number below {base.model.config.vocab_size}")
    return replace(base, eos_token_id=number)


def required_eos(base: Base) -> int:
    """The end-of-text of a base that needs one. Raises UserError."""
    if base.eos_token_id is None:
        raise UserError(f"{base.folder}: no file there names an end-of-text, which ends every row: give --eos TOKEN, "
                        "the text of a token or its number")
    return base.eos_token_id


def load_on_meta(name: str) -> Base:
    """The base without its weights, on the meta device. A preset needs neither folder nor network. Raises UserError."""
    if name in PRESETS:
        config = PRESETS[name].config
        return Base(name, None, model_on_meta(config, name), None, None, eos_token_id=config.eos_token_id)
    return read_folder(name, find_folder(name))


def read_folder(name: str, folder: Path) -> Base:
    """The base of a folder without its weights. Raises UserError."""
    config, raw = read_config(folder)
    tokenizer, settings = load_tokenizer(folder, raw, config.vocab_size)
    eos, notes = end_of_text(folder, raw, tokenizer, settings, config.vocab_size)
    model = model_on_meta(replace(config, eos_token_id=eos), str(folder / "config.json"))
    return Base(name, folder, model, tokenizer, None, eos, (*settings.notes, *notes))


def model_on_meta(config: GPTConfig, where: str) -> GPT:
    """A frozen model without weights. Raises UserError for sizes that no tensor can have."""
    try:
        with torch.device("meta"):
            return GPT(config).requires_grad_(False)
    except (RuntimeError, OverflowError, TypeError) as error:
        why = str(error).splitlines()[0][:100]
        raise UserError(f"{where}: no model can have these sizes: {why}") from None


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, with the names that its files use. Raises UserError."""
    # in transformers' order of preference
    kinds: list[tuple[str, Callable[[Path], dict[str, Tensor]]]] = [
        ("model.safetensors", lambda path: safetensors.read(path)[0]),
        ("pytorch_model.bin", read_bin),
    ]
    for file, read in kinds:
        if (folder / file).is_file():
            return read(folder / file)
        if (folder / f"{file}.index.json").is_file():
            return read_shards(folder / f"{file}.index.json", read)
    raise UserError(f"{folder} holds no weights: there must be model.safetensors, pytorch_model.bin, or the "
                    "index.json of one of them with its shards")


def read_shards(index: Path, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of the shards that an index lists. Raises UserError unless each is in the shard that is listed."""
    listed = atomic.read_json(index, dict).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise UserError(f"{index}: weight_map must map tensor names to file names")
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(listed.values())):
        # an index must not make us open a file elsewhere, such as ../../secret
        if Path(file).name != file or "\\" in file or file in ("", ".", ".."):
            raise UserError(f"{index}: {file!r} is not the name of a file in the same folder, and is not "
                            "opened")
        if not (index.parent / file).is_file():
            raise UserError(f"{index} lists {file}, which is missing: fetch it again")
        found = read(index.parent / file)
        wrong = sorted(set(found) ^ {name for name, shard in listed.items() if shard == file})
        if wrong:
            raise UserError(f"{index} and {file} disagree on these tensors: {', '.join(wrong)}")
        tensors.update(found)
    return tensors


def read_bin(path: Path) -> dict[str, Tensor]:
    """A state dict written by torch.save. Raises UserError."""
    try:
        with warnings.catch_warnings(action="ignore"):  # about old pickle protocols
            state = torch.load(path, map_location="cpu", weights_only=True)  # runs no code of a pickle
    except Exception as error:  # torch.load raises many kinds of error for a damaged or a hostile file
        why = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{path} cannot be read as a file of plain tensors: {why}") from None
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise UserError(f"{path} must hold a dictionary of tensors (a state dict)")
    return state


def use_gpt2_names(tensors: dict[str, Tensor], where: str) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors in fp32 under the model's names, and notes to print.

    `transformer.` is removed from names. Mask buffers, the tied head and heads of other tasks are left out. Raises
    UserError.
    """
    has_prefix = any(name.startswith("transformer.") for name in tensors)
    result: dict[str, Tensor] = {}
    heads: dict[str, Tensor] = {}
    left_out = set()
    for name in list(tensors):
        tensor = tensors.pop(name)  # so that an fp16 tensor is freed when its fp32 copy exists
        module = name.partition(".")[0]
        short = name.removeprefix("transformer.")
        if MASK_BUFFER.fullmatch(short):
            continue
        # beside a GPT-2 that is called "transformer", any other module is a head
        if module in OTHER_HEADS or has_prefix and module not in GPT2_MODULES:
            left_out.add(module)
            continue
        if short in result:
            raise UserError(f"{where}: {short} is there twice, with and without 'transformer.'")
        if tensor.dtype not in FLOATS:
            raise UserError(f"{where}: {name} is {tensor.dtype}; weights must be fp32, fp16 or bf16")
        if short in TIED_HEADS:
            heads[short] = tensor.float()
        else:
            result[short] = tensor.float()

    for name, head in heads.items():
        # some programs save the tied tensor only under the head's name
        embedding = result.setdefault("wte.weight", head)
        if not torch.equal(head, embedding):
            raise UserError(f"{where}: {name} differs from wte.weight; GPT-2's head is tied, and an untied "
                            "one is not supported")
    notes = [f"{where}: {name} is left out: a head that the language model does not use"
             for name in sorted(left_out)]
    return result, notes


def check_tensors(tensors: dict[str, Tensor], model: GPT, where: str) -> None:
    """Raises UserError, with up to 20 differences, unless names and shapes are exactly the model's."""
    expected = shapes(model)
    for name in filter(CONV1D.fullmatch, expected):
        expected[name] = torch.Size(reversed(expected[name]))
    differences = compare_shapes(expected, {name: tensor.shape for name, tensor in tensors.items()})
    if differences:
        some = "; ".join(differences[:20]) + ("; ..." if len(differences) > 20 else "")
        raise UserError(f"{where}: {len(differences)} tensors do not fit config.json: {some}")


def shapes(model: GPT) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


@torch.no_grad()
def fingerprint(model: GPT) -> str:
    """A hash of all parameters in fp32; 32 hex digits. It is the same for all dtypes and formats of a file."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)};".encode())
        digest.update(parameter.detach().contiguous().numpy().data)
        release_pages(parameter)  # hashing reads every page of the file; most are not needed again soon
    return digest.hexdigest()[:32]


# ---- writing


def make_folder(folder: Path) -> None:
    """Make a folder, which may exist if it is empty. Raises UserError."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty: name a new folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be written to: {error.strerror}; name another folder") from None


@torch.no_grad()
def save_folder(base: Base, model: GPT, folder: Path) -> None:
    """Write `model`, tuned from `base` and merged (modes.merge), as a Hugging Face folder in fp32.

    The folder must be new or empty. Raises UserError.
    """
    parameters = dict(model.named_parameters())
    tensors = {}
    # only GPT-2's parameters: a merged model may still hold those of its mode
    for name in shapes(model_on_meta(model.config, str(folder))):
        tensor = parameters[name].T if CONV1D.fullmatch(name) else parameters[name]
        tensors[f"transformer.{name}"] = tensor.float()
    raw = {} if base.folder is None else atomic.read_json(base.folder / "config.json", dict)

    make_folder(folder)
    atomic.write_json(folder / "config.json", saved_config(raw, model.config, base.eos_token_id))
    if base.folder is not None:
        copy_tokenizer(base, folder)
    elif base.tokenizer is not None:
        atomic.write_text(folder / "tokenizer.json", base.tokenizer.to_str(pretty=True))
    safetensors.write(folder / "model.safetensors", tensors, {"format": "pt"})


def copy_tokenizer(base: Base, folder: Path) -> None:
    """Copy the tokenizer's files, so that transformers gives the same token ids and stops at the same end-of-text."""
    for file in TOKENIZER_FILES:
        if (base.folder / file).is_file():
            atomic.write_atomically(folder / file, [(base.folder / file).read_bytes()])
    path = folder / "generation_config.json"
    if path.is_file() and base.eos_token_id is not None:
        generation = atomic.read_json(path, dict)
        if base.eos_token_id not in token_ids(generation, path):
            atomic.write_json(path, generation | {"eos_token_id": base.eos_token_id})
