"""The tensor files of a run: a file that is damaged, newer or of another base is refused."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import MODES
from torch import Tensor

from minift import modes
from minift.errors import UserError
from minift.files import checkpoint, safetensors, weights
from minift.files.checkpoint import LAST, TUNED, Progress
from minift.files.weights import Base
from minift.model.gpt import GPT
from minift.model.packing import text_row


def start(folder: Path, mode: str) -> tuple[GPT, dict[str, str], torch.optim.Optimizer]:
    """A base with a mode applied, the metadata of its files, and its optimizer."""
    base = weights.load(str(folder))
    model, options = base.model.shared_copy().eval(), modes.MODES[mode].Options(**MODES[mode].options)
    modes.apply(model, mode, options)
    optimizer = torch.optim.AdamW(modes.tuned_parameters(model).values(), lr=1e-2)
    return model, checkpoint.base_metadata(base.fingerprint, mode, options, str(folder)), optimizer


def step(model: GPT, optimizer: torch.optim.Optimizer, times: int) -> None:
    ids = torch.randint(320, (3, 9), generator=torch.Generator().manual_seed(0))
    for _ in range(times):
        optimizer.zero_grad()
        (model.loss(model.pack([text_row(row) for row in ids.tolist()])) / 24).backward()
        optimizer.step()


@torch.no_grad()
def logits(model: GPT) -> Tensor:
    batch = model.pack([text_row(list(range(start, start + 21))) for start in (0, 20)])
    return model.logits(model.hidden(batch, batch.target_positions))  # (40, V)


def tuned_copy(base: Base, folder: Path, base_name: str) -> tuple[GPT, str]:
    """A copy of the base with a tuned file, as eval.py makes it, and the file's mode. Raises UserError."""
    tuned = checkpoint.read_tuned(folder, base.model.config)
    checkpoint.check_tuned_belongs(tuned, {"base": base_name, "fingerprint": base.fingerprint})
    model = base.model.shared_copy()
    checkpoint.apply_tuned(model, tuned)
    return model, tuned.mode


@pytest.mark.parametrize("mode", MODES)
def test_tuned_files_give_the_same_model_back(tmp_path: Path, model_folder: Path, mode: str) -> None:
    model, metadata, optimizer = start(model_folder, mode)
    step(model, optimizer, 3)
    checkpoint.save_tuned(tmp_path, model, metadata, Progress(step=3, best_val_loss=1.5))
    tensors, found = checkpoint.read(tmp_path / TUNED)
    assert tensors.keys() == modes.tuned_parameters(model).keys()  # only the parameters that trained
    assert {"mode": mode, "step": "3", "val_loss": "1.5"}.items() <= found.items()

    for dtype in (torch.float32, torch.bfloat16):
        base = weights.load(str(model_folder))
        base.model.eval().set_compute_dtype(dtype)
        untouched = logits(base.model)
        again, found_mode = tuned_copy(base, tmp_path, str(model_folder))
        assert found_mode == mode
        assert all(torch.equal(p, tensors[n]) for n, p in modes.tuned_parameters(again).items())
        assert not torch.equal(logits(again), untouched)
        assert torch.equal(logits(base.model), untouched)  # the base itself is as before
        if dtype == torch.float32:
            assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("mode", MODES)
def test_resuming_equals_never_having_stopped(tmp_path: Path, model_folder: Path, mode: str) -> None:
    model, metadata, optimizer = start(model_folder, mode)
    step(model, optimizer, 2)
    progress = Progress(step=2, best_val_loss=3.25, evals_since_best=1, tokens=54, seconds=1.5)
    checkpoint.save_last(tmp_path, model, metadata, optimizer, progress)
    step(model, optimizer, 2)

    other, metadata, optimizer = start(model_folder, mode)
    found = checkpoint.load_last(tmp_path, other, metadata, optimizer)
    assert repr(found) == repr(progress)  # by text, since a NaN in it equals nothing
    step(other, optimizer, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    checkpoint.save_tuned(tmp_path, model, metadata, progress)
    step(other, optimizer, 1)
    checkpoint.load_best(tmp_path, other)
    assert torch.equal(logits(model), logits(other))


def test_another_base_is_refused_and_no_value_is_touched(
    tmp_path: Path, model_folder: Path, make_reference: Callable
) -> None:
    model, metadata, optimizer = start(model_folder, "lora")
    step(model, optimizer, 1)
    checkpoint.save_tuned(tmp_path, model, metadata, Progress())
    checkpoint.save_last(tmp_path, model, metadata, optimizer, Progress())
    make_reference(seed=1, vocab_size=320, eos_token_id=0).save_pretrained(tmp_path / "other")
    other = weights.load(str(tmp_path / "other"))
    before, names = logits(other.model), [name for name, _ in other.model.named_parameters()]
    with pytest.raises(UserError, match=f"was tuned on the base {model_folder} .* and X is another base .*--model"):
        tuned_copy(other, tmp_path, "X")
    assert torch.equal(logits(other.model), before)
    assert [name for name, _ in other.model.named_parameters()] == names
    tuned, metadata, optimizer = start(tmp_path / "other", "lora")
    with pytest.raises(UserError, match="is another base"):
        checkpoint.load_last(tmp_path, tuned, metadata, optimizer)


@pytest.mark.parametrize("change", [{"mode": "full"}, {"options": '{"rank": 3}'}], ids=str)
def test_resuming_with_other_options_is_refused(
    tmp_path: Path, model_folder: Path, change: dict[str, str]
) -> None:
    model, metadata, optimizer = start(model_folder, "lora")
    checkpoint.save_last(tmp_path, model, metadata, optimizer, Progress())
    with pytest.raises(UserError, match="a run resumes with the options it was started with"):
        checkpoint.load_last(tmp_path, model, metadata | change, optimizer)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mode": "ia3"}, "was made in mode 'ia3'; known here: full, selective"),
        ({"options": '{"rank": 2, "of_a_later_version": 1}'}, "of_a_later_version"),
        ({"options": '{"rank": 5}'}, "does not fit the model and options it names"),
    ],
    ids=str,
)
def test_a_tuned_file_of_another_version_is_refused(
    tmp_path: Path, model_folder: Path, change: dict[str, str], message: str
) -> None:
    model, metadata, _ = start(model_folder, "lora")
    checkpoint.save_tuned(tmp_path, model, metadata | change, Progress())
    with pytest.raises(UserError, match=message):
        tuned_copy(weights.load(str(model_folder)), tmp_path, "X")


