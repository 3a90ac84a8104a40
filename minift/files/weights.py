"""GPT-2 weights in and out: a Hugging Face folder, or a model of the Hub by name.

Loading compares names and shapes exactly and names every difference. Files keep GPT-2's Conv1D layout, (in,
out); the model's linear layers are (out, in), and the four kinds of matrix below are turned round on the way.
"""

import hashlib
import json
import re
import shutil
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from minift.device import configure_process, release_pages
from minift.errors import UserError, tokenizer_faults
from minift.files import safetensors
from minift.model.gpt import GPT, GPTConfig

HUB = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt")
OTHER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
CONV1D = re.compile(r"h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight")
MASK_BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # causal masks that old files carry along
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Base:
    """A loaded model with what belongs to it. `model` is frozen and stays untouched: a run tunes a shared copy."""

    name: str
    folder: Path
    model: GPT
    tokenizer: Tokenizer | None
    fingerprint: str | None

    @property
    def eos_token_id(self):
        return self.model.config.eos_token_id


def load(name: str) -> Base:
    configure_process()
    base = load_on_meta(name)
    folder, model = base.folder, base.model
    tensors = canonical(read_tensors(folder), str(folder))
    check_tensors(tensors, {key: p.shape for key, p in model.named_parameters()}, str(folder))
    for key in filter(CONV1D.fullmatch, list(tensors)):
        tensors[key] = tensors[key].T
    model.load_state_dict(tensors, assign=True)
    model.requires_grad_(False)
    return replace(base, fingerprint=fingerprint(model))


def load_on_meta(name: str) -> Base:
    folder = find_folder(name)
    config = GPTConfig.from_json(read_json(folder / "config.json"), str(folder / "config.json"))
    if config.n_layer > 1000:
        raise UserError(f"{folder / 'config.json'}: n_layer is {config.n_layer}, and 1,000 is as far as this "
                        "goes")
    try:
        with torch.device("meta"):
            model = GPT(config)
    except (RuntimeError, OverflowError, TypeError) as error:  # a tensor too large for torch to describe
        why = str(error).splitlines()[0][:100]
        raise UserError(f"{folder / 'config.json'}: no model can have these sizes: {why}") from None
    return Base(name, folder, model, load_tokenizer(folder, config), None)


def find_folder(name: str) -> Path:
    """A bare name means the Hub, anything with a separator (or a leading dot or ~) a folder."""
    if name in HUB:
        return download(name)
    if not re.search(r"[/\\]|^[.~]", name):
        hint = f" (a folder of that name is here: write ./{name})" if Path(name).is_dir() else ""
        raise UserError(f"--model {name}: not a model of the Hub that is known here: {', '.join(HUB)}{hint}; "
                        "a folder is written as a path, such as ./my-gpt2")
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise UserError(f"--model {name}: there is no such folder; it must hold config.json, the weights "
                        "(model.safetensors or pytorch_model.bin) and tokenizer.json or vocab.json + "
                        "merges.txt")
    return folder


def download(name: str) -> Path:
    """A model of the Hub, from the cache or over the network, with huggingface_hub's progress bars."""
    wanted = ["config.json", "model.safetensors", *TOKENIZER_FILES, *OTHER_FILES]
    by_hand = (f"put config.json, model.safetensors, vocab.json and merges.txt of huggingface.co/{HUB[name]} "
               f"into a folder and pass its path, such as --model ./{name}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"--model {name} needs the package huggingface_hub, which tokenizers brings along; "
                        f"or {by_hand}") from None
    try:
        return Path(snapshot_download(HUB[name], allow_patterns=wanted))
    except Exception as error:  # a network can fail in many ways, and each of them has the same remedy
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"--model {name} could not be fetched from the Hub ({why}); without a network, "
                        f"{by_hand}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: a model's folder needs it") from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, and must hold a JSON object")
    return value


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder under the names that its files use."""
    if (folder / "model.safetensors").is_file():
        return safetensors.read(folder / "model.safetensors")[0]
    if (folder / "model.safetensors.index.json").is_file():
        return read_shards(folder / "model.safetensors.index.json")
    if (folder / "pytorch_model.bin").is_file():
        return read_bin(folder / "pytorch_model.bin")
    raise UserError(f"{folder} holds no weights: there must be model.safetensors, "
                    "model.safetensors.index.json with "
                    "its shards, or pytorch_model.bin")


def read_shards(index: Path) -> dict[str, Tensor]:
    """The shards that an index lists; each tensor must lie in the shard that the index says."""
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise UserError(f"{index}: weight_map must map tensor names to file names")
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(listed.values())):
        if Path(file).name != file or "\\" in file or file in ("", ".", ".."):
            raise UserError(f"{index}: {file!r} is not the name of a file in the same folder, and is not "
                            "opened")
        if not (index.parent / file).is_file():
            raise UserError(f"{index} lists {file}, which is missing: fetch it again")
        found = safetensors.read(index.parent / file)[0]
        wrong = sorted(set(found) ^ {name for name, shard in listed.items() if shard == file})
        if wrong:
            raise UserError(f"{index} and {file} disagree on these tensors: {', '.join(wrong)}")
        tensors.update(found)
    return tensors


def read_bin(path: Path) -> dict[str, Tensor]:
    """A state dict written by torch.save, read with weights_only=True: no pickled code is ever run."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of a pickle's age: it is read or refused either way
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises half a dozen kinds for a damaged or a hostile file
        why = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{path} cannot be read as a file of plain tensors: {why}") from None
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise UserError(f"{path} must hold a dictionary of tensors (a state dict)")
    return state


