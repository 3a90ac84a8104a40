"""The tuning modes: exact counts, identities, what trains, and what is refused."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packed import learned_from, packed_rows, random_ids
from packed import logits as logits_of
from scripts import MODES
from torch import Tensor

from minift import modes
from minift.errors import UserError
from minift.files import weights
from minift.files.weights import Base
from minift.model.generate import generate
from minift.model.gpt import GPT, GPTConfig
from minift.model.packing import Batch
from minift.modes import lora, prompt, selective
from minift.options import check_bounds

SIZES = {
    "S": GPTConfig(n_embd=768, n_layer=12, n_head=12),
    "M": GPTConfig(n_embd=1024, n_layer=24, n_head=16),
    "L": GPTConfig(n_embd=1280, n_layer=36, n_head=20),
    "XL": GPTConfig(n_embd=1600, n_layer=48, n_head=25),
}
EVERY = [  # each mode in several forms: what holds for all modes is tested on all of these
    *((mode, small.options) for mode, small in MODES.items()),
    ("selective", {"train": "embeddings"}),
    ("lora", {"rank": 3, "targets": "all", "dropout": 0.1, "scaling": "rslora"}),
    ("lora", {"rank": 3, "targets": "qkv,proj"}),
    ("prompt", {"prompt_tokens": 2, "prompt_init": "noise"}),
    ("adapter", {"bottleneck": 4, "placement": "pfeiffer", "adapter_norms": True}),
]
EVERY_MODE = pytest.mark.parametrize("mode, options", EVERY, ids=[f"{m} {list(o.values())}" for m, o in EVERY])


def test_every_mode_of_the_registry_is_tested() -> None:
    assert set(MODES) == set(modes.MODES)
    assert all(name == mode.name for name, mode in modes.MODES.items())


def apply(model: GPT, mode: str, changes: dict[str, Any]) -> GPT:
    """As a run does: the options' bounds are checked first."""
    options = modes.MODES[mode].Options(**changes)
    check_bounds(options)
    modes.apply(model, mode, options)
    return model


@torch.no_grad()
def disturb(model: GPT, seed: int = 7) -> GPT:
    """Move everything that trains, so that B is not zero and no start value is left."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in modes.tuned_parameters(model).values():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def some_ids(rows: int = 3, tokens: int = 11) -> Tensor:
    return random_ids(97, rows, tokens, seed=5)


def some_batch(model: GPT, ids: Tensor) -> Batch:
    """The first row learns from its sixth token on, the others everything."""
    return model.pack(learned_from(ids, [5, *[1] * (len(ids) - 1)]))


@torch.no_grad()
def logits(model: GPT) -> Tensor:
    return logits_of(model, some_ids())


COUNTS: dict[tuple[str, ...], tuple[int, int, int, int]] = {
    ("full",): (124_439_808, 354_823_168, 774_030_080, 1_557_611_200),
    ("selective", "train=top:1"): (7_087_872, 12_596_224, 19_677_440, 30_740_800),
    ("selective", "train=top:2"): (14_175_744, 25_192_448, 39_354_880, 61_481_600),
    ("selective", "train=top:2,final"): (14_177_280, 25_194_496, 39_357_440, 61_484_800),
    ("selective", "train=bias"): (102_144, 271_360, 508_160, 846_400),
    ("selective", "train=attention+bias,mlp+bias"): (82_944, 221_184, 414_720, 691_200),
    ("selective", "train=norm"): (38_400, 100_352, 186_880, 310_400),
    ("lora", "rank=1", "targets=q,v"): (36_864, 98_304, 184_320, 307_200),
    ("lora", "rank=4", "targets=q,v"): (147_456, 393_216, 737_280, 1_228_800),
    ("lora", "rank=8", "targets=q,v"): (294_912, 786_432, 1_474_560, 2_457_600),
    ("lora", "rank=16", "targets=q,v"): (589_824, 1_572_864, 2_949_120, 4_915_200),
    ("lora", "rank=8", "targets=q,k,v"): (442_368, 1_179_648, 2_211_840, 3_686_400),
    ("lora", "rank=8", "targets=qkv"): (294_912, 786_432, 1_474_560, 2_457_600),
    ("lora", "rank=8", "targets=qkv,o"): (442_368, 1_179_648, 2_211_840, 3_686_400),
    ("lora", "rank=8", "targets=mlp"): (737_280, 1_966_080, 3_686_400, 6_144_000),
    ("lora", "rank=8", "targets=qkv,o,fc,proj"): (1_179_648, 3_145_728, 5_898_240, 9_830_400),
    ("lora", "rank=8", "targets=all"): (1_327_104, 3_538_944, 6_635_520, 11_059_200),
    ("adapter", "bottleneck=64"): (2_379_264, 6_343_680, 11_893_248, 19_820_544),
    ("adapter", "bottleneck=64", "adapter_norms=1"): (2_417_664, 6_444_032, 12_080_128, 20_130_944),
    ("adapter", "bottleneck=64", "placement=pfeiffer"): (1_189_632, 3_171_840, 5_946_624, 9_910_272),
    ("prompt", "prompt_tokens=20"): (15_360, 20_480, 25_600, 32_000),
    ("prompt", "prompt_tokens=100"): (76_800, 102_400, 128_000, 160_000),
    ("prompt", "prompt_tokens=100", "prompt_init=noise"): (76_800, 102_400, 128_000, 160_000),
}


@pytest.mark.parametrize("what", COUNTS, ids=" ".join)
def test_counts_are_exact(what: tuple[str, ...]) -> None:
    """GPT-2's four sizes, without memory for their weights."""
    mode, *settings = what
    options: dict[str, Any] = dict(setting.split("=") for setting in settings)
    options = {name: int(value) if value.isdigit() else value for name, value in options.items()}
    counts = []
    for config in SIZES.values():
        with torch.device("meta"):
            model = GPT(config)
        tuned = modes.tuned_parameters(apply(model, mode, options))
        counts.append(sum(parameter.numel() for parameter in tuned.values()))
    assert tuple(counts) == COUNTS[what]


