"""The two tensor files of a run, written atomically, each with a checksum of its content.

    tuned.safetensors   the parameters that trained, at the best validation loss, bound to their base
    last.safetensors    the last state: parameters, optimizer, progress; a run resumes from it

Both are the same for any number of processes: rank 0 writes full tensors, and reads them for the others. They are
two files so that damage to one does not lose the other.
"""

import hashlib
import json
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minift import modes
from minift.data.row_store import Examples
from minift.distributed import broadcast, copy_from_rank0, full_tensor, is_main
from minift.errors import TrainingFailed, UserError
from minift.files import peft, safetensors
from minift.model.gpt import GPT, GPTConfig
from minift.options import from_json

FORMAT = 1
TUNED, LAST = "tuned.safetensors", "last.safetensors"
# options that may change when a run resumes: no result depends on them
IGNORED_ON_RESUME = ("mode", "model", "out", "overwrite", "resume", "device", "shard", "general", "seeds")
# options of earlier versions, with the value at which nothing is missing today
REMOVED_OPTIONS = {"on_nan": "stop", "max_skips": 10}


@dataclass
class Progress:
    """How far a run is. The best parameters may be those of step 0, the run's start. `window_*` sum up the training
    losses since the last validation."""

    step: int = 0
    best_step: int = 0
    best_val_loss: float = float("inf")
    best_after_start: float = float("inf")  # without step 0: early stopping counts from it
    evals_since_best: int = 0
    window_loss: float = 0.0
    window_steps: int = 0
    train_loss: float = float("nan")  # mean over the steps between the last two validations
    tokens: int = 0
    seconds: float = 0.0  # in training steps: without validation and saving
    early_stopped: bool = False
    peak_memory_bytes: int = 0  # highest up to the last validation; 0 if the platform does not report it

    def add_step(self, loss: float, tokens: int, seconds: float) -> None:
        self.step += 1
        self.window_loss += loss
        self.window_steps += 1
        self.tokens += tokens
        self.seconds += seconds


@dataclass(frozen=True)
class Tuned:
    """The content of a tuned file: a run's, or a PEFT folder, which does not name its base."""

    mode: str
    options: Any
    tensors: dict[str, Tensor]
    source: str
    metadata: dict[str, str]


# ---- what a file belongs to

def base_metadata(fingerprint: str, mode: str, mode_options: Any, base_name: str) -> dict[str, str]:
    """The mode, its options, and the base by name and fingerprint: a tuned tensor is of use with these alone."""
    return {"mode": mode, "options": json.dumps(asdict(mode_options)), "base": base_name,
            "fingerprint": fingerprint}


def training_metadata(options: Any, rows: dict[str, Examples], ignored: Collection[str] = ()) -> dict[str, str]:
    """The training options and a hash of the rows: a run resumes bit for bit with the same alone. `ignored`: options
    that were changed when the run was resumed, which its older files have otherwise."""
    chosen = {name: value for name, value in asdict(options).items() if name not in (*IGNORED_ON_RESUME, *ignored)}
    return {"training": json.dumps(chosen), "rows": rows["train"].store.digest}


def run_metadata(base_part: dict[str, str], training_part: dict[str, str]) -> dict[str, str]:
    """Both parts, for the files of a run. Raises UserError if the ranks of a run differ in them."""
    metadata = base_part | training_part
    if broadcast(lambda: metadata) != metadata:
        raise UserError("a process of this run has other options, rows or weights than rank 0: give every machine the "
                        "same")
    return metadata


def check_metadata(found: dict[str, str], expected: dict[str, str], path: Path) -> None:
    """Raises UserError, listing the differences, if a file's metadata does not match `expected`, which has base
    and fingerprint, and optionally mode, options, training and rows."""
    missing = {"mode", "options", "base", "fingerprint", *expected} - found.keys()
    if missing:
        raise UserError(f"{path} was not written by train.py: its metadata lacks {', '.join(sorted(missing))}")
    if found["fingerprint"] != expected["fingerprint"]:
        raise UserError(f"{path} was tuned on the base {found['base']} (fingerprint {found['fingerprint']}), and "
                        f"{expected['base']} is another base ({expected['fingerprint']}): pass the right --model")
    there, here = all_options(found, path), all_options(found | expected, path)
    differ = [f"{name} {there[name]} and not {here[name]}" for name in there
              if name in here and there[name] != here[name]]  # an option that the file lacks had its default
    if differ:
        raise UserError(f"{path} was made with other options than config.json has: {', '.join(differ)}; a run "
                        "resumes with the options it was started with")
    if found.get("rows") != expected.get("rows", found.get("rows")):
        raise UserError(f"{path} was made with other training or validation rows than there are now: a run "
                        "resumes with the rows it was started with")


