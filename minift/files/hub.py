"""Models by name: the known sizes of GPT-2, a folder's path, or any GPT-2 of the Hugging Face Hub."""

import re
from dataclasses import dataclass
from pathlib import Path

from minift.errors import UserError
from minift.files import tokenizer
from minift.files.gpt2_config import read_config
from minift.model.gpt import GPTConfig


@dataclass(frozen=True)
class Preset:
    """A model with a short name."""

    config: GPTConfig
    repository: str | None  # OWNER/NAME of the Hub; None: its weights are not published


PRESETS = {
    "gpt2": Preset(GPTConfig(), "openai-community/gpt2"),
    "gpt2-medium": Preset(GPTConfig(n_embd=1024, n_layer=24, n_head=16), "openai-community/gpt2-medium"),
    "gpt2-large": Preset(GPTConfig(n_embd=1280, n_layer=36, n_head=20), "openai-community/gpt2-large"),
    "gpt2-xl": Preset(GPTConfig(n_embd=1600, n_layer=48, n_head=25), "openai-community/gpt2-xl"),
    "distilgpt2": Preset(GPTConfig(n_layer=6), "distilbert/distilgpt2"),
    # Brown et al. 2020, table 2.1; for train.py --plan alone
    "gpt3-175b": Preset(GPTConfig(n_embd=12288, n_layer=96, n_head=96, n_positions=2048), None),
}
HUB_NAMES = [name for name, preset in PRESETS.items() if preset.repository is not None]

REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")  # OWNER/NAME or OWNER/NAME@REVISION
SMALL_FILES = ["config.json", *tokenizer.FILES]
SAFETENSORS = ["model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"]
BIN = ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"]


def find_folder(name: str) -> Path:
    """The folder of --model: a preset's name, a path, or OWNER/NAME[@REVISION] of the Hub.

    Raises UserError.
    """
    if name in HUB_NAMES:
        return download(name, PRESETS[name].repository, None)
    # a path has a slash or begins with . or ~: a misspelled preset is then never taken for a folder
    if not re.search(r"[/\\]|^[.~]", name):
        hint = f" (a folder of that name is here: write ./{name})" if Path(name).is_dir() else ""
        raise UserError(f"--model {name}: not a model of the Hub that is known here: {', '.join(HUB_NAMES)}"
                        f"{hint}; a folder is written as a path, such as ./my-gpt2, and another model of the "
                        "Hub as OWNER/NAME")
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    match = REPOSITORY.fullmatch(name)
    if match and not folder.exists() and not name.startswith("."):
        return download(name, match[1], match[2])
    raise UserError(f"--model {name}: there is no such folder; it must hold config.json, the weights "
                    "(model.safetensors or pytorch_model.bin) and tokenizer.json or vocab.json + merges.txt")


def download(name: str, repository: str, revision: str | None) -> Path:
    """The folder of a model of the Hub, from the cache or over the network. Raises UserError."""
    # the configuration first: another architecture is refused before gigabytes of weights are fetched
    folder = fetch(name, repository, revision, ["config.json"])
    if not (folder / "config.json").is_file():
        raise UserError(f"--model {name}: this repository of the Hub has no config.json, so it is no GPT-2 "
                        "that can be loaded")
    read_config(folder)
    fetch(name, repository, revision, [*SMALL_FILES, *SAFETENSORS])
    # many repositories have the same weights in both formats: the second one only if it is needed
    if not any((folder / file).is_file() for file in SAFETENSORS[:2]):
        fetch(name, repository, revision, BIN)
    return folder


def fetch(name: str, repository: str, revision: str | None, files: list[str]) -> Path:
    """The folder of a repository's snapshot, with those of its files that match the patterns `files`.

    `name` is the user's, for the message. Raises UserError.
    """
    problem = f"--model {name}" if name in PRESETS else f"--model {name}: there is no such folder, and it"
    folder = name.partition("@")[0].rpartition("/")[2]
    by_hand = ("put config.json, model.safetensors, vocab.json and merges.txt of "
               f"huggingface.co/{repository} into a folder and pass its path, such as --model ./{folder}")
    try:
        from huggingface_hub import snapshot_download  # takes a third of a second, and no folder needs it
    except ImportError:
        raise UserError(f"{problem} needs the package huggingface_hub, which tokenizers brings along; "
                        f"or {by_hand}") from None
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=files))
    except Exception as error:  # a network fails in many ways, and the remedy is always the same
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{problem} could not be fetched from the Hub ({why}); without a network, "
                        f"{by_hand}") from None