def test_the_head_counted_separately() -> None:
    heads = [config.vocab_size * config.n_embd for config in SIZES.values()]
    totals = [full + head for full, head in zip(COUNTS["full",], heads, strict=True)]
    assert totals == [163_037_184, 406_286_336, 838_359_040, 1_638_022_400]


@pytest.mark.parametrize(
    "size, bottleneck, count",
    [
        ("M", 6, 368_784),
        ("M", 224, 11_089_152),
        ("L", 8, 875_808),
        ("L", 248, 23_002_848),
    ],
)
def test_the_papers_adapter_rows(size: str, bottleneck: int, count: int) -> None:
    """LoRA's table 3, Adapter-L: one adapter and one norm in each block."""
    with torch.device("meta"):
        model = GPT(SIZES[size])
    apply(model, "adapter", {"bottleneck": bottleneck, "placement": "pfeiffer"})
    norms = 2 * model.config.n_embd * model.config.n_layer
    assert sum(p.numel() for p in modes.tuned_parameters(model).values()) + norms == count


def test_q_and_v_have_updates_and_k_has_none(make_gpt: Callable) -> None:
    """Rank 4 on the fused matrix has as many parameters as on q and v: the update tells them apart."""
    model = disturb(apply(make_gpt(), "lora", {"rank": 4, "alpha": 7.0, "targets": "q,v"}))
    fused = disturb(apply(make_gpt(), "lora", {"rank": 4, "targets": "qkv"}))
    assert sum(p.numel() for p in modes.tuned_parameters(model).values()) == sum(
        p.numel() for p in modes.tuned_parameters(fused).values()
    )
    for block, other in zip(model.h, fused.h, strict=True):
        before = block.attn.c_attn.weight.clone()
        lora.merge(model)
        q, k, v = (block.attn.c_attn.weight - before).chunk(3)
        lora.unmerge(model)
        assert (k == 0).all()
        ranks = [torch.linalg.matrix_rank(part, tol=1e-4).item() for part in (q, v, torch.cat([q, v]))]
        assert ranks == [4, 4, 8]
        assert torch.linalg.matrix_rank(other.attn.c_attn.update(), tol=1e-4) == 4


