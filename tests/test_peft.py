"""PEFT's folders in and out, beside the peft package; several tuned files on one base; a
saved folder in transformers' pipeline."""

import copy
import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import packed
import peft as their
import pytest
import torch
from scripts import (
    QUICK,
    Ended,
    evaluate,
    json_of,
    one_thread,
    tensors,
    train,
    trained,
    write_pairs,
)
from torch import Tensor
from transformers import GPT2LMHeadModel, pipeline

import train as train_script
from minift import modes
from minift.errors import UserError
from minift.files import checkpoint, peft, safetensors, weights
from minift.model import generate
from minift.model.gpt import GPT
from minift.modes import lora
from minift.report import prompt

PLAIN = ["--dtype", "fp32", "--device", "cpu", "--batch", "4", "--max-new-tokens", "6"]
IDS = torch.tensor([[5, 17, 250, 3, 44, 9, 120], [7, 7, 90, 31, 2, 300, 8], [61, 5, 12, 99, 45, 1, 4]])


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    with one_thread(predict=False):
        yield


@pytest.fixture(scope="module")
def base(model_folder: Path) -> GPT:
    return weights.load(str(model_folder)).model.eval()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs")


@pytest.fixture(scope="module")
def common(model_folder: Path, pairs: Path) -> list[Any]:
    return ["--model", model_folder, "--data", pairs, *QUICK]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, common: list[Any]) -> dict[str, Path]:
    """Short runs: two of LoRA that differ in all their options, and one of each other kind."""
    folder = tmp_path_factory.mktemp("runs")
    kinds = {
        "lora": ["--rank", 3, "--alpha", 10, "--targets", "q,v,o", "--dropout", 0.25, "--lr", 1e-2],
        "other": ["--rank", 5, "--alpha", 3, "--targets", "qkv,fc", "--lr", 3e-2, "--scaling", "rslora"],
        "prompt": ["--mode", "prompt", "--prompt-tokens", 7, "--lr", 1.0],
        "full": ["--mode", "full", "--lr", 3e-3],
        "selective": ["--mode", "selective", "--lr", 1e-2, "--train", "top:1,embeddings"],
        "adapter": ["--mode", "adapter", "--lr", 1e-2],
    }
    for name, options in kinds.items():
        trained(*common, "--steps", 12, "--warmup-ratio", 0, *options, "--out", folder / name)
    return {name: folder / name for name in kinds}


@torch.no_grad()
def logits(model: torch.nn.Module, ids: Tensor = IDS) -> Tensor:
    """(B, T, V) of ours or of transformers, without a soft prompt's own positions."""
    found = packed.logits(model, ids) if isinstance(model, GPT) else model(ids).logits
    return found[:, -ids.shape[1] :]


