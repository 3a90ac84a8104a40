"""A run's folder: what a run was asked, how it went, and the tensors it made.

    config.json         every option with its value and where it came from
    metrics.jsonl       one line a step, and the validation loss where it was measured
    tuned.safetensors   the parameters that trained, at the best validation loss, bound to their base
    last.safetensors    everything needed to go on: parameters, optimizer, random state, progress
    result.json         the scores at the end

Tensor files are written atomically and carry a checksum of all they hold. Best and last are apart, so that
one survives whatever happens to the other.
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import modes, safetensors
from .data import DataOptions
from .errors import UserError
from .model import GPT

FORMAT = 1


@dataclass
class Progress:
    """How far a run is. `stale` counts the validations since the best one."""

    step: int = 0
    best_step: int = 0
    best_val_loss: float = float("inf")
    stale: int = 0
    train_loss: float = float("nan")  # mean over the steps since the last validation
    tokens: int = 0
    seconds: float = 0.0  # spent in training steps: neither validation nor saving
    stopped: bool = False


@dataclass(frozen=True)
class Config:
    """A run's resolved options, and for each where its value came from: {name: (value, origin)}."""

    mode: str
    train: Any  # train.py's TrainOptions
    data: DataOptions
    own: Any  # the mode's Options
    origins: dict[str, tuple[Any, str]]

    @property
    def prompt_tokens(self) -> int:
        """Positions that the mode's soft prompt will take; 0 for a mode without one."""
        return getattr(self.own, "prompt_tokens", 0)


def describe(config: Config) -> str:
    """The configuration as lines of `name = value (origin)`, defaults last and together."""
    chosen = [f"  {name} = {value}  ({origin})" for name, (value, origin) in config.origins.items()
              if origin != "default"]
    defaults = ", ".join(f"{n} {v}" for n, (v, origin) in config.origins.items()
                         if origin == "default" and v is not None)
    return "\n".join([f"mode {config.mode}", *chosen, f"  by default: {defaults}"])


def save_config(folder: Path, config: Config) -> None:
    write_json(folder / "config.json", {
        "format": FORMAT, "mode": config.mode, "train": asdict(config.train), "data": asdict(config.data),
        "own": asdict(config.own), "origins": config.origins})


def load_config(folder: Path, train_options: type) -> Config:
    """What `save_config` wrote. Raises UserError when the folder is not a run's, or the options are not this
    version's."""
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        train, own = train_options(**raw["train"]), modes.MODES[raw["mode"]].Options(**raw["own"])
        return Config(raw["mode"], train, DataOptions(**raw["data"]), own, raw["origins"])
    except FileNotFoundError:
        raise UserError(f"{folder} is not a run's folder: it has no config.json") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be used: {type(error).__name__}: {error}") from None