def test_each_target_adapts_its_own_rows(make_gpt: Callable) -> None:
    rows = {"q": range(24), "k": range(24, 48), "v": range(48, 72)}
    for target, changed in rows.items():
        update = disturb(apply(make_gpt(), "lora", {"targets": target})).h[1].attn.c_attn.update()
        assert update.abs().sum(1).nonzero().flatten().tolist() == list(changed)
    named = {"o": "attn.c_proj", "fc": "mlp.c_fc", "proj": "mlp.c_proj"}
    for target, layer in named.items():
        tuned = modes.tuned_parameters(apply(make_gpt(), "lora", {"targets": target}))
        assert set(tuned) == {f"h.{i}.{layer}.lora_{m}" for i in range(3) for m in "AB"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@EVERY_MODE
def test_the_start_is_the_base_bit_for_bit(
    make_gpt: Callable, mode: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    base, model = make_gpt(), apply(make_gpt(), mode, options)
    if model.prompt_tokens:
        return  # extra positions change what is computed from the start
    base.requires_grad_(False)
    base.set_compute_dtype(dtype)
    model.set_compute_dtype(dtype)
    if dtype == torch.bfloat16 and mode not in ("lora", "adapter"):
        # what is computed from fp32 parameters that train is not, bit for bit, what bf16 ones give
        assert (logits(model) - logits(base)).norm() / logits(base).norm() < 0.03
        return
    assert torch.equal(logits(base), logits(model))
    assert generate(base, [[1, 2], [3]], 8) == generate(model, [[1, 2], [3]], 8)


LORAS = [options for mode, options in EVERY if mode == "lora"]


@pytest.mark.parametrize("options", LORAS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_equals_unmerged_and_unmerge_restores_every_bit(
    make_gpt: Callable, options: dict[str, Any], dtype: torch.dtype
) -> None:
    model = apply(make_gpt(), "lora", options)
    model.set_compute_dtype(dtype)
    disturb(model)
    base = {name: p.clone() for name, p in model.named_parameters()}
    unmerged, without = logits(model), logits(make_gpt())
    assert (unmerged - without).abs().max() > 0.5
    lora.merge(model)
    lora.merge(model)  # a second time changes nothing
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, base[name])}
    assert {name.replace("lora_A", "weight") for name in base if "lora_A" in name} == changed
    if dtype == torch.float32:
        assert torch.allclose(logits(model), unmerged, atol=1e-5, rtol=1e-5)
    else:
        assert (logits(model) - unmerged).norm() / unmerged.norm() < 0.03
    lora.unmerge(model)
    lora.unmerge(model)
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters())
    assert torch.equal(logits(model), unmerged)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    "targets, layers",
    [
        ("qkv", ["attn.c_attn"]),
        ("o", ["attn.c_proj"]),
        ("fc", ["mlp.c_fc"]),
        ("proj", ["mlp.c_proj"]),
        ("qkv,o,fc,proj", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
    ],
)
def test_lora_equals_peft(
    make_reference: Callable, from_reference: Callable, targets: str, layers: list[str], rslora: bool
) -> None:
    import peft

    reference = make_reference()
    options = {"rank": 3, "alpha": 7.0, "targets": targets, "scaling": "rslora" if rslora else "standard"}
    model = disturb(apply(from_reference(reference), "lora", options))
    names = [f"transformer.h.{i}.{layer}" for i in range(3) for layer in layers]
    theirs = peft.get_peft_model(
        reference,
        peft.LoraConfig(r=3, lora_alpha=7, use_rslora=rslora, target_modules=names, fan_in_fan_out=True),
    ).eval()
    found = 0
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                short = name.removeprefix("base_model.model.transformer.").removesuffix(".default.weight")
                parameter.copy_(model.get_parameter(short))
                found += 1
        wanted = theirs(some_ids()).logits
    assert found == len(modes.tuned_parameters(model)) == sum(p.requires_grad for p in theirs.parameters())
    assert (logits(model) - wanted).abs().max() < 1e-4
    assert (logits(model) - logits(from_reference(make_reference()))).abs().max() > 0.1