def disturbed(model: torch.nn.Module, seed: int = 3) -> torch.nn.Module:
    """Random values in all that trains: nothing is zero any more."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.data = torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5
    return model


def tuned(base: GPT, mode: str, seed: int = 3, **options: Any) -> GPT:
    model = base.shared_copy()
    modes.apply(model, mode, modes.MODES[mode].Options(**options))
    return disturbed(model, seed).eval()


def in_peft(model_folder: Path, folder: Path) -> torch.nn.Module:
    reference = GPT2LMHeadModel.from_pretrained(model_folder)
    return their.PeftModel.from_pretrained(reference, str(folder)).eval()


def loaded(base: GPT, folder: Path) -> GPT:
    model = base.shared_copy()
    checkpoint.apply_tuned(model, checkpoint.read_tuned(folder, model.config))
    return model.eval()


def assert_exact(one: torch.nn.Module, other: torch.nn.Module) -> None:
    """The same function: in float64 only the last rounding of our logits to fp32 is left of a difference."""
    for model in (one, other):
        model.double().compute_dtype = torch.float64
    wanted = logits(other)
    assert (logits(one) - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def assert_same(found: Tensor, wanted: Tensor, base: GPT) -> None:
    """To 1e-5 of the largest logit, in fp32; and it is not the base."""
    scale = wanted.abs().max()
    assert (found - wanted).abs().max() <= 1e-5 * scale
    assert (found - logits(base)).abs().max() > 1e-2 * scale


OUT = {
    "q,v": dict(targets="q,v", rank=4, alpha=6),
    "v alone": dict(targets="v", rank=3, alpha=7),
    "q,k,v": dict(targets="q,k,v", rank=2, alpha=5),
    "qkv": dict(targets="qkv", rank=4, alpha=6),
    "all": dict(targets="all", rank=3, alpha=10, dropout=0.2),
    "both c_proj": dict(targets="o,proj", rank=5, alpha=2),
    "rslora": dict(targets="k,v,fc", rank=3, alpha=2, scaling="rslora"),
    "patterns": dict(targets="q,v,o,fc", rank=4, alpha=6, rank_pattern="c_fc=7,h.1=2,h.0.attn.c_proj=1",
                     alpha_pattern="c_proj=9,h.2.mlp=1.5"),
    "layers": dict(targets="all", rank=4, alpha=6, rank_pattern="h.1=0,h.2.mlp.c_proj=0"),
}  # fmt: skip


@pytest.mark.parametrize("name", OUT)
def test_peft_gives_the_same_logits_with_lora(
    base: GPT, model_folder: Path, name: str, tmp_path: Path
) -> None:
    model = tuned(base, "lora", **OUT[name])
    peft.save(tmp_path / "out", model, "lora", "some/base")
    assert sorted(os.listdir(tmp_path / "out")) == ["adapter_config.json", "adapter_model.safetensors"]
    wanted = logits(model)
    reference = in_peft(model_folder, tmp_path / "out")
    assert_same(logits(reference), wanted, base)
    assert reference.peft_config["default"].base_model_name_or_path == "some/base"
    assert_same(logits(loaded(base, tmp_path / "out")), wanted, base)  # and back
    reference.save_pretrained(tmp_path / "theirs")  # PEFT's own copy of it too
    assert_same(logits(loaded(base, tmp_path / "theirs")), wanted, base)
    assert_exact(model, reference)


def test_q_and_v_are_exactly_one_update_of_twice_the_rank(base: GPT, tmp_path: Path) -> None:
    model = tuned(base, "lora", targets="q,v,o", rank=4, alpha=6)
    peft.save(tmp_path / "out", model, "lora", "base")
    config, C = json_of(tmp_path / "out" / "adapter_config.json"), base.config.n_embd
    assert (config["r"], config["lora_alpha"]) == (8, 12)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({"attn.c_proj": 4}, {"attn.c_proj": 6})
    saved, layer = tensors(tmp_path / "out" / "adapter_model.safetensors"), model.h[2].attn.c_attn
    name = "base_model.model.transformer.h.2.attn.c_attn"
    A, B = saved[f"{name}.lora_A.weight"], saved[f"{name}.lora_B.weight"]
    assert torch.equal(A, layer.lora_A) and B.shape == (3 * C, 8)
    assert torch.equal(B[:C, :4], layer.lora_B[:C]) and torch.equal(B[2 * C :, 4:], layer.lora_B[C:])
    assert B.count_nonzero() == layer.lora_B.numel()  # all else is zero
    again = loaded(base, tmp_path / "out")
    assert again.h[2].attn.c_attn.scale == layer.scale and again.h[1].attn.c_proj.scale == layer.scale
    for one, other in ((layer, again.h[2].attn.c_attn), (model.h[0].attn.c_proj, again.h[0].attn.c_proj)):
        assert torch.equal(one.update(), other.update())


def test_ranks_and_alphas_of_single_layers(base: GPT) -> None:
    model = tuned(base, "lora", **OUT["patterns"])
    layers = lora.lora_layers(model)
    assert {name: (one.lora_B.shape[1], one.scale) for name, one in layers.items() if name[2] == "0"} == {
        "h.0.attn.c_attn": (4, 6 / 4), "h.0.attn.c_proj": (1, 9 / 1), "h.0.mlp.c_fc": (7, 6 / 7)}  # fmt: skip
    assert (layers["h.1.mlp.c_fc"].lora_B.shape[1], layers["h.2.mlp.c_fc"].scale) == (2, 1.5 / 7)
    assert not any(name.startswith("h.1") for name in lora.lora_layers(tuned(base, "lora", **OUT["layers"])))
    for pattern in ("c_fc=x", "h.3=4", "c_att=4", "=4", "c_fc", "c_fc=-1", "c_fc=1.5", "c_fc=" + "9" * 30):
        with pytest.raises(UserError, match="rank_pattern"):
            tuned(base, "lora", rank_pattern=pattern)
    for pattern in ("c_fc=0", "c_fc=nan", "c_fc=-1", "wte=1"):
        with pytest.raises(UserError, match="alpha_pattern"):
            tuned(base, "lora", alpha_pattern=pattern)


IN = {
    "plain": dict(r=4, lora_alpha=6, target_modules=["c_attn"], fan_in_fan_out=True),
    "no fan_in_fan_out": dict(r=4, lora_alpha=6, target_modules=["c_attn", "c_fc"]),
    "no targets": dict(r=2, lora_alpha=7, lora_dropout=0.3),
    "rslora": dict(r=5, lora_alpha=3, target_modules=["c_proj"], use_rslora=True),
    "a regular expression": dict(r=3, lora_alpha=4, target_modules=r".*\.[02]\.(attn\.c_attn|mlp\.c_proj)"),
    "all-linear": dict(r=3, lora_alpha=5, target_modules="all-linear"),
    "layers": dict(r=3, lora_alpha=5, target_modules=["c_attn", "mlp.c_proj"], layers_to_transform=[1]),
    "one layer": dict(r=3, lora_alpha=5, target_modules=["c_fc"], layers_to_transform=2, layers_pattern="h"),
    "one module": dict(r=3, lora_alpha=5, target_modules=["h.1.attn.c_proj", "transformer.h.0.mlp.c_fc"]),
    "patterns": dict(r=4, lora_alpha=6, target_modules=["c_attn", "c_proj", "c_fc"],
                     rank_pattern={"attn.c_proj": 2, "h.1.mlp.c_proj": 7, r"^transformer\.h\.[02]\..*n": 3},
                     alpha_pattern={"c_proj": 9, "h.2.mlp.c_fc": 1.5}),
    "patterns and rslora": dict(r=4, lora_alpha=6, target_modules=["c_attn", "c_fc"], use_rslora=True,
                                rank_pattern={"c_fc": 9}),
    "exclude": dict(r=4, lora_alpha=6, target_modules=["c_proj", "c_fc"], exclude_modules=["mlp.c_proj"]),
    "gaussian": dict(r=4, lora_alpha=6, target_modules=["c_attn"], init_lora_weights="gaussian"),
    "orthogonal": dict(r=4, lora_alpha=6, target_modules=["c_attn"], init_lora_weights="orthogonal"),
}  # fmt: skip


def made_by_peft(model_folder: Path, folder: Path, config: Any) -> torch.nn.Module:
    """A folder that PEFT wrote, with nothing at zero, and the model that it wrote it from."""
    torch.manual_seed(0)
    reference = their.get_peft_model(GPT2LMHeadModel.from_pretrained(model_folder), config)
    disturbed(reference).save_pretrained(folder)
    return reference.eval()


@pytest.mark.parametrize("name", IN)
def test_what_peft_made_gives_the_same_logits(
    base: GPT, model_folder: Path, name: str, tmp_path: Path
) -> None:
    config = their.LoraConfig(task_type="CAUSAL_LM", **IN[name])
    reference = made_by_peft(model_folder, tmp_path / "in", config)
    model = loaded(base, tmp_path / "in")
    assert_same(logits(model), logits(reference), base)
    assert all(one.dropout == config.lora_dropout for one in lora.lora_layers(model).values())
    assert_exact(model, reference)


def test_older_and_other_forms_of_a_folder(base: GPT, model_folder: Path, tmp_path: Path) -> None:
    config = their.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=3, target_modules=["c_attn"])
    wanted = logits(made_by_peft(model_folder, tmp_path, config))
    path, file = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    keep = ("peft_type", "lora_alpha", "target_modules", "fan_in_fan_out", "bias", "base_model_name_or_path")
    old = {key: value for key, value in json_of(path).items() if key in keep}  # r is PEFT's default
    path.write_text(json.dumps(old | {"enable_lora": None, "merge_weights": False, "new_in_2030": None}))
    assert_same(logits(loaded(base, tmp_path)), wanted, base)

    saved = tensors(file)
    headless = {name.replace("transformer.", ""): tensor for name, tensor in saved.items()}
    safetensors.write(file, headless, {})  # made from a GPT2Model
    assert_same(logits(loaded(base, tmp_path)), wanted, base)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')  # the base's, as some folders have it
    assert evaluate(tmp_path, "--model", model_folder, "--prompt", "a", *PLAIN).code == 0
    file.unlink()
    torch.save(saved, tmp_path / "adapter_model.bin")
    assert_same(logits(loaded(base, tmp_path)), wanted, base)

    half = {name: tensor.bfloat16() for name, tensor in saved.items()}
    safetensors.write(file, half, {"format": "pt"})
    assert_same(logits(loaded(base, tmp_path)), logits(in_peft(model_folder, tmp_path)), base)


def test_soft_prompts_both_ways(base: GPT, model_folder: Path, tmp_path: Path) -> None:
    model = tuned(base, "prompt", prompt_tokens=5)
    peft.save(tmp_path / "out", model, "prompt", "base")
    reference = in_peft(model_folder, tmp_path / "out")
    assert_same(logits(reference), logits(model), base)
    assert torch.equal(logits(loaded(base, tmp_path / "out")), logits(model))

    config = their.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=9)
    reference = made_by_peft(model_folder, tmp_path / "in", config)
    assert_same(logits(loaded(base, tmp_path / "in")), logits(reference), base)


def edit(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json_of(path) | changes))

    return change


def retensor(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        safetensors.write(path, change({name: t.clone() for name, t in tensors(path).items()}), {})

    return rewrite


def written(name: str, content: str | None) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) if content else (folder / name).unlink()


ONE = "base_model.model.transformer.h.1.attn.c_attn.lora_A.weight"
REFUSED = {
    "modules_to_save": (edit(modules_to_save=["wte"]), ["modules_to_save", "wte"]),
    "DoRA": (edit(use_dora=True), ["use_dora"]),
    "biases": (edit(bias="lora_only"), ["bias", "lora_only"]),
    "lora_bias": (edit(lora_bias=True), ["lora_bias"]),
    "tokens": (edit(trainable_token_indices=[1, 2]), ["trainable_token_indices"]),
    "replicated layers": (edit(layer_replication=[[0, 2]]), ["layer_replication"]),
    "parameters": (edit(target_parameters=["wte.weight"]), ["target_parameters"]),
    "megatron": (edit(megatron_config={"a": 1}), ["megatron_config"]),
    "aLoRA": (edit(alora_invocation_tokens=[5]), ["alora_invocation_tokens"]),
    "something new": (edit(use_wonder=0.5), ["use_wonder"]),
    **{start: (edit(init_lora_weights=start), ["init_lora_weights", start])
       for start in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "mica")},
    "IA3": (edit(peft_type="IA3"), ["peft_type", "IA3", "PROMPT_TUNING"]),
    "LoHa": (edit(peft_type="LOHA"), ["LOHA"]),
    "prefix tuning": (edit(peft_type="PREFIX_TUNING"), ["PREFIX_TUNING"]),
    "no type": (edit(peft_type=None), ["peft_type"]),
    "a list as type": (edit(peft_type=["LORA"]), ["peft_type"]),
    "another task": (edit(task_type="SEQ_CLS"), ["task_type", "SEQ_CLS"]),
    "targets that are not there": (edit(target_modules=["q_proj", "wte"]), ["target_modules", "q_proj"]),
    "targets that are no list": (edit(target_modules=7), ["target_modules"]),
    "a broken expression": (edit(target_modules="(c_attn"), ["(c_attn", "regular expression"]),
    "a broken pattern": (edit(rank_pattern={"(": 4}), ["regular expression"]),
    "other layers": (edit(layers_pattern="layers"), ["layers_pattern"]),
    "fewer layers": (edit(layers_to_transform=[0]), ["h.1.attn.c_attn.lora_A", "not expected"]),
    "another rank": (edit(r=5), ["rank", "5", "(4, 24)"]),
    "a rank of nothing": (edit(r=0), ["rank"]),
    "a rank of words": (edit(r="8"), ["r is '8'"]),
    "another rank of one": (edit(rank_pattern={"h.1.attn.c_attn": 2}), ["h.1.attn.c_attn", "rank"]),
    "a rank that is none": (edit(rank_pattern={"c_attn": [4]}), ["rank"]),
    "no alpha": (edit(lora_alpha=0), ["alpha"]),
    "an endless alpha": (edit(lora_alpha=float("inf")), ["alpha"]),
    "an alpha of words": (edit(alpha_pattern={"c_attn": "x"}), ["alpha", "'x'"]),
    "dropout": (edit(lora_dropout=1.0), ["dropout"]),
    "no JSON": (written("adapter_config.json", "{"), ["adapter_config.json", "JSON"]),
    "JSON of a list": (written("adapter_config.json", "[]"), ["adapter_config.json", "object"]),
    "no tensors": (written("adapter_model.safetensors", None), ["adapter_model.safetensors", "no such file"]),
    "broken tensors": (written("adapter_model.safetensors", "x" * 50), ["adapter_model", "sound"]),
    "an A too few": (retensor(lambda t: {n: v for n, v in t.items() if n != ONE}), ["missing", "h.1.attn"]),
    "a B too few": (retensor(lambda t: {n: v for n, v in t.items() if n != ONE.replace("_A", "_B")}),
                    ["missing", "h.1.attn.c_attn.lora_B"]),
    "the embedding": (retensor(lambda t: t | {"base_model.model.transformer.wte.lora_embedding_A": t[ONE]}),
                      ["wte.lora_embedding_A"]),
    "the head": (retensor(lambda t: t | {"base_model.model.lm_head.lora_A.weight": t[ONE]}), ["lm_head"]),
    "a wider base": (retensor(lambda t: {n: torch.cat([v, v], -1) if "_A" in n else v for n, v in t.items()}),
                     ["(4, 48) and not (4, 24)"]),
    "a deeper base": (retensor(lambda t: t | {ONE.replace("h.1", "h.3"): t[ONE]}), ["h.3.attn.c_attn"]),
    "not a number": (retensor(lambda t: t | {ONE: t[ONE] * float("nan")}), ["not finite", "h.1"]),
    "whole numbers": (retensor(lambda t: t | {ONE: t[ONE].to(torch.int32)}), ["int32"]),
}  # fmt: skip
REFUSED_PROMPT = {
    "another length": (edit(num_virtual_tokens=8), ["prompt_embeddings (8, 24)", "(9, 24)"]),
    "no length": (edit(num_virtual_tokens=None), ["prompt_embeddings"]),
    "two submodules": (edit(num_transformer_submodules=2), ["submodule"]),
    "a wider base": (retensor(lambda t: {n: torch.cat([v, v], -1) for n, v in t.items()}), ["(9, 48)"]),
    "the wrong method": (edit(peft_type="LORA"), ["num_", "not supported"]),
    "another name": (retensor(lambda t: {f"{n}_2": v for n, v in t.items()}), ["prompt_embeddings_2"]),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("made")
    configs = {"lora": their.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=["c_attn"]),
               "prompt": their.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=9)}  # fmt: skip
    for name, config in configs.items():
        made_by_peft(model_folder, folder / name, config)
    return {name: folder / name for name in configs}


def assert_refused(ended: Ended, words: list[str]) -> None:
    assert ended.code == 2 and ended.err.startswith("error: ") and ended.err.count("\n") == 1, ended
    assert all(word in ended.err for word in words) and len(ended.err) < 800, ended.err


@pytest.mark.parametrize(
    "kind, name", [("lora", name) for name in REFUSED] + [("prompt", name) for name in REFUSED_PROMPT]
)
def test_what_cannot_be_honoured_is_refused_by_name(
    made: dict[str, Path], kind: str, name: str, tmp_path: Path, model_folder: Path, common: list[Any]
) -> None:
    folder = shutil.copytree(made[kind], tmp_path / "in")
    change, words = (REFUSED if kind == "lora" else REFUSED_PROMPT)[name]
    change(folder)
    assert_refused(evaluate("--adapter", folder, "--model", model_folder, "--prompt", "a", *PLAIN), words)
    ended = train(*common, "--adapter", folder, "--out", tmp_path / "run")
    assert_refused(ended, words)
    assert "test.jsonl" not in ended.out and not (tmp_path / "run").exists()  # before any work is done


def test_what_peft_has_no_form_for_stays_here(runs: dict[str, Path], tmp_path: Path) -> None:
    for mode in ("full", "selective", "adapter"):
        assert_refused(evaluate(runs[mode], "--save-peft", tmp_path / "x"), ["PEFT", f"mode {mode}", "lora"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert_refused(evaluate(runs["lora"], "--save-peft", tmp_path / "mine"), ["not empty"])
    assert os.listdir(tmp_path) == ["mine"] and os.listdir(tmp_path / "mine") == ["thesis.txt"]


@pytest.mark.parametrize("name", ["lora", "other", "prompt"])
def test_a_run_goes_out_and_comes_back(
    runs: dict[str, Path], base: GPT, model_folder: Path, pairs: Path, name: str, tmp_path: Path
) -> None:
    ended = evaluate(runs[name], "--save-peft", tmp_path / "peft")
    assert ended.code == 0 and str(tmp_path / "peft") in ended.out, ended.err
    wanted = logits(loaded(base, runs[name]))
    assert_same(logits(in_peft(model_folder, tmp_path / "peft")), wanted, base)
    there = ["--model", model_folder, "--data", pairs]
    one = json.loads(evaluate("--adapter", tmp_path / "peft", *there, "--json", *PLAIN).out)
    other = json.loads(evaluate(runs[name], "--json", *PLAIN).out)
    assert one["base"] == other["base"] and one["tuned"]["completions"] == other["tuned"]["completions"]
    assert one["tuned"]["loss"] == pytest.approx(other["tuned"]["loss"], rel=1e-5) != one["base"]["loss"]
    prompt = [*there[:2], "--prompt", "1: the lunch =", *PLAIN]
    said = [evaluate(folder, *prompt) for folder in (tmp_path / "peft", runs[name])]
    assert said[0].out == said[1].out and said[0].code == said[1].code == 0
    if name != "prompt":  # and merged, from PEFT to a plain GPT-2
        assert evaluate(tmp_path / "peft", *there[:2], "--save", tmp_path / "hf").code == 0
        assert_same(logits(GPT2LMHeadModel.from_pretrained(tmp_path / "hf")), wanted, base)


def test_a_peft_folder_needs_its_base_and_rows(
    runs: dict[str, Path], model_folder: Path, tmp_path: Path
) -> None:
    evaluate(runs["lora"], "--save-peft", tmp_path / "peft")
    assert_refused(evaluate(tmp_path / "peft"), ["--model", "PEFT"])
    assert_refused(evaluate(tmp_path / "peft", "--model", model_folder), ["--data", "PEFT"])
    assert_refused(evaluate("--adapter", tmp_path / "nowhere"), ["nowhere", "not a run's folder"])
    assert_refused(evaluate(), ["--adapter", "--help"])


@pytest.mark.parametrize("kind", ["lora", "prompt"])
def test_training_goes_on_from_a_peft_folder(
    made: dict[str, Path], kind: str, base: GPT, common: list[Any], tmp_path: Path
) -> None:
    folder = shutil.copytree(made[kind], tmp_path / "in")
    still = ["--steps", 2, "--lr", 1e-9, "--warmup-ratio", 0]
    trained(*common, *still, "--adapter", folder, "--out", tmp_path / "still")
    model, wanted = loaded(base, tmp_path / "still"), logits(loaded(base, folder))
    assert_same(logits(model), wanted, base)
    before = json.loads(evaluate(tmp_path / "still", "--json", *PLAIN).out)["tuned"]["loss"]

    learning = ["--steps", 12, "--lr", 1e-2 if kind == "lora" else 0.3, "--warmup-ratio", 0]
    out = trained(*common, *learning, "--adapter", folder, "--out", tmp_path / "on")
    assert f"adapter = {folder}  (command line)" in out and f"mode {kind}" in out
    shutil.rmtree(folder)  # from here on the run stands on its own
    asked = json_of(tmp_path / "on" / "config.json")
    assert asked["mode"] == asked["train"]["mode"] == kind and asked["train"]["adapter"] == str(folder)
    own = {"rank": 4, "alpha": 6, "targets": "qkv"} if kind == "lora" else {"prompt_tokens": 9}
    assert asked["mode_options"].items() >= own.items()
    assert all(asked["origins"][name] == [value, "adapter"] for name, value in own.items())
    assert json.loads(evaluate(tmp_path / "on", "--json", *PLAIN).out)["tuned"]["loss"] < before - 0.05
    assert train("--resume", tmp_path / "on").code == 0
    assert_refused(train("--resume", tmp_path / "on", "--adapter", folder), ["--adapter"])


def test_a_run_from_an_adapter_resumes_bit_for_bit(
    made: dict[str, Path], common: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(made["lora"], tmp_path / "in")
    asked = [*common, "--steps", 6, "--lr", 1e-2, "--eval-every", 2, "--adapter", folder, "--out"]
    trained(*asked, tmp_path / "whole")
    step, count = train_script.train_step, iter(range(1, 100))

    def stopped(*arguments: Any) -> Any:
        if next(count) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments)

    monkeypatch.setattr(train_script, "train_step", stopped)
    assert train(*asked, tmp_path / "halves").code == 128 + signal.SIGTERM
    shutil.rmtree(folder)
    trained("--resume", tmp_path / "halves")
    for name in ("tuned.safetensors", "last.safetensors"):
        one, other = (tensors(tmp_path / run / name) for run in ("whole", "halves"))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", ["lora", "full", "selective", "prompt", "adapter"])
def test_a_new_run_starts_from_a_runs_folder(
    runs: dict[str, Path], name: str, base: GPT, common: list[Any], tmp_path: Path
) -> None:
    still = ["--steps", 2, "--lr", 1e-9, "--warmup-ratio", 0, "--weight-decay", 0]
    trained(*common, *still, "--adapter", runs[name], "--out", tmp_path / "on")
    assert_same(logits(loaded(base, tmp_path / "on")), logits(loaded(base, runs[name])), base)
    one, other = (json_of(folder / "config.json") for folder in (tmp_path / "on", runs[name]))
    assert one["mode_options"] == other["mode_options"] and one["mode"] == other["mode"]


def test_options_that_contradict_an_adapter_are_refused(
    made: dict[str, Path], runs: dict[str, Path], common: list[Any], tmp_path: Path, make_reference: Any
) -> None:
    def refused(*arguments: Any, words: list[str]) -> None:
        assert_refused(train(*common, "--out", tmp_path / "run", *arguments), words)
        assert not (tmp_path / "run").exists()

    refused("--adapter", made["lora"], "--rank", 8, words=["--rank", "4", str(made["lora"])])
    refused("--adapter", made["lora"], "--mode", "full", words=["--mode full", "lora"])
    refused("--adapter", made["lora"], "--mode", "all", words=["--mode all", "lora"])
    refused("--adapter", made["lora"], "--prompt-tokens", 3, words=["--prompt-tokens", "mode prompt"])
    refused("--adapter", runs["full"], "--rank", 8, words=["--rank", "mode lora"])
    refused("--adapter", tmp_path, words=["adapter_config.json", "tuned.safetensors"])
    shutil.copytree(runs["lora"], tmp_path / "no-file")
    (tmp_path / "no-file" / "tuned.safetensors").unlink()
    refused("--adapter", tmp_path / "no-file", words=["tuned.safetensors", "missing"])
    other = tmp_path / "other"
    make_reference(seed=1, vocab_size=320, eos_token_id=0, bos_token_id=0).save_pretrained(other)
    for file in ("vocab.json", "merges.txt"):
        shutil.copy(Path(common[1]) / file, other)
    refused("--model", other, "--adapter", runs["lora"], words=["fingerprint", "--model", str(other)])
    assert_refused(evaluate("--adapter", runs["lora"], "--model", other), ["fingerprint"])
    assert train(*common, "--adapter", made["lora"], "--mode", "lora", "--plan").code == 0


def test_several_files_share_one_base_which_stays_as_it_is(
    runs: dict[str, Path], base: GPT, model_folder: Path
) -> None:
    before, values = logits(base), {name: p.clone() for name, p in base.named_parameters()}
    alone = {}
    for name, folder in runs.items():
        fresh = weights.load(str(model_folder)).model
        checkpoint.apply_tuned(fresh, checkpoint.read_tuned(folder, fresh.config))
        alone[name] = logits(fresh.eval())
    models = {name: loaded(base, folder) for name, folder in runs.items()}
    for _ in range(2):  # switching to and fro
        for name, model in models.items():
            assert torch.equal(logits(model), alone[name]) and not torch.equal(alone[name], before)
            assert torch.equal(logits(base), before)
    assert all(torch.equal(p, values[name]) and not p.requires_grad for name, p in base.named_parameters())
    places = {p.data_ptr() for p in base.parameters()}
    for model in models.values():  # nothing but what is tuned has a place of its own
        own = modes.tuned_parameters(model)
        assert all((p.data_ptr() in places) != (name in own) for name, p in model.named_parameters())
    modes.merge(models["lora"], "lora")
    assert all(torch.equal(p, values[name]) for name, p in base.named_parameters())
    assert torch.equal(logits(base), before)


def test_eval_scores_several_without_reading_the_base_again(runs: dict[str, Path], tmp_path: Path) -> None:
    evaluate(runs["lora"], "--save-peft", tmp_path / "peft")
    folders = [runs["lora"], runs["prompt"], runs["full"], runs["selective"], tmp_path / "peft"]
    named = [word for folder in folders for word in ("--adapter", folder)]
    with mock.patch.object(weights, "load", wraps=weights.load) as load:
        ended = evaluate(*named, "--json", *PLAIN)
        assert ended.code == 0 and load.call_count == 1, ended.err
    together = json.loads(ended.out)
    assert list(together) == ["base", *map(str, folders)]
    for folder in folders[:-1]:
        alone = json.loads(evaluate(folder, "--json", *PLAIN).out)
        assert alone["tuned"] == together[str(folder)] and alone["base"] == together["base"]
    assert together[str(folders[-1])]["loss"] == pytest.approx(together[str(folders[0])]["loss"], rel=1e-5)
    table = evaluate(folders[0], *named[2:], *PLAIN, "--shown", 1).out
    rows = {line.split("|")[1].strip(): line for line in table.splitlines() if line.startswith("|")}
    for name, score in together.items():
        assert f" {score['loss']:.4f} " in rows[name] and f" {score['rougeL']:.4f} " in rows[name]
        assert repr(score["completions"][0]) in table
    assert_refused(evaluate(*named, "--save", tmp_path / "hf"), ["--save", "one"])
    assert_refused(evaluate(*named, "--save-peft", tmp_path / "hf"), ["--save-peft", "one"])


def test_eval_continues_a_prompt_with_several_files(runs: dict[str, Path]) -> None:
    several = ["--adapter", runs["lora"], "--adapter", runs["other"], "--prompt", "1: the lunch =", *PLAIN]
    with mock.patch.object(prompt, "generate", wraps=generate.generate) as once:
        ended = evaluate(*several)
        assert ended.code == 0 and once.call_count == 3, ended.err
    texts = [evaluate(runs[name], *several[4:]).out for name in ("lora", "other")]
    assert len(set(texts)) == 2
    assert ended.out.endswith(f"{runs['lora']}: {texts[0]}{runs['other']}: {texts[1]}")
    assert ended.out.startswith("base: ")
    assert evaluate(runs["prompt"], *several).code == 0  # modes may differ: one model after another


@pytest.mark.parametrize("name", ["full", "selective", "lora", "other"])
def test_a_saved_folder_works_in_a_pipeline(
    runs: dict[str, Path], name: str, base: GPT, tmp_path: Path
) -> None:
    assert evaluate(runs[name], "--save", tmp_path / "hf").code == 0
    reference = GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()
    assert_same(logits(reference), logits(loaded(base, runs[name])), base)
    assert reference.lm_head.weight.data_ptr() == reference.transformer.wte.weight.data_ptr()
    write = pipeline("text-generation", str(tmp_path / "hf"), device="cpu")
    for text in ("1: the lunch is late =", "Anna: caf\u00e9, see you"):
        said = write(text, max_new_tokens=24, do_sample=False, return_full_text=False)[0]["generated_text"]
        ended = evaluate(runs[name], "--prompt", text, *PLAIN[:-1], 24)
        assert ended.out == f"{said}\n", ended.err


def random_config(rng: random.Random) -> dict[str, Any]:
    """Fields of a LoraConfig that chooses modules, ranks and alphas in one of PEFT's ways."""
    places = ["c_attn", "attn.c_attn", "c_proj", "attn.c_proj", "mlp.c_proj", "c_fc", "mlp.c_fc"]
    full = [f"transformer.h.{i}.{place}" for i in range(3) for place in lora.TARGET_MODULES]
    expressions = [r".*c_attn", r".*\.[02]\..*(c_fc|c_proj)", r"transformer\.h\.\d\.mlp\.c_\w+", "all-linear",
                   r"h\..*", r".*\.h\.1\.attn.*", "transformer.h.2.attn.c_attn"]  # fmt: skip
    patterns = [*places, *full, r"^transformer\.h\.0\..*", r"^h\.1\..*", r"h\.[01]\.attn\.c_attn", "h.1.mlp",
                r".*\.2\.mlp\.c_fc", "c_.*", "h", r"\w+"]  # fmt: skip
    fields: dict[str, Any] = {"r": rng.randint(1, 6), "lora_alpha": rng.choice([1, 3, 2.5, 16])}
    kind = rng.choice(["ends", "ends", "full names", "expression"])
    if kind == "expression":
        fields["target_modules"] = rng.choice(expressions)
    else:
        names = rng.sample(places if kind == "ends" else full, rng.randint(1, 3))
        fields["target_modules"] = names + (rng.sample(full, 1) if rng.random() < 0.3 else [])
        if rng.random() < 0.4:
            fields["layers_to_transform"] = rng.choice([[0], [1, 2], 2, [5], [0, 1, 2]])
            fields["layers_pattern"] = rng.choice([None, "h", ["h"], r"\w", ["layers", "h"], "transformer.h"])
    if rng.random() < 0.3:
        fields["exclude_modules"] = rng.choice([["mlp.c_proj"], r".*\.0\..*", full[:2], "h.1.*", ["h.0"]])
    for name, values in (("rank_pattern", [1, 2, 7]), ("alpha_pattern", [2, 0.5, 9])):
        if rng.random() < 0.5:
            keys = rng.sample(patterns, rng.randint(1, 3))
            fields[name] = {key: rng.choice(values) for key in keys}
    if rng.random() < 0.3:
        fields["use_rslora"] = True
    if rng.random() < 0.3:
        fields["init_lora_weights"] = rng.choice([False, "gaussian", "orthogonal", "eva"])
        if fields["init_lora_weights"] == "eva":
            fields["eva_config"] = their.EvaConfig()
    return fields


