"""GPT-2 weights in and out, against transformers as the writer and as the reader; and what is refused."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import packed
import pytest
import torch
from torch import Tensor

from minift.errors import UserError
from minift.files import safetensors, weights
from minift.files.weights import Base
from minift.model.gpt import GPT


def fault(folder: Path) -> str:
    """The one line in which loading is refused."""
    with pytest.raises(UserError) as caught:
        weights.load(str(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    return packed.logits(model, ids) if isinstance(model, GPT) else model(ids).logits


def some_ids() -> Tensor:
    return torch.randint(97, (2, 19), generator=torch.Generator().manual_seed(0))


def state_file(folder: Path, reference: torch.nn.Module, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """A folder with config.json and, as pytorch_model.bin, the reference's state dict after `change`."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(reference.config.to_dict()), encoding="utf-8")
    state = dict(reference.state_dict())
    torch.save(change(state) or state, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_what_transformers_saves_is_loaded(
    tmp_path: Path, make_reference: Callable, dtype: torch.dtype, shard: str
) -> None:
    reference = make_reference().to(dtype)
    reference.save_pretrained(tmp_path / "saved", max_shard_size=shard)
    assert (len(list((tmp_path / "saved").glob("*.safetensors"))) > 1) == (shard == "20KB")
    base = weights.load(str(tmp_path / "saved"))
    model = base.model
    assert {p.dtype for p in model.parameters()} == {torch.float32} and base.folder == tmp_path / "saved"
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.allclose(logits(model, some_ids()), logits(reference.float(), some_ids()), atol=1e-4)


def strip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("transformer."): t for name, t in state.items() if name != "lm_head.weight"}


