"""Damage of every kind is found and named; nothing trains on it, scores it, or overwrites a good file with it."""

import errno
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import (
    QUICK,
    assert_same_tensors,
    evaluate,
    files,
    json_of,
    metrics,
    read_late,
    step_losses,
    tensors,
    train,
    trained,
    write_pairs,
)

import train as script
from minift import modes
from minift.errors import UserError
from minift.files import checkpoint, safetensors

TUNED, LAST = "tuned.safetensors", "last.safetensors"


pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def common(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    pairs = write_pairs(tmp_path_factory.mktemp("data") / "pairs")
    return ["--model", str(model_folder), "--data", str(pairs), *QUICK, "--mode", "lora", "--steps", "6"]


@pytest.fixture(scope="module")
def sound(common: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "run"
    trained(*common, "--rank", 1, "--targets", "q,v", "--out", folder)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound, tmp_path / "run")
    return tmp_path / "run"


def corrupt(whole: bytes, rng: random.Random) -> tuple[str, bytes]:
    """One seeded damage: bits flipped, blocks swapped, zeroed or moved, the file cut or made longer."""
    damaged, place = bytearray(whole), rng.randrange(len(whole))
    kind = rng.choice(["bit", "bit", "byte", "swap", "zero", "cut", "grow", "shift"])
    size = min(rng.choice([1, 4, 8, 64, 512]), len(whole) // 4)
    if kind == "bit":
        damaged[place] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        damaged[place] ^= rng.randrange(1, 256)
    elif kind == "swap":
        a, b = sorted(rng.sample(range(len(whole) // size), 2))
        a, b = a * size, b * size
        damaged[a : a + size], damaged[b : b + size] = whole[b : b + size], whole[a : a + size]
    elif kind == "zero":
        damaged[place : place + size] = bytes(len(whole[place : place + size]))
    elif kind == "cut":
        del damaged[place:]
    elif kind == "grow":
        damaged += rng.randbytes(size)
    else:
        del damaged[place : place + size]
        damaged += bytes(len(whole) - len(damaged))
    return f"{kind} of {size} at {place}", bytes(damaged)


@pytest.mark.parametrize("name, other, use", [(TUNED, LAST, "--resume"), (LAST, TUNED, "eval.py")])
def test_no_corruption_is_accepted(folder: Path, name: str, other: str, use: str) -> None:
    """500 of each file; each message names the file and what is still there."""
    whole, seen = (folder / name).read_bytes(), 0
    for seed in range(500):
        kind, damaged = corrupt(whole, random.Random(f"{name} {seed}"))
        if damaged == whole:
            continue
        seen += 1
        (folder / name).write_bytes(damaged)
        with pytest.raises(UserError) as error:
            checkpoint.read(folder / name)
            raise AssertionError(f"{kind} of {name} was accepted")
        assert str(folder / name) in str(error.value) and other in str(error.value), kind
        assert use in str(error.value), kind
    assert seen > 450


@pytest.mark.parametrize("name", [TUNED, LAST])
@pytest.mark.parametrize("kind", ["bit", "cut", "gone", "the other file", "another run's"])
def test_the_scripts_refuse_it(folder: Path, name: str, kind: str, tmp_path: Path, common: list[str]) -> None:
    whole = (folder / name).read_bytes()
    if kind == "bit":
        (folder / name).write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    elif kind == "cut":
        (folder / name).write_bytes(whole[: len(whole) // 2])
    elif kind == "gone":
        (folder / name).unlink()
    elif kind == "the other file":
        shutil.copyfile(folder / (LAST if name == TUNED else TUNED), folder / name)
    else:
        trained(*common, "--rank", 1, "--targets", "q,v", "--seed", 1, "--out", tmp_path / "two")
        shutil.copyfile(tmp_path / "two" / name, folder / name)
    before = {file: (folder / file).read_bytes() for file in files(folder)}
    if name == TUNED and kind != "another run's":
        ended = evaluate(folder, "--prompt", "a")
        assert LAST in ended.err or kind == "the other file"
    else:  # another run's tuned file is of the same base and options: only resuming would mix the two
        ended = train("--resume", folder)
        assert TUNED in ended.err or kind in ("the other file", "another run's")
    assert ended.code == 2 and ended.err.count("\n") == 1 and str(folder / name) in ended.err, ended.err
    assert {file: (folder / file).read_bytes() for file in files(folder)} == before


def test_resuming_continues_without_the_best_file(folder: Path) -> None:
    """As the message of a damaged tuned.safetensors promises: the last parameters take its place."""
    values, metadata = checkpoint.read(folder / LAST)
    progress = checkpoint.saved_progress(folder, metadata)
    progress.best_step, progress.best_val_loss = 1, progress.best_val_loss - 0.5  # those of the lost file were better
    checkpoint.write(folder / LAST, values, metadata | {"progress": json.dumps(asdict(progress))})
    last = tensors(folder / LAST)
    kept = {name: t.clone() for name, t in last.items()}
    (folder / TUNED).write_bytes(b"damaged")
    assert "train.py --resume continues from it" in evaluate(folder, "--prompt", "a").err
    out = trained("--resume", folder)
    assert "missing or damaged" in out and "replace them" in out
    found = tensors(folder / TUNED)
    assert all(torch.equal(t, kept[f"tuned.{name}"]) for name, t in found.items())
    assert evaluate(folder, "--prompt", "a").code == 0
    # a later start compares with this file, not with the one that was lost
    saved = checkpoint.read(folder / TUNED)[1]
    progress = checkpoint.saved_progress(folder, checkpoint.read(folder / LAST)[1])
    assert float(saved["val_loss"]) == progress.best_val_loss and int(saved["step"]) == progress.best_step


def test_eval_needs_only_the_best_file(folder: Path) -> None:
    (folder / LAST).unlink()
    assert evaluate(folder, "--prompt", "a").code == 0
    ended = train("--resume", folder)
    assert ended.code == 2 and f"{folder / LAST} is missing" in ended.err and "eval.py can use it" in ended.err


@pytest.mark.parametrize("name", [TUNED, LAST])
def test_a_newer_format_is_refused(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, metadata = checkpoint.read(folder / name)
    monkeypatch.setattr(checkpoint, "FORMAT", 7)
    checkpoint.write(folder / name, {n: t.clone() for n, t in found.items()}, metadata)
    monkeypatch.undo()
    ended = evaluate(folder, "--prompt", "a") if name == TUNED else train("--resume", folder)
    assert ended.code == 2 and "format 7, newer than this version's 1: update minift" in ended.err


def edit(folder: Path, section: str, **changes: Any) -> None:
    raw = json_of(folder / "config.json")
    raw[section] |= changes
    (folder / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize(
    "section, change, words",
    [
        ("mode_options", {"alpha": 8.0}, "alpha 16.0 and not 8.0"),
        ("mode_options", {"rank": 2}, "rank 1 and not 2"),
        ("train", {"lr": 0.5}, f"lr {modes.MODES['lora'].lr} and not 0.5"),
        ("train", {"batch": 3, "seed": 4}, "batch 4 and not 3, seed 0 and not 4"),
        ("train", {"steps": 60}, "steps 6 and not 60"),
        ("data", {"rows": 7}, "other training or validation rows"),
    ],
)
def test_resuming_with_other_options_is_refused(folder: Path, section: str, change: dict, words: str) -> None:
    edit(folder, section, **change)
    ended = train("--resume", folder)
    assert ended.code == 2 and words in ended.err and str(folder / LAST) in ended.err, ended.err


def test_resuming_on_other_rows_is_refused(folder: Path, tmp_path: Path, common: list[str]) -> None:
    pairs = tmp_path / "pairs"
    shutil.copytree(common[3], pairs)
    edit(folder, "data", data=str(pairs))
    trained("--resume", folder)  # the same rows elsewhere
    lines = (pairs / "train.jsonl").read_text()
    (pairs / "train.jsonl").write_text(lines.replace("lunch", "dinner", 1))
    ended = train("--resume", folder)
    assert ended.code == 2 and "other training or validation rows" in ended.err


def test_resuming_on_another_base_is_refused(folder: Path, tmp_path: Path, model_folder: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "base")
    edit(folder, "train", model=str(tmp_path / "base"))
    trained("--resume", folder)  # the same base elsewhere
    found = {name: t.clone() for name, t in tensors(tmp_path / "base" / "model.safetensors").items()}
    found["transformer.ln_f.bias"][3] += 1e-6
    safetensors.write(tmp_path / "base" / "model.safetensors", found, {"format": "pt"})
    ended = train("--resume", folder)
    assert ended.code == 2 and "fingerprint" in ended.err and str(tmp_path / "base") in ended.err


@pytest.mark.parametrize("text", [b"{nonsense\n", b"\xff\n", b"[]\n", b'{"loss": 1}\n', b'{"step": "1"}\n'])
def test_a_damaged_log_is_reported(folder: Path, text: bytes) -> None:
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_bytes(b"".join(lines[:2]) + text + b"".join(lines[2:]))
    ended = train("--resume", folder)
    assert ended.code == 2 and f"{folder / 'metrics.jsonl'}:3" in ended.err and "empty file" in ended.err
    (folder / "metrics.jsonl").write_bytes(b"")  # as it says
    trained("--resume", folder)


def test_a_missing_log_is_reported(folder: Path) -> None:
    before = (folder / LAST).read_bytes()
    (folder / "metrics.jsonl").unlink()
    ended = train("--resume", folder)
    assert ended.code == 2 and "metrics.jsonl:1 cannot be read" in ended.err and "empty file" in ended.err
    assert (folder / LAST).read_bytes() == before


class FullDisk:
    """os.fsync, os.write and os.replace, of which one kind fails from its n-th call on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, function: str, first: int):
        original, self.calls = getattr(os, function), 0

        def failing(*arguments: Any, **named: Any) -> Any:
            self.calls += 1
            if self.calls >= first:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*arguments, **named)

        monkeypatch.setattr(os, function, failing)


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("first", range(1, 12))
def test_a_full_disk_loses_nothing_that_was_saved(
    common: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, first: int
) -> None:
    """At every write: one line that names the file, and no file that is incomplete."""
    folder = tmp_path / "x"
    disk = FullDisk(monkeypatch, function, first)
    ended = train(*common, "--eval-every", 2, "--out", folder)
    calls = disk.calls
    monkeypatch.undo()
    if calls < first:
        assert ended.code == 0
        return
    if ended.code == 0:  # only the folder's own sync failed, which not every system can do
        assert function == "fsync"
        return
    assert ended.code == 2 and ended.err.count("\n") == 1 and "No space left on device" in ended.err
    assert str(folder) in ended.err
    if not folder.exists():  # nothing was saved
        return
    for name in (TUNED, LAST):
        if (folder / name).exists():
            checkpoint.read(folder / name)
    assert not list(folder.glob(".*.tmp")) or function == "replace"
    if (folder / LAST).exists():
        assert (folder / "config.json").exists() and trained("--resume", folder)


def test_a_disk_that_fills_up_is_reported_with_the_way_to_resume(
    common: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full from step 4 on, at the second validation."""
    folder, save_tuned = tmp_path / "x", checkpoint.save_tuned

    def then_full(*arguments: Any) -> None:
        save_tuned(*arguments)
        if arguments[-1].step:  # the start is saved before
            FullDisk(monkeypatch, "fsync", 1)

    monkeypatch.setattr(checkpoint, "save_tuned", then_full)
    ended = train(*common, "--eval-every", 2, "--patience", 0, "--out", folder)
    monkeypatch.undo()
    assert ended.code == 2 and "last.safetensors: cannot be written: No space left" in ended.err
    assert "previous file is untouched" in ended.err and f"train.py --resume {folder} continues" in ended.err
    assert json.loads(checkpoint.read(folder / LAST)[1]["progress"])["step"] == 0
    trained("--resume", folder)
    trained(*common, "--eval-every", 2, "--patience", 0, "--out", tmp_path / "whole")
    assert_same_tensors(folder, tmp_path / "whole")
    assert metrics(folder) == metrics(tmp_path / "whole")


def test_the_log_on_a_full_disk(common: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    original = script.MetricsLog.__init__

    def full(self: Any, folder: Path, step: int) -> None:
        original(self, folder, step)
        self.file.close()
        self.file = open("/dev/full", "a")  # noqa: SIM115

    monkeypatch.setattr(script.MetricsLog, "__init__", full)
    ended = train(*common, "--out", tmp_path / "x")
    assert ended.code == 2 and "metrics.jsonl cannot be written: No space left" in ended.err
    assert ended.err.count("\n") == 1 and f"--resume {tmp_path / 'x'}" in ended.err


def as_nobody(action: Callable[[], None]) -> None:
    """Run it in a fork that is not root, since root may write everywhere; what it raises fails the test."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        try:
            if os.getuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            action()
            os.write(write, b"fine")
        except BaseException as error:  # noqa: BLE001
            os.write(write, repr(error).encode()[:4000])
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with open(read, "rb") as answer:
        assert answer.read() == b"fine"


def test_a_read_only_folder(common: list[str], sound: Path, model_folder: Path) -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        place = Path(name)
        shutil.copytree(sound, place / "run")
        shutil.copytree(model_folder, place / "base")
        shutil.copytree(common[3], place / "pairs")
        arguments = ["--model", str(place / "base"), "--data", str(place / "pairs"), *common[4:]]
        edit(place / "run", "train", model=str(place / "base"))
        edit(place / "run", "data", data=str(place / "pairs"))
        (place / "closed").mkdir()
        for path in [*place.rglob("*"), place]:
            path.chmod(0o555 if path.is_dir() else 0o444)

        def check() -> None:
            ended = train(*arguments, "--out", place / "closed" / "x")
            assert ended.code == 2 and "Permission denied" in ended.err and ended.err.count("\n") == 1, ended
            ended = train("--resume", place / "run")
            assert ended.code == 2 and "cannot be written to: Permission denied" in ended.err, ended
            ended = evaluate(place / "run", "--prompt", "a")  # reading it is fine
            assert ended.code == 0, ended

        as_nobody(check)
        for path in [place, *place.rglob("*")]:
            path.chmod(0o755)
        assert {file: (place / "run" / file).read_bytes() for file in (TUNED, LAST)} == {
            file: (sound / file).read_bytes() for file in (TUNED, LAST)
        }


def poisoned(model_folder: Path, to: Path) -> Path:
    """A base that overflows in fp32 as soon as a row reaches its position 60 (and no earlier)."""
    shutil.copytree(model_folder, to)
    found = {name: t.clone() for name, t in tensors(to / "model.safetensors").items()}
    found["transformer.wpe.weight"][60] = 3e38
    safetensors.write(to / "model.safetensors", found, {"format": "pt"})
    return to


def test_a_huge_learning_rate_stops_the_run(common: list[str], tmp_path: Path) -> None:
    """The first step ruins the parameters, the second detects it, and the checkpoint before both is intact."""
    options = ["--lr", 1e30, "--clip", 0, "--warmup-ratio", 0, "--eval-every", 6]
    ended = train(*common, *options, "--out", tmp_path / "x")
    assert ended.code == 2 and ended.err.count("\n") == 1, ended.err
    for word in ("step 2: the loss is nan", "largest gradient", "lora_", "train.jsonl:", f"{LAST} is intact", "--lr"):
        assert word in ended.err, ended.err
    found, metadata = checkpoint.read(tmp_path / "x" / LAST)
    assert json.loads(metadata["progress"])["step"] == 0
    assert all(t.isfinite().all() for t in found.values() if t.is_floating_point())
    assert not (tmp_path / "x" / "result.json").exists()


def test_ruined_parameters_are_never_saved(common: list[str], tmp_path: Path) -> None:
    """Validation directly after the step that ruins them: they get into neither file."""
    options = ["--lr", 1e30, "--clip", 0, "--warmup-ratio", 0, "--eval-every", 1]
    ended = train(*common, *options, "--out", tmp_path / "x")
    assert ended.code == 2 and "step 1: the validation loss is" in ended.err and "intact" in ended.err
    assert json.loads(checkpoint.read(tmp_path / "x" / LAST)[1]["progress"])["step"] == 0
    assert checkpoint.read(tmp_path / "x" / TUNED)[1]["step"] == "0"


@pytest.fixture
def with_a_bad_row(tmp_path: Path, model_folder: Path, common: list[str]) -> list[Any]:
    """Arguments for 24 short rows in the order of their file, of which the 14th meets the overflow."""
    base, folder = poisoned(model_folder, tmp_path / "base"), tmp_path / "rows"
    rows = [{"prompt": f"{i} a{' long' * 18 if i == 13 else ''} =", "completion": "b"} for i in range(24)]
    lines = [json.dumps(row) + "\n" for row in rows]
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(lines))
    for split in ("val", "test"):
        (folder / f"{split}.jsonl").write_text("".join(lines[:4]))
    return ["--model", base, "--data", folder, *common[4:], "--order", "file", "--eval-every", 2]


@pytest.mark.parametrize("late", [False, True])
def test_a_step_that_is_not_finite_names_its_rows(with_a_bad_row: list[Any], tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch, late: bool) -> None:
    """Late: the step after it has begun when it is found. Neither changes a parameter."""
    norms = []
    if late:
        read_late(monkeypatch)
        with_a_bad_row += ["--eval-every", 9]  # a validation would read the step at once
        step = script.train_step
        monkeypatch.setattr(script, "train_step", lambda model, *others: norms.append(
            sum(p.norm().item() for p in model.parameters() if p.requires_grad)) or step(model, *others))
    ended = train(*with_a_bad_row, "--out", tmp_path / "x")
    assert ended.code == 2 and "step 4: the loss is nan" in ended.err
    assert "train.jsonl:13, train.jsonl:14, train.jsonl:15, train.jsonl:16" in ended.err
    assert "train.jsonl:12" not in ended.err and "train.jsonl:17" not in ended.err
    assert len(step_losses(tmp_path / "x")) == 3
    assert json.loads(checkpoint.read(tmp_path / "x" / LAST)[1]["progress"])["step"] == (0 if late else 2)
    if late:
        assert len(norms) == 5 and norms[2] != norms[3] == norms[4]