def canonical(tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """GPT-2's names without `transformer.`, without mask buffers and without the tied head; values in
    fp32."""
    result: dict[str, Tensor] = {}
    for name in list(tensors):
        tensor = tensors.pop(name)  # freed as soon as it is converted
        short = name.removeprefix("transformer.")
        if MASK_BUFFER.fullmatch(short):
            continue
        if short in result:
            raise UserError(f"{where}: {short} stands there twice, with and without 'transformer.'")
        if tensor.dtype not in FLOATS:
            raise UserError(f"{where}: {name} is {tensor.dtype}; weights must be fp32, fp16 or bf16")
        result[short] = tensor.float()
    head = result.pop("lm_head.weight", None)
    if head is not None and "wte.weight" in result and not torch.equal(head, result["wte.weight"]):
        raise UserError(f"{where}: lm_head.weight differs from wte.weight; GPT-2's head is tied, and an "
                        "untied one is not supported")
    return result


def check_tensors(tensors: dict[str, Tensor], shapes: dict[str, torch.Size], where: str) -> None:
    """Names and shapes must be the model's, exactly; every difference is named in one error."""
    faults = [f"{name} is missing" for name in shapes if name not in tensors]
    faults += [f"{name} is not a tensor of this model" for name in tensors if name not in shapes]
    for name in shapes.keys() & tensors.keys():
        shape = tuple(shapes[name][::-1] if CONV1D.fullmatch(name) else shapes[name])
        if tuple(tensors[name].shape) != shape:
            faults.append(f"{name} is {tuple(tensors[name].shape)}, and config.json asks for {shape}")
    if faults:
        raise UserError(f"{where}: {len(faults)} tensors do not fit: {'; '.join(sorted(faults))}")


def load_tokenizer(folder: Path, config: GPTConfig) -> Tokenizer | None:
    """From tokenizer.json, or from vocab.json + merges.txt; None when the folder has neither."""
    whole, vocab, merges = (folder / file for file in TOKENIZER_FILES)
    with tokenizer_faults(f"{folder}: the tokenizer's files cannot be read"):
        if whole.is_file():
            tokenizer = Tokenizer.from_file(str(whole))
        elif vocab.is_file() and merges.is_file():
            tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
            tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
        else:
            return None
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.decode(tokenizer.encode("It works.").ids)
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if highest >= config.vocab_size:
        raise UserError(f"{folder}: the tokenizer has token {highest}, and config.json a vocabulary of "
                        f"{config.vocab_size}: they do not belong together")
    return tokenizer


@torch.no_grad()
def fingerprint(model: GPT) -> str:
    """A hash of every base value in fp32, the same whatever dtype or layout the base was stored in."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)};".encode())
        digest.update(parameter.detach().contiguous().numpy().data)
        release_pages(parameter)
    return digest.hexdigest()[:32]


def make_folder(folder: Path) -> None:
    """A new folder to write to; an empty one will do. Raises UserError."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty: name a new folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be written to: {error.strerror}; name another folder") from None


@torch.no_grad()
def save_folder(base: Base, model: GPT, folder: Path) -> None:
    """Write a plain GPT-2 as a Hugging Face folder, in fp32: config.json, model.safetensors, the tokenizer's
    files.

    The model must hold GPT-2's parameters and no others (see modes.merge). The folder must be new or empty.
    """
    make_folder(folder)
    with torch.device("meta"):
        names = list(GPT(model.config).state_dict())
    state = dict(model.named_parameters())
    tensors = {}
    for name in names:
        tensor = state[name].T if CONV1D.fullmatch(name) else state[name]
        tensors[f"transformer.{name}"] = tensor.float().contiguous()
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    if base.folder is not None:
        config |= read_json(base.folder / "config.json")
        for file in (*TOKENIZER_FILES, *OTHER_FILES):
            if (base.folder / file).is_file():
                shutil.copyfile(base.folder / file, folder / file)
    config |= asdict(model.config) | {"dtype": "float32", "tie_word_embeddings": True}
    config.pop("torch_dtype", None)  # the older name of dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if not any((folder / file).is_file() for file in TOKENIZER_FILES) and base.tokenizer is not None:
        base.tokenizer.save(str(folder / "tokenizer.json"))
    safetensors.write(folder / "model.safetensors", tensors, {"format": "pt"})