def with_buffers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The causal masks that old versions stored, and the biases whose names end alike, which must stay."""
    for layer in range(3):
        state[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 96, 96, dtype=torch.uint8).tril()
        state[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    return state


FORMS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "as it is": lambda state: None,
    "without prefix and head": strip,
    "without head": lambda state: {n: t for n, t in state.items() if n != "lm_head.weight"},
    "with mask buffers": with_buffers,
    "without prefix, with mask buffers": lambda state: strip(with_buffers(state)),
    "as parameters": lambda state: {n: torch.nn.Parameter(t) for n, t in state.items()},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_of_a_bin_file(tmp_path: Path, make_reference: Callable, form: Callable) -> None:
    reference = make_reference()
    model = weights.load(str(state_file(tmp_path / "bin", reference, form))).model
    assert torch.equal(model.h[1].attn.c_attn.bias, reference.transformer.h[1].attn.c_attn.bias)
    assert torch.allclose(logits(model, some_ids()), logits(reference, some_ids()), atol=1e-5)


def test_the_oldest_bin_format(tmp_path: Path, make_reference: Callable) -> None:
    reference = make_reference()
    folder = state_file(tmp_path / "bin", reference, lambda state: None)
    torch.save(reference.state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    model = weights.load(str(folder)).model
    assert torch.allclose(logits(model, some_ids()), logits(reference, some_ids()), atol=1e-5)


def test_loading_changes_no_file_and_the_model_may_be_written_to(model_folder: Path) -> None:
    before = (model_folder / "model.safetensors").read_bytes()
    model = weights.load(str(model_folder)).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert (model_folder / "model.safetensors").read_bytes() == before


def test_every_difference_stands_in_one_error(tmp_path: Path, make_reference: Callable) -> None:
    def change(state: dict[str, Tensor]) -> None:
        del state["transformer.h.1.ln_2.bias"], state["transformer.wpe.weight"]
        state["transformer.h.3.ln_1.weight"] = torch.ones(24)
        state["transformer.h.0.attn.c_attn.weight"] = state["transformer.h.0.attn.c_attn.weight"].T
        state["transformer.ln_f.bias"] = torch.ones(23)

    text = fault(state_file(tmp_path / "bin", make_reference(), change))
    assert text.startswith(f"{tmp_path / 'bin'}: 5 tensors do not fit config.json: ")
    for part in (
        "h.1.ln_2.bias is missing",
        "wpe.weight is missing",
        "h.3.ln_1.weight is not expected",
        "h.0.attn.c_attn.weight is (72, 24) and not (24, 72)",
        "ln_f.bias is (23,) and not (24,)",
    ):
        assert part in text


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda s: s.update({"lm_head.weight": s["lm_head.weight"] + 1}),
            "lm_head.weight differs from wte.weight",
        ),
        (
            lambda s: s.update({"lm_head.weight": s["lm_head.weight"][:-1]}),
            "lm_head.weight differs from wte.weight",
        ),
        (lambda s: s.update({"wpe.weight": s["transformer.wpe.weight"]}), "wpe.weight is there twice"),
        (
            lambda s: s.update({"transformer.wpe.weight": s["transformer.wpe.weight"].long()}),
            "is torch.int64; weights",
        ),
        (lambda s: s.update({"transformer.h.0.attn.c_attn.bias": torch.ones(3)}), "c_attn.bias is (3,)"),
        (lambda s: [s], "must hold a dictionary of tensors"),
        (lambda s: {"state_dict": s}, "must hold a dictionary of tensors"),
    ],
    ids=[
        "untied head",
        "head of another shape",
        "twice",
        "whole numbers",
        "a bias of another shape",
        "list",
        "nested",
    ],
)
def test_a_bin_file_that_does_not_fit(
    tmp_path: Path, make_reference: Callable, change: Callable, message: str
) -> None:
    folder = tmp_path / "bin"
    state_file(folder, make_reference(), lambda state: None)
    state = dict(make_reference().state_dict())
    torch.save(change(state) or state, folder / "pytorch_model.bin")
    assert message in fault(folder)


class Bomb:
    def __init__(self, path: str):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_runs_no_code(tmp_path: Path, model_folder: Path, zipped: bool) -> None:
    trap = tmp_path / "it ran"
    shutil.copytree(model_folder, tmp_path / "bin", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(
        {"wte.weight": Bomb(str(trap))},
        tmp_path / "bin" / "pytorch_model.bin",
        _use_new_zipfile_serialization=zipped,
    )
    assert "cannot be read as a file of plain tensors" in fault(tmp_path / "bin")
    (tmp_path / "bin" / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(str(trap)), protocol=2))
    assert "cannot be read as a file of plain tensors" in fault(tmp_path / "bin")
    assert not trap.exists()


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 100, b"version https://git-lfs.github.com/spec/v1\n", b"PK\3\4"]
)
def test_a_bin_file_that_is_none(tmp_path: Path, model_folder: Path, content: bytes) -> None:
    shutil.copytree(model_folder, tmp_path / "bin", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "bin" / "pytorch_model.bin").write_bytes(content)
    assert "cannot be read as a file of plain tensors" in fault(tmp_path / "bin")


def sharded(tmp_path: Path, make_reference: Callable) -> tuple[Path, dict[str, Any]]:
    make_reference().save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    return tmp_path / "saved", json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())


@pytest.mark.parametrize(
    "file",
    [
        "../model.safetensors",
        "/etc/passwd",
        "..",
        "",
        ".",
        "a/b.safetensors",
        "..\\model.safetensors",
        "C:\\model.safetensors",
    ],
)
def test_an_index_cannot_name_a_file_elsewhere(tmp_path: Path, make_reference: Callable, file: str) -> None:
    folder, index = sharded(tmp_path, make_reference)
    shutil.copy(next(folder.glob("*.safetensors")), tmp_path / "model.safetensors")
    index["weight_map"]["transformer.wte.weight"] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"{file!r} is not the name of a file in the same folder" in fault(folder)


def test_an_index_and_its_shards_must_agree(tmp_path: Path, make_reference: Callable) -> None:
    folder, index = sharded(tmp_path, make_reference)
    path, shards = folder / "model.safetensors.index.json", sorted(set(index["weight_map"].values()))
    moved = index["weight_map"] | {"transformer.ln_f.bias": shards[0]}
    assert index["weight_map"]["transformer.ln_f.bias"] != shards[0]
    path.write_text(json.dumps({"weight_map": moved}))
    assert "disagree on these tensors: transformer.ln_f.bias" in fault(folder)
    for broken in (None, [], {"wte.weight": 3}):
        path.write_text(json.dumps({"weight_map": broken}))
        assert "weight_map must map tensor names to file names" in fault(folder)
    path.write_text(json.dumps(index))
    (folder / shards[1]).unlink()
    assert f"lists {shards[1]}, which is missing" in fault(folder)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "config.json is missing"),
        ("{", "cannot be read as JSON"),
        ("[]", "holds a list, and must hold"),
        ("\x00", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
    ],
)
def test_a_broken_configuration(
    tmp_path: Path, model_folder: Path, content: str | None, message: str
) -> None:
    shutil.copytree(model_folder, tmp_path / "m")
    (tmp_path / "m" / "config.json").unlink()
    if content is not None:
        (tmp_path / "m" / "config.json").write_text(content)
    assert message in fault(tmp_path / "m")


def test_a_folder_without_weights(tmp_path: Path, model_folder: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    assert "holds no weights: there must be model.safetensors" in fault(tmp_path / "m")


@pytest.mark.parametrize("files", [("vocab.json", "merges.txt"), ("tokenizer.json",)], ids=" + ".join)
def test_the_tokenizer_equals_transformers(
    tmp_path: Path, model_folder: Path, tokenizer_folder: Path, texts: tuple[str, ...], files: tuple[str, ...]
) -> None:
    from transformers import GPT2TokenizerFast

    shutil.copytree(model_folder, tmp_path / "m")
    theirs = GPT2TokenizerFast.from_pretrained(tokenizer_folder)
    if files == ("tokenizer.json",):
        theirs.backend_tokenizer.enable_padding(
            length=50
        )  # settings that a file may carry, and that must not act
        theirs.backend_tokenizer.enable_truncation(3)
        theirs.backend_tokenizer.save(str(tmp_path / "m" / "tokenizer.json"))
        theirs = GPT2TokenizerFast.from_pretrained(tokenizer_folder)
        for file in ("vocab.json", "merges.txt"):
            (tmp_path / "m" / file).unlink()
    ours = weights.load(str(tmp_path / "m")).tokenizer
    for text in (
        *texts,
        "",
        " ",
        "  two\n\n",
        "don't",
        "\u4f60\u597d \U0001f600",
        "\x00",
        "A<|endoftext|> B",
    ):
        ids = theirs(text)["input_ids"]
        assert ours.encode(text).ids == ids
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(
            ids, clean_up_tokenization_spaces=False
        )


def test_a_folder_without_a_tokenizer_still_loads(tmp_path: Path, make_reference: Callable) -> None:
    make_reference().save_pretrained(tmp_path / "m")
    assert weights.load(str(tmp_path / "m")).tokenizer is None


def test_broken_or_foreign_tokenizer_files(
    tmp_path: Path, model_folder: Path, make_reference: Callable
) -> None:
    shutil.copytree(model_folder, tmp_path / "m")
    (tmp_path / "m" / "vocab.json").write_text("{")
    assert "the tokenizer's files cannot be read" in fault(tmp_path / "m")
    make_reference().save_pretrained(tmp_path / "small")
    for file in ("vocab.json", "merges.txt"):
        shutil.copy(model_folder / file, tmp_path / "small")
    assert "the tokenizer has token 319, and config.json a vocabulary of 97" in fault(tmp_path / "small")


def test_a_saved_folder_is_transformers_own(
    tmp_path: Path, model_folder: Path, texts: tuple[str, ...]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = weights.load(str(model_folder))
    model = base.model
    with torch.no_grad():
        model.h[1].mlp.c_fc.weight.mul_(1.5)
    weights.save_folder(base, model, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.randint(320, (2, 19), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(logits(model, ids), logits(theirs, ids), atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert [tokenizer(text)["input_ids"] for text in texts] == [
        base.tokenizer.encode(text).ids for text in texts
    ]
    again = weights.load(str(tmp_path / "out"))
    assert again.fingerprint == weights.fingerprint(model) != base.fingerprint
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.model.parameters(), strict=True))


def test_saving_keeps_the_bases_other_fields(tmp_path: Path, model_folder: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    raw = json.loads(path.read_text()) | {
        "task_specific_params": {"a": 1},
        "torch_dtype": "float16",
        "tie_word_embeddings": False,
        "pad_token_id": 7,
    }
    path.write_text(json.dumps(raw))
    (tmp_path / "m" / "generation_config.json").write_text('{"eos_token_id": 0}')
    base = weights.load(str(tmp_path / "m"))
    weights.save_folder(base, base.model, tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["task_specific_params"] == {"a": 1} and saved["pad_token_id"] == 7
    assert saved["dtype"] == "float32" and "torch_dtype" not in saved
    assert (
        saved["tie_word_embeddings"] is True
    )  # what is written has a tied head, whatever the base's file said
    assert (tmp_path / "out" / "generation_config.json").read_text() == '{"eos_token_id": 0}'


def test_saving_a_model_made_here(
    tmp_path: Path, make_gpt: Callable, make_reference: Callable, tokenizer: Any
) -> None:
    from transformers import GPT2LMHeadModel

    model = make_gpt(scale_attn_weights=False, n_inner=40)
    weights.save_folder(Base("new", None, model, tokenizer, None), model, tmp_path / "new" / "out")
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "new" / "out", attn_implementation="eager").eval()
    assert torch.allclose(logits(model, some_ids()), logits(theirs, some_ids()), atol=1e-4)
    assert (tmp_path / "new" / "out" / "tokenizer.json").is_file()


def test_saving_never_overwrites(tmp_path: Path, make_gpt: Callable) -> None:
    (tmp_path / "kept").write_text("x")
    for folder in (tmp_path, tmp_path / "kept"):
        with pytest.raises(UserError, match="exists and is not empty: name a new folder"):
            weights.save_folder(Base("new", None, make_gpt(), None, None), make_gpt(), folder)
    assert os.listdir(tmp_path) == ["kept"]


def test_the_fingerprint_is_of_the_values(tmp_path: Path, make_reference: Callable) -> None:
    reference = make_reference().half()
    reference.save_pretrained(tmp_path / "fp16")
    reference.float().save_pretrained(tmp_path / "fp32")
    state_file(tmp_path / "bin", reference, strip)
    reference.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    found = {weights.load(str(tmp_path / name)).fingerprint for name in ("fp16", "fp32", "bin", "sharded")}
    assert len(found) == 1
    with torch.no_grad():
        reference.transformer.h[2].ln_2.bias[5] += 1e-3
    reference.save_pretrained(tmp_path / "changed")
    found.add(weights.load(str(tmp_path / "changed")).fingerprint)
    model = weights.load(str(tmp_path / "fp32")).model
    model.wte.weight.data = model.wte.weight.data.roll(1)
    found.add(weights.fingerprint(model))
    assert len(found) == 3


def test_a_safetensors_file_wins_over_a_bin_file(tmp_path: Path, model_folder: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "m")
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"never opened")
    assert weights.load(str(tmp_path / "m")).fingerprint == weights.load(str(model_folder)).fingerprint
    names = safetensors.read(model_folder / "model.safetensors")[0]
    assert all(name.startswith("transformer.") for name in names)