def test_a_starts_as_loralib_does_and_b_at_zero() -> None:
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(vocab_size=9, n_positions=8, n_embd=64, n_layer=1, n_head=4, n_inner=400, eos_token_id=0)
    )
    apply(model, "lora", {"rank": 16, "targets": "qkv,proj"})
    for layer, fan_in in ((model.h[0].attn.c_attn, 64), (model.h[0].mlp.c_proj, 400)):
        bound = 1 / math.sqrt(fan_in)  # Kaiming's uniform with a = sqrt(5) is sqrt(6 / (1 + 5) / fan_in)
        assert 0.97 * bound < layer.lora_A.abs().max() <= bound
        assert layer.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert (layer.lora_B == 0).all() and layer.lora_A.shape == (16, fan_in)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 0}, "--rank 0: must be at least 1"),
        ({"alpha": 0.0}, "--alpha 0.0: must be above 0"),
        ({"alpha": float("nan")}, "--alpha nan: must be above 0"),
        ({"dropout": 1.0}, "--dropout 1.0: must be below 1"),
        ({"dropout": -0.1}, "--dropout -0.1: must be at least 0"),
        ({"targets": "q,x"}, "'x' is not a target; there are q, k, v, qkv, o, fc, proj, all, attention, mlp"),
        ({"targets": ""}, "'' is not a target"),
        ({"targets": "q,,v"}, "'' is not a target"),
        ({"targets": "qkv,q"}, "choose one"),
        ({"targets": "all,qkv"}, "choose one"),
    ],
)
def test_lora_refuses(make_gpt: Callable, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        apply(make_gpt(), "lora", options)
    assert message in str(caught.value)


def test_ranks_start_on_the_same_curve(make_gpt: Callable) -> None:
    """With alpha fixed and alpha / rank as scale, early losses hardly depend on the rank ("LoRA Without
    Regret", Schulman et al. 2025); with alpha / sqrt(rank) they do, so the tolerance can tell."""
    ids = some_ids(4, 24)

    def drop(rank: int, scaling: str, seed: int) -> float:
        torch.manual_seed(seed)
        model = apply(make_gpt(), "lora", {"rank": rank, "alpha": 32.0, "targets": "all", "scaling": scaling})
        optimizer = torch.optim.AdamW(modes.tuned_parameters(model).values(), lr=1e-4, weight_decay=0)
        losses = []
        for _ in range(5):
            losses.append(model.loss(some_batch(model, ids)))
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        return (losses[0] - losses[-1]).item()

    standard, rslora = (
        [sum(drop(rank, scaling, seed) for seed in range(3)) for rank in (1, 4, 16)]
        for scaling in ("standard", "rslora")
    )
    assert max(standard) / min(standard) < 1.2
    assert max(rslora) / min(rslora) > 2


C, W, V, T = 24, 96, 97, 96
BLOCK = 12 * C * C + 13 * C
ATTENTION, MLP, NORMS = 4 * C * C + 4 * C, 8 * C * C + 5 * C, 4 * C


@pytest.mark.parametrize(
    "train, count",
    [
        ("top:1", BLOCK),
        ("bottom:1", BLOCK),
        ("top:3", 3 * BLOCK),
        ("top:2,bottom:2", 3 * BLOCK),  # a union counts the middle block once
        ("blocks:1", BLOCK),
        ("blocks:0-1", 2 * BLOCK),
        ("top:2+bottom:2", BLOCK),
        ("top:2+bias", 2 * 11 * C),
        ("bias+top:2", 2 * 11 * C),
        ("bias", 3 * 11 * C + C),
        ("norm", 3 * NORMS + 2 * C),
        ("attention", 3 * ATTENTION),
        ("mlp", 3 * MLP),
        ("attention,mlp,norm,embeddings", (V + T) * C + 3 * BLOCK + 2 * C),
        ("embeddings", (V + T) * C),
        ("final", 2 * C),
        ("final+bias", C),
        ("top:1+attention+bias", 4 * C),
        (" top:1 + bias , final ", 11 * C + 2 * C),
        ("norm+bias,norm", 3 * NORMS + 2 * C),
    ],
)
def test_selection(make_gpt: Callable, train: str, count: int) -> None:
    tuned = modes.tuned_parameters(apply(make_gpt(), "selective", {"train": train}))
    assert sum(p.numel() for p in tuned.values()) == count


def test_selection_by_name(make_gpt: Callable) -> None:
    def names(train: str) -> set[str]:
        return set(modes.tuned_parameters(apply(make_gpt(), "selective", {"train": train})))

    assert names("top:1") == {n for n, _ in make_gpt().named_parameters() if n.startswith("h.2.")}
    assert names("bottom:1+norm") == {f"h.0.ln_{i}.{part}" for i in (1, 2) for part in ("weight", "bias")}
    assert names("blocks:1+mlp+bias,final") == {
        "h.1.mlp.c_fc.bias",
        "h.1.mlp.c_proj.bias",
        "ln_f.weight",
        "ln_f.bias",
    }
    assert names("embeddings") == {"wte.weight", "wpe.weight"}
    assert names("bias") == {n for n, _ in make_gpt().named_parameters() if n.endswith("bias")}


@pytest.mark.parametrize(
    "train",
    [
        "",
        "top",
        "top:",
        "top:0",
        "top:4",
        "top:-1",
        "top:1-2",
        "top:x",
        "top:\u00b2",
        "bottom:4",
        "blocks:2-1",
        "blocks:1-3",
        "blocks:-1",
        "blocks:1-",
        "blocks:0-1-2",
        "biases",
        "norm:1",
        "top:2,",
        "top:2++bias",
        "attention+mlp",
        "final+mlp",
        "embeddings+bias",
        "top:1,top:1+bottom:1",
    ],
)
def test_a_selection_that_says_nothing_is_refused_with_what_there_is(make_gpt: Callable, train: str) -> None:
    with pytest.raises(UserError, match="^--train") as caught:
        apply(make_gpt(), "selective", {"train": train})
    text = str(caught.value)
    assert selective.GROUP_HELP in text or "write top:2" in text or "does not fit a model of 3 blocks" in text


@EVERY_MODE
def test_a_step_changes_what_trains_and_nothing_else(
    make_gpt: Callable, tokenizer: Any, mode: str, options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model = apply(make_gpt(), mode, options).train()
    tuned, ids = modes.tuned_parameters(model), some_ids()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(tuned.values(), lr=1e-2, weight_decay=0)
    for _ in range(2):  # LoRA's A and an adapter's `down` get their first gradient in the second step
        optimizer.zero_grad()
        model.loss(some_batch(model, ids)).backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} == set(tuned)
        optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(tuned)
    assert 0 < len(tuned) and (mode == "full") == (len(tuned) == len(before))


@EVERY_MODE
def test_bf16_trains_close_to_fp32(make_gpt: Callable, mode: str, options: dict[str, Any]) -> None:
    """Gradients in bf16 point where those in fp32 do, and arrive in fp32."""
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = disturb(apply(make_gpt(), mode, options))
        model.set_compute_dtype(dtype)
        model.loss(some_batch(model, some_ids())).backward()
        tuned = modes.tuned_parameters(model).values()
        assert {p.grad.dtype for p in tuned} == {torch.float32}
        gradients.append(torch.cat([p.grad.flatten() for p in tuned]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


@EVERY_MODE
def test_what_is_saved_gives_the_same_model_back(make_gpt: Callable, mode: str, options: dict[str, Any]) -> None:
    model = disturb(apply(make_gpt(), mode, options))
    saved = {name: p.detach().clone() for name, p in modes.tuned_parameters(model).items()}
    torch.manual_seed(99)
    again = apply(make_gpt(), mode, options)
    assert not torch.allclose(logits(again), logits(model), atol=0.01)
    modes.load_tuned(again, saved, "file")
    assert torch.equal(logits(again), logits(model))
    assert (logits(model) - logits(make_gpt())).abs().max() > 0.01  # something was tuned at all


@EVERY_MODE
def test_a_tuned_file_that_does_not_fit_is_refused_whole(
    make_gpt: Callable, mode: str, options: dict[str, Any]
) -> None:
    model = apply(make_gpt(), mode, options)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    saved = {name: p.detach() + 1 for name, p in modes.tuned_parameters(model).items()}
    first, last = list(saved)[0], list(saved)[-1]
    saved["h.9.extra"] = torch.ones(2)
    saved[last] = saved[last][..., :-1]
    shapes = f"{last} is {tuple(saved[last].shape)} and not {tuple(before[last].shape)}"
    wanted = {"h.9.extra is not expected", shapes}
    if first != last:
        del saved[first]
        wanted.add(f"{first} is missing")
    with pytest.raises(UserError) as caught:
        modes.load_tuned(model, saved, "tuned.safetensors")
    head, _, faults = str(caught.value).partition(": ")
    assert head == "tuned.safetensors does not fit the model and options it names"
    assert set(faults.split("; ")) == wanted
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@EVERY_MODE
def test_merging_leaves_a_plain_gpt2_or_says_why_not(
    make_gpt: Callable, tmp_path: Path, mode: str, options: dict[str, Any]
) -> None:
    model = disturb(apply(make_gpt(), mode, options))
    tuned = logits(model)
    record, plain_names = modes.MODES[mode], make_gpt().state_dict().keys()
    if record.merge is None and not modes.tuned_parameters(model).keys() <= plain_names:
        with pytest.raises(UserError) as caught:
            modes.merge(model, mode)
        reasons = {"prompt": "a soft prompt cannot be merged", "adapter": "adapters cannot be merged"}
        assert reasons.get(mode, record.why_no_merge or "and has no merge") in str(caught.value)
        return
    modes.merge(model, mode)
    weights.save_folder(Base("base", None, model, None, None), model, tmp_path / "out")
    plain = weights.load(str(tmp_path / "out")).model
    assert plain.state_dict().keys() == plain_names
    assert torch.allclose(logits(plain), tuned, atol=1e-5, rtol=1e-5)


@EVERY_MODE
def test_every_mode_describes_itself(
    make_gpt: Callable, tokenizer: Any, mode: str, options: dict[str, Any]
) -> None:
    model = apply(make_gpt(vocab_size=320), mode, options)
    lines = modes.describe(model, mode, tokenizer)
    assert len(lines) == (options["prompt_tokens"] if mode == "prompt" else len(modes.tuned_parameters(model)))
    assert all("norm" in line and "\n" not in line for line in lines)


def test_adapters_stand_where_the_papers_put_them(make_gpt: Callable) -> None:
    """On the sublayer's output, inside its residual: x + adapter(f(norm(x))), with the adapter's own skip."""
    model = disturb(apply(make_gpt(), "adapter", {"bottleneck": 5}))
    block, x = model.h[1], torch.randn(64, 24, generator=torch.Generator().manual_seed(0))
    rows = packed_rows([7, 9])

    def adapter(layer: Any, y: Tensor) -> Tensor:
        return (
            y
            + torch.nn.functional.gelu(y @ layer.down.weight.T + layer.down.bias) @ layer.up.weight.T
            + layer.up.bias
        )

    with torch.no_grad():
        _, normed = block.ln_1(x, None)
        middle, normed = block.ln_2(x, adapter(block.attn_adapter, block.attn(normed, rows)))
        update = adapter(block.mlp_adapter, block.mlp(normed))
        for found, wanted in zip(block(x, None, rows), (middle, update), strict=True):
            assert torch.allclose(found, wanted, atol=1e-5)
    one = apply(make_gpt(), "adapter", {"bottleneck": 5, "placement": "pfeiffer"})
    assert {name.split(".")[2] for name in modes.tuned_parameters(one)} == {"mlp_adapter"}
    with pytest.raises(UserError, match="--bottleneck 0: must be at least 1"):
        apply(make_gpt(), "adapter", {"bottleneck": 0})


def start(model: GPT, changes: dict[str, Any], tokenizer: Any) -> None:
    """Apply soft prompts, and give them the values that a new run starts from."""
    apply(model, "prompt", changes)
    modes.MODES["prompt"].start(model, prompt.Options(**changes), tokenizer)


def test_where_a_soft_prompt_starts(make_gpt: Callable, tokenizer: Any) -> None:
    model = make_gpt(vocab_size=320)
    text = "The fridge is broken"
    ids = tokenizer.encode(text).ids
    count = len(ids) + 2
    start(model, {"prompt_tokens": count, "prompt_init": "text", "prompt_text": text}, tokenizer)
    assert torch.equal(model.prompt.weight, model.wte.weight[ids + ids[:2]])
    assert [near[0][0] for near in prompt.nearest_tokens(model, tokenizer)[: len(ids)]] == [
        tokenizer.decode([i]) for i in ids
    ]
    assert all(near[0][1] == pytest.approx(1, abs=1e-5) for near in prompt.nearest_tokens(model, tokenizer))

    starts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        starts.append(apply(make_gpt(), "prompt", {"prompt_tokens": 30}).prompt.weight.detach())
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])
    rows = {tuple(row) for row in make_gpt().wte.weight.tolist()}
    chosen = [tuple(row) for row in starts[0].tolist()]
    assert set(chosen) <= rows and len(set(chosen)) == 30
    many = apply(make_gpt(vocab_size=5, eos_token_id=0), "prompt", {"prompt_tokens": 12}).prompt.weight
    assert len({tuple(row) for row in many.tolist()}) == 5
    noise = apply(make_gpt(), "prompt", {"prompt_tokens": 90, "prompt_init": "noise"}).prompt.weight
    assert noise.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prompt_tokens": 0}, "--prompt-tokens 0: must be at least 1"),
        ({"prompt_tokens": 96}, "--prompt-tokens 96: must be below the model's 96 positions"),
        ({"prompt_init": "text"}, "belong together"),
        ({"prompt_text": "x"}, "belong together"),
        ({"prompt_init": "text", "prompt_text": ""}, "--prompt-text is empty"),
    ],
)
def test_prompt_refuses(make_gpt: Callable, tokenizer: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        start(make_gpt(), options, tokenizer)


def test_modes_do_not_add_up(make_gpt: Callable) -> None:
    """apply freezes first: what another part of the program left trainable does not train on."""
    model = make_gpt()
    assert all(p.requires_grad for p in model.parameters())
    assert set(modes.tuned_parameters(apply(model, "selective", {"train": "final"}))) == {
        "ln_f.weight",
        "ln_f.bias",
    }
