"""What holds for a newcomer's modes. tests/test_new_modes.py runs it in a copy of the project that has them."""

import copy
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from packed import logits, random_ids
from scripts import MODES, QUICK, evaluate, json_of, metrics, tensors, train, train_script, trained, write_pairs

from minift import modes
from minift.files import weights
from minift.model.generate import generate
from minift.model.gpt import GPT

EACH = pytest.mark.parametrize("mode", ["ia3", "dora", "prefix"])
SETTINGS = (*QUICK, "--steps", "12", "--lr", "1e-2")
PROMPTS = [[5, 17, 80], [1], [33, 2, 9, 61, 44, 7, 20], [90, 90], [61, 3, 19, 4, 11]]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs")


@pytest.fixture(scope="module")
def comparison(model_folder: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `train.py --mode all`."""
    folder = tmp_path_factory.mktemp("runs") / "all"
    trained("--mode", "all", "--model", model_folder, "--data", pairs, "--out", folder, *SETTINGS)
    return folder


@torch.no_grad()
def tuned_model(base: GPT, mode: str, options: dict[str, Any]) -> GPT:
    """The base with a mode, and values at which everything that trains matters."""
    generator = torch.Generator().manual_seed(3)
    modes.apply(base, mode, modes.MODES[mode].Options(**options))
    for parameter in modes.tuned_parameters(base).values():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return base


@EACH
def test_it_trains_beside_the_others_and_is_scored(comparison: Path, mode: str) -> None:
    results = {result["mode"]: result for result in json_of(comparison / "compare.json")}
    assert list(results) == list(MODES) == list(modes.MODES)
    result = results[mode]
    assert result["predicted_peak_bytes"] > 0
    val_losses = [line["val_loss"] for line in metrics(comparison / mode) if "val_loss" in line]
    assert val_losses[-1] < val_losses[0]
    if mode != "prefix":  # a prefix starts from random values, and not at the base
        assert result["test_loss"] < result["base_test_loss"]
    ended = evaluate(comparison / mode, "--json", "--dtype", "fp32", "--device", "cpu", "--max-new-tokens", 6)
    assert ended.code == 0, ended.err
    scores = json.loads(ended.out)
    assert scores["tuned"]["loss"] == pytest.approx(result["test_loss"], rel=1e-5)


@EACH
def test_it_resumes_bit_for_bit(model_folder: Path, pairs: Path, comparison: Path, tmp_path: Path, mode: str) -> None:
    steps, train_step = [], train_script.train_step

    def interrupted(*arguments: Any) -> Any:
        steps.append(1)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(*arguments)

    with mock.patch.object(train_script, "train_step", interrupted):
        ended = train("--mode", mode, "--model", model_folder, "--data", pairs, "--out", tmp_path / "run", *SETTINGS)
    assert ended.code != 0 and len(steps) == 5
    trained("--resume", tmp_path / "run")
    for file in ("tuned.safetensors", "last.safetensors"):
        found, wanted = tensors(tmp_path / "run" / file), tensors(comparison / mode / file)
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in found)


@EACH
def test_its_cost_is_planned(model_folder: Path, mode: str) -> None:
    text = trained("--plan", "--mode", mode, "--model", model_folder)
    assert f"| {mode} " in text


@EACH
def test_it_is_saved_as_a_plain_gpt2_or_says_why_not(comparison: Path, tmp_path: Path, mode: str) -> None:
    ended = evaluate(comparison / mode, "--save", tmp_path / "merged")
    if mode == "dora":
        assert ended.code == 0, ended.err
        assert weights.load(str(tmp_path / "merged")).model.config.n_layer == 3
    else:
        reason = {"ia3": "mode ia3 adds parameters and has no merge", "prefix": "a prefix cannot be merged"}[mode]
        assert ended.code == 2 and reason in ended.err and not (tmp_path / "merged").exists()


@EACH
@torch.no_grad()
def test_it_decodes_with_the_cache_as_without(make_gpt: Callable, mode: str) -> None:
    model = tuned_model(make_gpt(), mode, MODES[mode].options)
    for prompt, new in zip(PROMPTS, generate(model, PROMPTS, 20), strict=True):
        ids = list(prompt)
        for _ in range(20):
            ids.append(logits(model, torch.tensor([ids]))[0, -1].argmax().item())
        assert new == ids[len(prompt) :]


@torch.no_grad()
def test_dora_equals_peft(make_reference: Callable, from_reference: Callable) -> None:
    import peft

    reference = make_reference()
    base = from_reference(reference)
    options = {"rank": 3, "alpha": 7.0, "targets": "qkv,o,fc,proj"}
    model = tuned_model(copy.deepcopy(base), "dora", options)
    layers = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    names = [f"transformer.h.{i}.{layer}" for i in range(3) for layer in layers]
    lora_config = peft.LoraConfig(r=3, lora_alpha=7, use_dora=True, target_modules=names, fan_in_fan_out=True)
    theirs = peft.get_peft_model(reference, lora_config).eval()
    copied = set()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            ours = name.removeprefix("base_model.model.transformer.").removesuffix(".weight").removesuffix(".default")
            ours = ours.replace("lora_magnitude_vector", "magnitude")
            parameter.copy_(model.get_parameter(ours))
            copied.add(ours)
    assert copied == set(modes.tuned_parameters(model))
    ids = random_ids(97, 3, 11)
    assert (logits(model, ids) - theirs(ids).logits).abs().max() < 1e-4
    assert (logits(model, ids) - logits(base, ids)).abs().max() > 0.1


def test_dora_computes_its_norms_once_a_text(make_gpt: Callable) -> None:
    model = tuned_model(make_gpt(), "dora", {"targets": "qkv,o"})
    layer = model.h[1].attn.c_attn
    with mock.patch.object(type(layer), "norm", autospec=True, side_effect=type(layer).norm) as norm:
        generate(model, PROMPTS, 20)
    assert norm.call_count == 6  # of three blocks with two layers each


@torch.no_grad()
def test_prefix_equals_peft(make_reference: Callable, from_reference: Callable) -> None:
    import peft

    reference = make_reference()
    model = tuned_model(from_reference(reference), "prefix", {"prefix_length": 4})
    prefix_config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    theirs = peft.get_peft_model(reference, prefix_config).eval()
    weight = theirs.prompt_encoder["default"].embedding.weight  # (P, 2C of each layer)
    weight.copy_(torch.cat([block.attn.prefix.weight for block in model.h], dim=1))
    ids = random_ids(97, 3, 11)
    assert (logits(model, ids) - theirs(ids).logits).abs().max() < 1e-4
    assert (logits(model, ids) - logits(from_reference(make_reference()), ids)).abs().max() > 0.1