def small_file(path: Path) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(3, 5, generator=generator),
        "b.half": torch.randn(7, generator=generator).half(),
        "empty": torch.zeros(0, 2),
        "count": torch.tensor(3),
        "turned": torch.arange(6).view(2, 3).T,
    }
    checkpoint.write(path, tensors, {"mode": "lora", "text": '\u00fc \u2028 "quoted"'})
    return tensors


def test_what_is_written_is_read(tmp_path: Path) -> None:
    tensors = small_file(tmp_path / TUNED)
    read, metadata = checkpoint.read(tmp_path / TUNED)
    assert read.keys() == tensors.keys() and all(torch.equal(read[name], t) for name, t in tensors.items())
    assert metadata == {"mode": "lora", "text": '\u00fc \u2028 "quoted"', "format": "1"}


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    small_file(tmp_path / TUNED)
    whole = (tmp_path / TUNED).read_bytes()
    places = random.Random(0).sample(range(8 * len(whole)), 600)
    for place in places:
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        (tmp_path / TUNED).write_bytes(damaged)
        with pytest.raises(UserError):
            checkpoint.read(tmp_path / TUNED)
            raise AssertionError(f"bit {place % 8} of byte {place // 8} of {len(whole)}")


def test_a_file_cut_short_or_grown_is_found(tmp_path: Path) -> None:
    small_file(tmp_path / TUNED)
    whole = (tmp_path / TUNED).read_bytes()
    for size in (0, 1, 8, 20, len(whole) // 2, len(whole) - 1):
        (tmp_path / TUNED).write_bytes(whole[:size])
        with pytest.raises(UserError, match="not a sound safetensors file"):
            checkpoint.read(tmp_path / TUNED)
    (tmp_path / TUNED).write_bytes(whole + b"\0")
    with pytest.raises(UserError, match="not a sound safetensors file"):
        checkpoint.read(tmp_path / TUNED)


def test_swapped_contents_are_found(tmp_path: Path) -> None:
    """Sound as safetensors, and not what was written."""
    from safetensors.torch import load_file, save_file

    tensors = {"a": torch.ones(2, 2), "b": torch.zeros(2, 2)}
    checkpoint.write(tmp_path / TUNED, tensors, {"mode": "lora"})
    metadata = safetensors.read(tmp_path / TUNED)[1]
    changes: list[tuple[dict[str, Tensor], dict[str, str]]] = [
        ({"a": tensors["b"], "b": tensors["a"]}, metadata),
        ({"a": tensors["a"].view(4), "b": tensors["b"]}, metadata),
        ({"a": tensors["a"]}, metadata),
        (tensors, metadata | {"mode": "full"}),
        (tensors, {k: v for k, v in metadata.items() if k != "sha256"}),
        (tensors, metadata | {"more": "x"}),
    ]
    for changed, said in changes:
        save_file(changed, tmp_path / TUNED, metadata=said)
        assert load_file(tmp_path / TUNED)
        with pytest.raises(UserError, match="is damaged: its checksum does not match its content"):
            checkpoint.read(tmp_path / TUNED)


def test_a_newer_format_is_refused_by_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    small_file(tmp_path / TUNED)
    monkeypatch.setattr(checkpoint, "FORMAT", 1)
    with pytest.raises(UserError, match="has format 2, newer than this version's 1: update minift"):
        checkpoint.read(tmp_path / TUNED)


def test_a_damaged_file_names_the_one_that_survives(tmp_path: Path) -> None:
    small_file(tmp_path / LAST)
    with pytest.raises(
        UserError, match="tuned.safetensors is missing .last.safetensors beside it .* --resume"
    ):
        checkpoint.read(tmp_path / TUNED)
    small_file(tmp_path / TUNED)
    (tmp_path / LAST).write_bytes(b"")
    with pytest.raises(UserError, match="tuned.safetensors beside it is there: eval.py can use it"):
        checkpoint.read(tmp_path / LAST)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_file(tmp_path / TUNED)
    whole = (tmp_path / TUNED).read_bytes()

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UserError, match="No space left on device"):
        checkpoint.write(tmp_path / TUNED, {"other": torch.ones(1)}, {})
    assert (tmp_path / TUNED).read_bytes() == whole and len(list(tmp_path.iterdir())) == 1
