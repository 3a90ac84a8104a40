"""The two tensor files of a run, written atomically, with a checksum of all that they hold.

    tuned.safetensors   the parameters that trained, at the best validation loss, bound to their base
    last.safetensors    everything needed to go on: parameters, optimizer, progress

Both are the same whatever the number of processes: rank 0 writes whole tensors, and gives them to the others.
Best and last are apart, so that one survives whatever happens to the other.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minift import distributed as parallel
from minift import modes
from minift.data.dataset import Example
from minift.errors import UserError
from minift.files import peft, safetensors
from minift.model.gpt import GPT
from minift.options import from_json
from minift.run import folder as run

FORMAT = 1
TUNED, LAST = "tuned.safetensors", "last.safetensors"
FREE = ("mode", "model", "out", "overwrite", "resume", "device", "shard", "general")  # no result needs them


@dataclass
class Progress:
    """How far a run is. `stale` counts the validations since the best one, `window_*` sums up the losses
    since the last one."""

    step: int = 0
    best_step: int = 0
    best_val_loss: float = float("inf")
    stale: int = 0
    window_loss: float = 0.0
    window_steps: int = 0
    train_loss: float = float("nan")  # mean over the steps between the last two validations
    tokens: int = 0
    seconds: float = 0.0  # spent in training steps: neither validation nor saving
    skipped: int = 0  # steps left out because their gradient was not finite
    stopped: bool = False


def checksum(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """A hash of names, types, shapes, values and metadata."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        if tensor.numel():
            digest.update(parallel.whole(tensor.detach()).cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Atomically: until the new file is whole and on the disk, the old one stays. `tensors` come from
    `gather`."""
    if not parallel.FIRST:
        return
    metadata = metadata | {"format": str(FORMAT)}
    try:
        safetensors.write(path, tensors, metadata | {"sha256": checksum(tensors, metadata)})
    except UserError as error:
        safe = f"train.py --resume {path.parent} goes on" if path.with_name(LAST).exists() else "start again"
        raise UserError(f"{error}; make room or leave to write there, then {safe}") from None


def gather(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors on the CPU, one after the other: on rank 0; nothing on the others."""
    gathered = {}
    for name, tensor in tensors.items():
        full = parallel.whole(tensor.detach())
        if parallel.FIRST:
            gathered[name] = full.cpu().contiguous()
    return gathered


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `write` wrote. Raises UserError when the file is missing, damaged or of a newer format, and says
    whether the run's other file could serve."""
    try:
        if not path.is_file():
            raise UserError(f"{path} is missing")
        tensors, metadata = safetensors.read(path)
        found = metadata.get("format", "")
        if found.isdecimal() and len(found) < 10 and int(found) > FORMAT:
            raise UserError(f"{path} has format {found}, newer than this version's {FORMAT}: update minift")
        if metadata.pop("sha256", None) != checksum(tensors, metadata):
            raise UserError(f"{path} is damaged: its checksum does not fit what it holds")
    except UserError as error:
        other = path.with_name(LAST if path.name == TUNED else TUNED)
        use = "train.py --resume goes on from it" if other.name == LAST else "eval.py can use it"
        raise UserError(f"{error}" + (f" ({other.name} beside it is there: {use})" if other.is_file() else "")
                        ) from None
    return tensors, metadata


def read_on_first(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """`read` for every rank, of rank 0's file: the others get the metadata, and tensors without values that
    parallel.fill fills."""
    tensors, metadata = read(path) if parallel.FIRST else ({}, {})
    shapes, metadata = parallel.from_first(lambda: ({n: t.to("meta") for n, t in tensors.items()}, metadata))
    return tensors if parallel.FIRST else shapes, metadata


def identity(model: GPT, mode: str, options: Any, base: str) -> dict[str, str]:
    """What a tuned tensor belongs to: the mode, its options, and the base by name and fingerprint."""
    return {"mode": mode, "options": json.dumps(asdict(options)), "base": base,
            "fingerprint": str(model.fingerprint)}


def course(options: Any, rows: dict[str, list[Example]]) -> dict[str, str]:
    """What a run must share with its beginning to be bit-identical: the training options and the rows."""
    chosen = {name: value for name, value in asdict(options).items() if name not in FREE}
    digest = hashlib.sha256()
    for name in ("train", "val"):
        for example in rows[name]:
            digest.update(f"{name} {example.n_prompt} {example.ids};".encode())
    return {"training": json.dumps(chosen), "rows": digest.hexdigest()}


def check(metadata: dict[str, str], belongs: dict[str, str], path: Path) -> None:
    """Raises UserError, with the difference, unless a file belongs where it is about to be used. `belongs`
    has base and fingerprint, and of the rest what must agree."""
    missing = {"mode", "options", "base", "fingerprint", *belongs} - metadata.keys()
    if missing:
        raise UserError(f"{path} is not a run's: its metadata has no {', '.join(sorted(missing))}")
    if metadata["fingerprint"] != belongs["fingerprint"]:
        raise UserError(f"{path} was tuned on the base {metadata['base']} (fingerprint "
                        f"{metadata['fingerprint']}), and {belongs['base']} is another one "
                        f"({belongs['fingerprint']}): pass the right --model")
    there, here = settings(metadata, path), settings(metadata | belongs, path)
    differ = [f"{name} {there.get(name)} and not {here.get(name)}" for name in there | here
              if there.get(name) != here.get(name)]
    if differ:
        raise UserError(f"{path} was made with other options than config.json has: {', '.join(differ)}; a "
                        "run goes on with the options it was started with")
    if metadata.get("rows") != belongs.get("rows", metadata.get("rows")):
        raise UserError(f"{path} was made on other training or validation rows than there are now: a run "
                        "goes on with the rows it was started with")


def settings(metadata: dict[str, str], path: Path) -> dict[str, Any]:
    """Mode, its options, and the training options if they are there, by name."""
    try:
        return {"mode": metadata["mode"], **json.loads(metadata["options"]),
                **json.loads(metadata.get("training", "{}"))}
    except (ValueError, TypeError, RecursionError):
        raise UserError(f"{path} is not a run's: the options in its metadata cannot be read") from None


def best_is_whole(folder: Path, belongs: dict[str, str]) -> bool:
    """False when the best parameters so far are missing or damaged; UserError when they are another run's."""
    try:
        metadata = read(folder / TUNED)[1]
    except UserError:
        return False
    check(metadata, belongs, folder / TUNED)
    return True


def finished(folder: Path) -> dict[str, Any] | None:
    """What result.json holds, if the run ended and its tuned file is still whole."""
    try:
        read(folder / TUNED)
        return json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (UserError, OSError, ValueError):
        return None


def save_tuned(folder: Path, model: GPT, belongs: dict[str, str], progress: Progress) -> None:
    """The parameters that train, as they are now. `belongs` comes from `identity`."""
    write(folder / TUNED, gather(modes.tuned_parameters(model)),
          belongs | {"step": str(progress.step), "val_loss": str(progress.best_val_loss)})


def read_tuned(folder: Path, model: GPT, base: str, expected: dict[str, str] | None = None
               ) -> tuple[str, Any, dict[str, Tensor]]:
    """The mode, its options and the tuned tensors of a run's folder, or of one in PEFT's form. `base` names
    `model`, the untouched base, or a blank one, which has no fingerprint to compare yet. `expected` comes
    from `identity`, with the mode and options that config.json has.

    Raises UserError when the file is damaged, belongs to another base, or cannot be honoured.
    """
    path = folder / TUNED
    if peft.is_folder(folder):
        return peft.read(folder, model.config)
    if not path.is_file() and not run.is_run(folder):
        raise UserError(f"{folder} holds nothing tuned: a run's folder has {TUNED}, one of PEFT "
                        f"{peft.CONFIG}")
    tensors, metadata = read(path)
    here = {"base": base, "fingerprint": str(model.fingerprint or metadata.get("fingerprint"))}
    check(metadata, expected or here, path)
    mode = metadata["mode"]
    if mode not in modes.MODES:
        raise UserError(f"{path} was made in mode {mode!r}; known here: {', '.join(modes.MODES)}")
    return mode, from_json(modes.MODES[mode].Options, json.loads(metadata["options"]), str(path)), tensors


def load_tuned(folder: Path, model: GPT, base: str, expected: dict[str, str] | None = None) -> str:
    """Apply the mode of a folder (see `read_tuned`) to the untouched base `model` and load what was tuned;
    gives the mode's name. Raises UserError."""
    mode, options, tensors = read_tuned(folder, model, base, expected)
    modes.apply(model, mode, options)
    model.set_compute_dtype(model.compute_dtype)  # what is tuned goes back to fp32 before it is filled
    modes.load_tuned(model, tensors, str(folder if peft.is_folder(folder) else folder / TUNED))
    return mode


def load_best(folder: Path, model: GPT) -> None:
    """The best parameters so far into a model that has the run's mode already."""
    modes.load_tuned(model, read_on_first(folder / TUNED)[0], str(folder / TUNED))


def save_last(folder: Path, model: GPT, belongs: dict[str, str], optimizer: torch.optim.Optimizer,
              progress: Progress) -> None:
    """Everything needed to go on as if nothing had happened. UserError: the parameters are not finite."""
    tensors = {}
    for name, parameter in modes.tuned_parameters(model).items():
        tensors[f"tuned.{name}"] = parameter
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
    tensors = gather(tensors)
    broken = [name for name, t in tensors.items() if name.startswith("tuned.") and not t.isfinite().all()]
    if broken:
        raise UserError(f"step {progress.step}: {broken[0].removeprefix('tuned.')} is no longer finite; "
                        f"{folder / LAST} is kept as it was before: lower --lr")
    write(folder / LAST, tensors, belongs | {"progress": json.dumps(asdict(progress))})


def load_last(folder: Path, model: GPT, belongs: dict[str, str],
              optimizer: torch.optim.Optimizer) -> Progress:
    """The reverse of `save_last`, into a model to which the run's mode was applied. Raises UserError when the
    file was made with other options or on another base."""
    path = folder / LAST
    tensors, metadata = read_on_first(path)
    check(metadata, belongs, path)
    saved = {name.removeprefix("tuned."): t for name, t in tensors.items() if name.startswith("tuned.")}
    modes.load_tuned(model, saved, str(path))
    tuned = modes.tuned_parameters(model)
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, entry, name = key.split(".", 2)
            on_cpu = entry == "step" and not optimizer.defaults["fused"]  # as AdamW itself keeps its count
            place = "cpu" if on_cpu else tuned[name].device
            like = torch.empty_like(tuned[name]) if tensor.dim() else torch.empty((), device=place)
            optimizer.state[tuned[name]][entry] = like
            parallel.fill(like, tensor)
    return from_json(Progress, json.loads(metadata["progress"]), str(path))