@torch.no_grad()
def logits_of_peft(reference: GPT2LMHeadModel, folder: Path, headless: bool) -> Tensor:
    """Of an adapter that was made on a GPT2LMHeadModel, or on the GPT2Model in it."""
    model = copy.deepcopy(reference)
    if headless:
        states = their.PeftModel.from_pretrained(model.transformer, str(folder)).eval()(IDS).last_hidden_state
        return states @ reference.transformer.wte.weight.T
    return logits(their.PeftModel.from_pretrained(model, str(folder)).eval())


@pytest.mark.parametrize("headless", [False, True])
@pytest.mark.parametrize("start", range(2))
def test_generated_configurations_choose_what_peft_chooses(
    base: GPT, model_folder: Path, tmp_path: Path, start: int, headless: bool
) -> None:
    """Logits as PEFT computes them, for configurations with targets, layers and patterns of every form."""
    reference, rng, loaded_count = GPT2LMHeadModel.from_pretrained(model_folder), random.Random(start), 0
    for trial in range(30):
        fields = random_config(rng)
        folder = tmp_path / str(trial)
        model = copy.deepcopy(reference)
        try:
            config = their.LoraConfig(task_type=None, fan_in_fan_out=True, **fields)
            model = their.get_peft_model(model.transformer if headless else model, config)
        except ValueError:  # PEFT finds no module, or refuses the combination
            continue
        disturbed(model).save_pretrained(folder)
        try:
            wanted = logits_of_peft(reference, folder, headless)
        except RuntimeError:  # saving sorts the patterns, and the first that matches may be another one now
            with pytest.raises(UserError, match="the rank of"):
                loaded(base, folder)
            continue
        found = logits(loaded(base, folder))
        assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max(), fields
        assert (found - logits(base)).abs().max() > 1e-2 * wanted.abs().max()
        loaded_count += 1
    assert loaded_count >= 10