def checksum(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def write_checked(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    safetensors.write(path, tensors, metadata | {"sha256": checksum(tensors, metadata)})


def read_checked(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Raises UserError when the file is missing, damaged, or of a newer format."""
    if not path.is_file():
        raise UserError(f"{path} is missing")
    tensors, metadata = safetensors.read(path)
    expected = metadata.pop("sha256", None)
    if expected != checksum(tensors, metadata):
        raise UserError(f"{path} is damaged: its checksum does not fit its contents")
    if int(metadata["format"]) > FORMAT:
        raise UserError(f"{path} has format {metadata['format']}, and this version reads up to {FORMAT}: "
                        "update minift")
    return tensors, metadata


def create(folder: Path, overwrite: bool) -> Path:
    """A new, empty folder for a run. Raises UserError if it is there already; `overwrite` empties a run's
    folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not overwrite:
            raise UserError(f"{folder} exists already: name another --out, or pass --overwrite to replace "
                            "that run")
        if not any((folder / file).is_file() for file in ("config.json", "compare.json")):
            raise UserError(f"{folder} is not a run's folder, and --overwrite does not touch it: name "
                            "another --out")
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be made: {error.strerror}") from None
    return folder


def next_free(stem: Path) -> Path:
    """runs/lora-1, runs/lora-2, ...: the first that is not there."""
    number = 1
    while (folder := stem.with_name(f"{stem.name}-{number}")).exists():
        number += 1
    return folder


def write_json(path: Path, value: Any) -> None:
    """Atomically, so that a reader never sees half a file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def save_tuned(folder: Path, model: GPT, mode: str, options: Any, base: str, progress: Progress) -> None:
    """The parameters that train, with the mode, its options and the base's fingerprint."""
    write_checked(folder / "tuned.safetensors", modes.tuned_parameters(model), {
        "format": str(FORMAT), "mode": mode, "options": json.dumps(asdict(options)), "base": base,
        "fingerprint": str(model.fingerprint), "step": str(progress.step),
        "val_loss": str(progress.best_val_loss)})


def load_tuned(folder: Path, model: GPT, base: str) -> str:
    """Apply the run's mode to the untouched base `model` and load what was tuned; gives the mode's name.

    Raises UserError when the file is damaged, belongs to another base, or does not fit.
    """
    path = folder / "tuned.safetensors"
    tensors, metadata = read_checked(path)
    if metadata["fingerprint"] != model.fingerprint:
        raise UserError(f"{path} was tuned on the base {metadata['base']} (fingerprint "
                        f"{metadata['fingerprint']}), and "
                        f"{base} is another one ({model.fingerprint}): pass the right --model")
    mode, options = metadata["mode"], json.loads(metadata["options"])
    if mode not in modes.MODES:
        raise UserError(f"{path} was made in mode {mode!r}, which is not known here: "
                        f"{', '.join(modes.MODES)}")
    modes.apply(model, mode, modes.MODES[mode].Options(**options))
    model.set_compute_dtype(model.compute_dtype)  # what is tuned goes back to fp32 before it is filled
    modes.load_tuned(model, tensors, str(path))
    return mode


def save_last(folder: Path, model: GPT, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    """Everything needed to go on as if nothing had happened."""
    tensors = {f"tuned.{name}": p for name, p in modes.tuned_parameters(model).items()}
    for name, parameter in modes.tuned_parameters(model).items():
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
    tensors["random.cpu"] = torch.get_rng_state()
    if model.device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(model.device)
    write_checked(folder / "last.safetensors", tensors,
                  {"format": str(FORMAT), "progress": json.dumps(asdict(progress))})


def load_last(folder: Path, model: GPT, optimizer: torch.optim.Optimizer) -> Progress:
    """The reverse of `save_last`, into a model to which the run's mode was applied."""
    path = folder / "last.safetensors"
    tensors, metadata = read_checked(path)
    tuned = modes.tuned_parameters(model)
    saved = {name.removeprefix("tuned."): t for name, t in tensors.items() if name.startswith("tuned.")}
    modes.load_tuned(model, saved, str(path))
    for name, parameter in tuned.items():
        state = {key.split(".", 2)[1]: tensor.clone() for key, tensor in tensors.items()
                 if key.startswith("optimizer.") and key.split(".", 2)[2] == name}
        optimizer.state[parameter] = {key: value if key == "step" else value.to(parameter.device)
                                      for key, value in state.items()}
    torch.set_rng_state(tensors["random.cpu"].clone())
    if "random.cuda" in tensors and model.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random.cuda"].clone(), model.device)
    return Progress(**json.loads(metadata["progress"]))


class MetricsLog:
    """metrics.jsonl, a line at a time. Opened at step n, it drops the lines after n: those steps will be run
    again."""

    def __init__(self, folder: Path, step: int):
        self.path = folder / "metrics.jsonl"
        kept = [line for line in read_metrics(folder) if line["step"] <= step] if step else []
        temporary = self.path.with_name("metrics.jsonl.tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, self.path)
        self.file = open(self.path, "a", encoding="utf-8")

    def write(self, **values: Any) -> None:
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line cut short by a crash is left out."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