def all_options(metadata: dict[str, str], path: Path) -> dict[str, Any]:
    """Mode, its options and the training options, by name, from a file's metadata."""
    try:
        return {"mode": metadata["mode"], **json.loads(metadata["options"]),
                **json.loads(metadata.get("training", "{}"))}
    except (ValueError, TypeError, RecursionError):
        raise UserError(f"{path} was not written by train.py: the options in its metadata cannot be read") from None


def drop_removed_options(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """Options as an earlier version wrote them, without those that no longer exist. Raises UserError if one of
    them was in use."""
    for name, unused in REMOVED_OPTIONS.items():
        if raw.get(name, unused) != unused:
            raise UserError(f"{path} cannot be used: {name} is {raw[name]!r:.60}, an option that this version no "
                            "longer has: use the version that made it")
    return {name: value for name, value in raw.items() if name not in REMOVED_OPTIONS}


# ---- files with a checksum

def checksum(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """A hash of names, dtypes, shapes, values and metadata."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        if tensor.numel():
            flat = full_tensor(tensor.detach()).cpu().contiguous().view(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def gather(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Full tensors on the CPU, one after the other, on rank 0; nothing on other ranks."""
    gathered = {}
    for name, tensor in tensors.items():
        full = full_tensor(tensor.detach())
        if is_main():
            gathered[name] = full.cpu().contiguous()
    return gathered


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Rank 0 writes a file atomically: until the new one is complete and on the disk, the old one remains."""
    if not is_main():
        return
    metadata = metadata | {"format": str(FORMAT)}
    try:
        safetensors.write(path, tensors, metadata | {"sha256": checksum(tensors, metadata)})
    except UserError as error:
        resumable = path.with_name(LAST).exists()
        remedy = f"train.py --resume {path.parent} continues" if resumable else "start again"
        raise UserError(f"{error}; free disk space or fix permissions, then {remedy}") from None


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata that `write` wrote. Raises UserError when the file is missing, damaged or of a newer
    format, and says whether the run's other file is there."""
    try:
        if not path.is_file():
            raise UserError(f"{path} is missing")
        tensors, metadata = safetensors.read(path)
        found = metadata.get("format", "")
        if found.isdecimal() and len(found) < 10 and int(found) > FORMAT:
            raise UserError(f"{path} has format {found}, newer than this version's {FORMAT}: update minift")
        if metadata.pop("sha256", None) != checksum(tensors, metadata):
            raise UserError(f"{path} is damaged: its checksum does not match its content")
    except UserError as error:
        other, use = path.with_name(LAST), "train.py --resume continues from it"
        if path.name == LAST:
            other, use = path.with_name(TUNED), "eval.py can use it"
        hint = f" ({other.name} beside it is there: {use})" if other.is_file() else ""
        raise UserError(f"{error}{hint}") from None
    return tensors, metadata


def read_on_rank0(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """`read` for every rank, of rank 0's file: other ranks get the metadata, and tensors without values that
    copy_from_rank0 fills."""
    tensors, metadata = read(path) if is_main() else ({}, {})
    shapes, metadata = broadcast(lambda: ({n: t.to("meta") for n, t in tensors.items()}, metadata))
    return tensors if is_main() else shapes, metadata


def has_saved(folder: Path) -> bool:
    """Whether a run in this folder saved anything that it could resume from, or that a new run would overwrite."""
    names = (LAST, TUNED, "metrics.jsonl")
    return broadcast(lambda: any((folder / name).exists() for name in names))


# ---- the tuned file

def save_tuned(folder: Path, model: GPT, metadata: dict[str, str], progress: Progress) -> None:
    """Save the parameters that train, as they are now."""
    metadata = metadata | {"step": str(progress.step), "val_loss": str(progress.best_val_loss)}
    write(folder / TUNED, gather(modes.tuned_parameters(model)), metadata)


def read_tuned(folder: Path, gpt_config: GPTConfig) -> Tuned:
    """The tuned file of a run's folder, or a PEFT folder for a base of this shape. Raises UserError when it is
    damaged or not usable here."""
    if peft.is_folder(folder):
        mode, options, tensors = peft.read(folder, gpt_config)
        return Tuned(mode, options, tensors, str(folder), {})
    path = folder / TUNED
    if not path.is_file() and not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds nothing tuned: a run's folder has {TUNED}, one of PEFT {peft.CONFIG}")
    tensors, metadata = read(path)
    if missing := {"mode", "options", "base", "fingerprint"} - metadata.keys():
        raise UserError(f"{path} was not written by train.py: its metadata lacks {', '.join(sorted(missing))}")
    mode = metadata["mode"]
    if mode not in modes.MODES:
        raise UserError(f"{path} was made in mode {mode!r}; known here: {', '.join(modes.MODES)}")
    try:
        raw = json.loads(metadata["options"])
    except (ValueError, RecursionError):
        raise UserError(f"{path} was not written by train.py: the options in its metadata cannot be read") from None
    return Tuned(mode, from_json(modes.MODES[mode].Options, raw, str(path)), tensors, str(path), metadata)


def check_tuned_belongs(tuned: Tuned, expected: dict[str, str]) -> None:
    """Raises UserError if a run's tuned file belongs to another base, or to other options than `expected` has. A
    PEFT folder does not say: only its shapes can be checked."""
    if tuned.metadata:
        check_metadata(tuned.metadata, expected, Path(tuned.source))


def apply_tuned(model: GPT, tuned: Tuned) -> None:
    """Apply a tuned file's mode to the untouched base `model` and load its tensors. Raises UserError."""
    modes.apply(model, tuned.mode, tuned.options)
    model.set_compute_dtype(model.compute_dtype)  # tuned parameters are fp32, in a cast base too
    modes.load_tuned(model, tuned.tensors, tuned.source)


def load_best(folder: Path, model: GPT) -> None:
    """Load the best parameters so far into a model that has the run's mode."""
    modes.load_tuned(model, read_on_rank0(folder / TUNED)[0], str(folder / TUNED))


def best_is_intact(folder: Path, expected: dict[str, str]) -> bool:
    """Whether the best parameters so far can be read. Raises UserError when they are another run's."""
    def read_metadata() -> dict[str, str] | None:
        try:
            return read(folder / TUNED)[1]
        except UserError:
            return None

    metadata = broadcast(read_metadata)
    if metadata is not None:
        check_metadata(metadata, expected, folder / TUNED)
    return metadata is not None


def tuned_bytes(folder: Path) -> int:
    """The size of the tuned file."""
    return broadcast(lambda: (folder / TUNED).stat().st_size)


# ---- the last state

def save_last(folder: Path, model: GPT, metadata: dict[str, str], optimizer: torch.optim.Optimizer,
              progress: Progress) -> None:
    """Save all that a bit-exact resume needs. Raises TrainingFailed if a parameter is not finite."""
    tensors = {}
    for name, parameter in modes.tuned_parameters(model).items():
        tensors[f"tuned.{name}"] = parameter
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
    tensors = gather(tensors)
    tuned = {name.removeprefix("tuned."): t for name, t in tensors.items() if name.startswith("tuned.")}
    # broadcast: rank 0 alone has the tensors, and all ranks must end the training together
    if bad := broadcast(lambda: [name for name, tensor in tuned.items() if not tensor.isfinite().all()]):
        raise TrainingFailed(f"step {progress.step}: {bad[0]} is no longer finite; {folder / LAST} is kept as it was "
                             "before: lower --lr")
    write(folder / LAST, tensors, metadata | {"progress": json.dumps(asdict(progress))})


def load_last(folder: Path, model: GPT, metadata: dict[str, str],
              optimizer: torch.optim.Optimizer) -> Progress:
    """The reverse of `save_last`, into a model that has the run's mode. Raises UserError when the file is damaged
    or was made with other options, rows or base."""
    path = folder / LAST
    tensors, found = read_on_rank0(path)
    check_metadata(found, metadata, path)
    parameters = {n.removeprefix("tuned."): t for n, t in tensors.items() if n.startswith("tuned.")}
    modes.load_tuned(model, parameters, str(path))
    tuned = modes.tuned_parameters(model)
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, entry, name = key.split(".", 2)
            if tensor.dim():
                state = torch.empty_like(tuned[name])
            else:  # the step count, which AdamW keeps on the CPU unless it is fused
                on_cpu = entry == "step" and not optimizer.defaults["fused"]
                state = torch.empty((), device="cpu" if on_cpu else tuned[name].device)
            optimizer.state[tuned[name]][entry] = state
            copy_from_rank0(state, tensor)
    return read_progress(found, path)


def saved_progress(folder: Path, expected: dict[str, str]) -> Progress:
    """How far the run in a folder is, from its last state. Raises UserError when the file is damaged or has other
    metadata than `expected`, of other options, rows or base."""
    def read_last() -> Progress:
        _, found = read(folder / LAST)
        check_metadata(found, expected, folder / LAST)
        return read_progress(found, folder / LAST)

    return broadcast(read_last)


def read_progress(metadata: dict[str, str], path: Path) -> Progress:
    raw = json.loads(metadata["progress"])
    for old, new in (("stale", "evals_since_best"), ("stopped", "early_stopped")):  # names of an earlier version
        if old in raw:
            raw[new] = raw.pop(old)
    raw.pop("skipped", None)
    raw.setdefault("best_after_start", raw.get("best_val_loss", float("inf")))  # earlier versions had no step 0
    return from_json(Progress, raw, str(path))
