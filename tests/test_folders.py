"""Generated model folders of many kinds: logits here and in transformers, also after saving."""

import json
import random
from pathlib import Path
from typing import Any

import packed
import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from minift.files import weights
from minift.files.gpt2_config import OTHER_ACTIVATIONS, OTHER_NAMES
from minift.model.gpt import ACTIVATIONS, GPT

CLASSES = (
    "GPT2LMHeadModel", "GPT2LMHeadModel", "GPT2Model", "GPT2DoubleHeadsModel",
    "GPT2ForSequenceClassification", "GPT2ForTokenClassification", "GPT2ForQuestionAnswering",
)  # fmt: skip
IDS = torch.randint(97, (2, 13), generator=torch.Generator().manual_seed(0))


def reference(folder: Path) -> GPT2LMHeadModel:
    # "eager" is transformers' attention that is written out, and honours every field
    return GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").float().eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return packed.logits(model, IDS) if isinstance(model, GPT) else model(IDS).logits


def random_model(rng: random.Random) -> Any:
    """A model of transformers that is a GPT-2, maybe with another head on top, in one of three dtypes."""
    config = GPT2Config(
        vocab_size=rng.choice([97, 100, 128]), n_positions=rng.choice([16, 40]), n_embd=24,
        n_layer=rng.choice([1, 2, 3]), n_head=rng.choice([1, 2, 3]), n_inner=rng.choice([None, 40]),
        activation_function=rng.choice([*ACTIVATIONS, *OTHER_ACTIVATIONS]),
        layer_norm_epsilon=rng.choice([1e-5, 0.1]), scale_attn_weights=rng.random() < 0.8,
        scale_attn_by_inverse_layer_idx=rng.random() < 0.3, reorder_and_upcast_attn=rng.random() < 0.2,
        bos_token_id=rng.choice([0, 50256]), eos_token_id=rng.choice([0, 5, 50256]), pad_token_id=1,
        num_labels=1 if rng.random() < 0.5 else 3,
    )  # fmt: skip
    torch.manual_seed(rng.randrange(1000))
    model = getattr(transformers, rng.choice(CLASSES))(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.3)
    return model.to(rng.choice([torch.float32, torch.float32, torch.float16, torch.bfloat16]))


def change_names(state: dict[str, Tensor], rng: random.Random) -> dict[str, Tensor]:
    """The tensors under other names that are in use, with other tensors that are found beside them."""
    prefix = "transformer." if "transformer.wte.weight" in state else ""
    wte = state[f"{prefix}wte.weight"]
    state = {name: tensor.clone() for name, tensor in state.items()}
    layers = {name.split(".")[name.split(".").index("h") + 1] for name in state if ".h." in f".{name}"}
    if rng.random() < 0.3:
        for layer in layers:
            state[f"{prefix}h.{layer}.attn.bias"] = torch.ones(1, 1, 16, 16, dtype=torch.bool).tril()
            state[f"{prefix}h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    if prefix and rng.random() < 0.3:
        state["lm_head.weight"] = wte.clone()
        if rng.random() < 0.5:
            del state["transformer.wte.weight"]
    if rng.random() < 0.2:
        state["lm_head.decoder.weight"] = wte.clone()
    if rng.random() < 0.2:
        state["v_head.summary.weight"] = torch.ones(1, 24)
    return state


def write_weights(folder: Path, state: dict[str, Tensor], rng: random.Random) -> str:
    """One of four formats."""
    kind = rng.choice(["safetensors", "bin", "safetensors shards", "bin shards"])
    stem, ending = ("model", "safetensors") if "safetensors" in kind else ("pytorch_model", "bin")
    files = {f"{stem}.{ending}": list(state)}
    if "shards" in kind:
        names = rng.sample(sorted(state), len(state))
        files = {f"{stem}-0000{i + 1}-of-00003.{ending}": names[i::3] for i in range(3)}
        index = {"metadata": {}, "weight_map": {name: file for file, some in files.items() for name in some}}
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
    for file, names in files.items():
        some = {name: state[name] for name in names}
        if ending == "bin":
            torch.save(some, folder / file)
        else:
            safetensors.torch.save_file(some, folder / file, metadata={"format": "pt"})
    return kind


def change_config(folder: Path, rng: random.Random) -> None:
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    if rng.random() < 0.3:
        raw.pop("model_type")
    elif rng.random() < 0.4:
        for other, name in OTHER_NAMES.items():
            raw[other] = raw.pop(name)
    if rng.random() < 0.3:
        raw["torch_dtype"] = raw.pop("dtype", "float32")
    if rng.random() < 0.3:
        raw |= {"n_ctx": 16, "task_specific_params": {"a": 1}, "_name_or_path": "x", "finetuning_task": "y"}
    if rng.random() < 0.2:
        raw.pop("architectures", None)
    path.write_text(json.dumps(raw))


def random_folder(folder: Path, rng: random.Random) -> Path:
    model = random_model(rng)
    model.save_pretrained(folder)
    if rng.random() < 0.8:  # else as transformers 5 writes it
        for path in folder.glob("*.safetensors"):
            path.unlink()
        write_weights(folder, change_names(dict(model.state_dict()), rng), rng)
    change_config(folder, rng)
    return folder


@pytest.mark.parametrize("start", range(4))
def test_a_generated_folder_gives_transformers_logits(tmp_path: Path, start: int) -> None:
    rng = random.Random(start)
    for trial in range(8):
        folder = random_folder(tmp_path / str(trial), rng)
        base, wanted = weights.load(str(folder)), logits(reference(folder))
        assert (logits(base.model.eval()) - wanted).abs().max() <= 1e-4 * max(1, wanted.abs().max())
        heads = {name.partition(".")[0] for name in names_in(folder)} & set(weights.OTHER_HEADS)
        assert {note.split(" ")[1] for note in base.notes if "is left out" in note} == heads

        saved = tmp_path / f"saved {trial}"
        weights.save_folder(base, base.model, saved)
        assert (logits(reference(saved)) - wanted).abs().max() <= 1e-4 * max(1, wanted.abs().max())
        assert weights.load(str(saved)).fingerprint == base.fingerprint


def names_in(folder: Path) -> set[str]:
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        names |= safetensors.torch.load_file(path).keys()
    for path in folder.glob("*.bin"):
        names |= torch.load(path).keys()
    return names
