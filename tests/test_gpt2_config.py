"""config.json: what is read of it, under which names, and what is refused."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from minift.errors import UserError
from minift.files.gpt2_config import OTHER_ACTIVATIONS, parse_config, saved_config
from minift.model.gpt import ACTIVATIONS, GPTConfig

GPT2 = {"model_type": "gpt2"}
SMALL = {"n_embd": 24, "n_layer": 3, "n_head": 3, "n_positions": 96}


def test_a_configuration_of_transformers_is_read_whole(make_reference: Callable) -> None:
    reference = make_reference(n_inner=40, layer_norm_epsilon=0.25)
    raw = json.loads(reference.config.to_json_string(use_diff=False))
    config = parse_config(raw, "config.json")
    assert config == GPTConfig(
        vocab_size=97,
        n_positions=96,
        n_embd=24,
        n_layer=3,
        n_head=3,
        n_inner=40,
        layer_norm_epsilon=0.25,
    )
    assert config.mlp_width == 40 and GPTConfig().mlp_width == 3072


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"model_type": None}, "model_type is None"),
        ({"activation_function": "mish"}, "activation_function 'mish' is not known here; known: gelu_new"),
        ({"n_embd": 770}, "n_embd 770 is not a multiple of n_head 12"),
        ({"n_embd": "768"}, "n_embd is '768'"),
        ({"n_layer": 0}, "n_layer is 0"),
        ({"n_layer": True}, "n_layer is True"),
        ({"n_head": -1}, "n_head is -1"),
        ({"n_inner": 0}, "n_inner is 0"),
        ({"n_positions": 1.5}, "n_positions is 1.5"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"layer_norm_epsilon": "tiny"}, "layer_norm_epsilon is 'tiny'"),
        ({"layer_norm_epsilon": -1.0}, "layer_norm_epsilon is -1.0"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon is nan"),
        ({"scale_attn_weights": 1}, "scale_attn_weights is 1"),
        ({"activation_function": ["relu"]}, "activation_function is "),
        ({"add_cross_attention": True}, "add_cross_attention is set"),
    ],
)
def test_what_is_not_gpt2_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_config(GPT2 | changes, "x/config.json")
    assert str(caught.value).startswith("x/config.json: ") and message in str(caught.value)


@pytest.mark.parametrize("name", [*ACTIVATIONS, *OTHER_ACTIVATIONS])
def test_an_activation_is_the_function_that_transformers_has_under_its_name(name: str) -> None:
    from transformers.activations import ACT2FN

    x = torch.linspace(-20, 20, 2001)
    config = parse_config(GPT2 | {"activation_function": name}, "config.json")
    assert (ACTIVATIONS[config.activation_function](x) - ACT2FN[name](x)).abs().max() < 5e-6


def test_every_activation_of_transformers_that_is_one_of_ours_has_its_name() -> None:
    from transformers.activations import ACT2FN

    x = torch.linspace(-20, 20, 2001)
    known = {**{name: name for name in ACTIVATIONS}, **OTHER_ACTIVATIONS}
    for name in ACT2FN.keys() - known.keys() - {"xielu", "prelu"}:
        for function in ACTIVATIONS.values():
            assert (ACT2FN[name](x) - function(x)).abs().max() > 1e-3, name


def test_sizes_under_their_other_names_are_read() -> None:
    from transformers import GPT2Config

    names = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3,
             "max_position_embeddings": 96}  # fmt: skip
    theirs = GPT2Config(**names)
    config = parse_config(GPT2 | names, "config.json")
    assert config == parse_config(GPT2 | SMALL, "config.json")
    assert all(getattr(theirs, name) == getattr(config, name) for name in SMALL)
    with pytest.raises(UserError, match="hidden_size 24 contradicts n_embd 32"):
        parse_config(GPT2 | names | {"n_embd": 32}, "config.json")
    saved = saved_config(GPT2 | names, config, None)
    assert "hidden_size" not in saved and saved["n_embd"] == 24


@pytest.mark.parametrize(
    "field",
    [{"n_layers": 3}, {"rotary_dim": 8}, {"position_embedding_type": "relative"}, {"multi_query": True,
     "num_key_value_heads": 1}, {"attention_window": 64}, {"quantization_config": {"bits": 4}},
     {"d_model": 64}, {"parallel_residual": True}, {"pruned_heads": {"0": [1]}}, {"hidden_act": "gelu"}],
)  # fmt: skip
def test_an_unknown_field_that_changes_the_computation_is_refused_by_name(field: dict[str, Any]) -> None:
    name = list(field)[-1]
    with pytest.raises(UserError, match=f"config.json: {name} is .*GPT-2 has no such field"):
        parse_config(GPT2 | SMALL | field, "config.json")


def test_harmless_fields_are_accepted() -> None:
    from transformers import GPT2Config, PretrainedConfig

    wanted = parse_config(GPT2 | SMALL, "config.json")
    more = {"n_ctx": 1024, "position_embedding_type": "absolute", "task_specific_params": {"a": {"b": 1}},
            "gradient_checkpointing": True, "torch_dtype": "float16", "finetuning_task": "x", "rotary": False,
            "tokenizer_class": "BertTokenizer", "output_past": True, "use_bfloat16": False}  # fmt: skip
    for fields in (GPT2Config().to_dict(), PretrainedConfig().to_dict(), more):
        assert parse_config(fields | GPT2 | SMALL, "config.json") == wanted


def test_a_file_without_model_type_but_with_gpt2s_fields_is_read() -> None:
    assert parse_config(SMALL, "config.json") == parse_config(GPT2 | SMALL, "config.json")


def test_a_saved_configuration_claims_to_be_gpt2_only_if_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config(GPT2 | SMALL, "config.json")
    saved = saved_config({"architectures": ["GPT2Model"], "a": 1}, config, 5)
    assert saved["model_type"] == "gpt2" and saved["architectures"] == ["GPT2LMHeadModel"]
    assert saved["a"] == 1 and saved["eos_token_id"] == 5 and parse_config(saved, "x") == config

    import dataclasses

    Rotary = dataclasses.make_dataclass("Rotary", [("rotary", bool, False)], bases=(GPTConfig,), frozen=True)
    assert saved_config({}, Rotary(**SMALL), 5)["model_type"] == "gpt2"
    saved = saved_config({}, Rotary(**SMALL, rotary=True), 5)
    assert saved["model_type"] == "minift" and saved["architectures"] == ["GPT"] and saved["rotary"] is True
    monkeypatch.setattr("minift.files.gpt2_config.GPTConfig", Rotary)
    assert parse_config(saved, "x").rotary is True