HARMLESS = {
    "EVA": {"init_lora_weights": "eva", "eva_config": {"rho": 2.0, "tau": 0.99}},
    "EVA's settings beside another start": {"eva_config": {"rho": 2.0}},
    "tying without tied targets": {"ensure_weight_tying": True},
    "settings of a start that was not used": {"loftq_config": {"loftq_bits": 4}, "corda_config": {"a": 1}},
    "a field for the backward pass": {"velora_config": {"num_groups": 2}},
    "run-time settings": {"runtime_config": {"ephemeral_gpu_offload": True}, "megatron_core": "m.core"},
    "new fields that are off": {"use_wonder": False, "wonder_config": None, "wonders": []},
}


@pytest.mark.parametrize("name", HARMLESS)
def test_fields_that_leave_a_plain_update_are_accepted(
    made: dict[str, Path], base: GPT, tmp_path: Path, name: str
) -> None:
    wanted = logits(loaded(base, made["lora"]))
    folder = shutil.copytree(made["lora"], tmp_path / "in")
    edit(**HARMLESS[name])(folder)
    assert torch.equal(logits(loaded(base, folder)), wanted)


@pytest.mark.parametrize("pattern", ["(.*)*(.*)*x", "(a+)+$", ".*.*.*.*.*.*.*.*x", "(c_attn|c){9}"])
def test_an_expression_that_could_take_endless_time_is_refused(
    made: dict[str, Path], base: GPT, tmp_path: Path, pattern: str
) -> None:
    folder = shutil.copytree(made["lora"], tmp_path / "in")
    edit(target_modules=pattern)(folder)
    with pytest.raises(UserError, match="repeats too much"):
        loaded(base, folder)
