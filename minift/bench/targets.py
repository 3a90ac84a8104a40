"""The targets for a GPU beside the results of `python -m minift.bench gpu`, and the table of the README."""

from collections.abc import Callable
from typing import Any

from minift.bench.layers import OUR_KERNELS
from minift.report.table import Columns, format_bytes, table

Result = dict[str, Any]
NOT_MEASURED = "not measured"
TARGET_COLUMNS: Columns = {"target": ("target", str), "measured": ("measured", str), "met": ("met", str)}
README_COLUMNS: Columns = {
    "mode": ("mode, GPT-2 124M, bf16", str),
    "8": ("tokens/s, 8 rows", "{:,.0f}".format),
    "64": ("tokens/s, 64 rows", "{:,.0f}".format),
    "peak": ("peak memory, 64 rows", format_bytes),
    "stack 8": ("transformers + PEFT, 8 rows", "{:,.0f}".format),
    "stack 64": ("64 rows", "{:,.0f}".format),
}


def targets(results: list[Result]) -> list[Result]:
    """Each target, the value that was measured, and whether it is met."""
    thin, wide = fused_gain(results, 768, 8192), fused_gain(results, 4096, 8192)
    rates = {batch: best(train_rows(results, "lora", batch), "tokens_per_second") for batch in (8, 64)}
    times = {batch: stack_times(results, batch) for batch in (8, 64)}
    return [
        target("K = 768, 8,192 tokens: eager / ours", thin(0.0), 1.7, "{:.2f}"),
        target("the same with dropout 0.1", thin(0.1), 2.0, "{:.2f}"),
        target("K = 4096, 8,192 tokens: eager / ours", wide(0.0), 1.15, "{:.2f}"),
        target("the same with dropout 0.1", wide(0.1), 1.25, "{:.2f}"),
        target("4096 x 4096: ours / frozen linear, at most", over_frozen(results), 1.15, "{:.2f}", at_most=True),
        target("LoRA training, auto / the Function in tokens/s", auto_gain(results), 1.0, "{:.2f}"),
        target("LoRA of GPT-2 124M, 8 x 170: tokens/s", rates[8], 400_000, "{:,.0f}"),
        target("the same, 64 x 170: share of the product rate",
               best(train_rows(results, "lora", 64), "product_share"), 0.35, "{:.0%}"),
        target("LoRA, batch 8: times the stack's tokens/s", times[8], 5.0, "{:.1f}"),
        target("LoRA, batch 64: times the stack's tokens/s", times[64], 2.5, "{:.1f}"),
    ]


def target(name: str, measured: float | None, bound: float, form: str, at_most: bool = False) -> Result:
    text = f"{name} {form.format(bound)}" if at_most else f"{name}, at least {form.format(bound)}"
    if measured is None:
        return {"target": text, "measured": NOT_MEASURED, "met": NOT_MEASURED}
    is_met = measured <= bound if at_most else measured >= bound
    return {"target": text, "measured": form.format(measured), "met": "yes" if is_met else "no"}


def best(results: list[Result], name: str) -> float | None:
    return max((result[name] for result in results), default=None)


def by_case(results: list[Result], K: int, M: int) -> dict[tuple, dict[str, Result]]:
    """{(N, parts, rank, dropout): {implementation: its result}} of layers, replayed from CUDA graphs."""
    cases: dict[tuple, dict[str, Result]] = {}
    for result in results:
        if result["table"] == "layers" and (result["K"], result["M"], result["launch"]) == (K, M, "graph"):
            case = tuple(result[name] for name in ("N", "parts", "rank", "dropout"))
            cases.setdefault(case, {})[result["row"]] = result
    return cases


def ours(rows: dict[str, Result]) -> Result | None:
    """The fastest of this project's implementations."""
    return min((rows[kernel] for kernel in OUR_KERNELS if kernel in rows), key=lambda row: row["ms"], default=None)


def fused_gain(results: list[Result], K: int, M: int) -> Callable[[float], float | None]:
    """For a dropout: the least of eager / ours over the measured layers of K inputs."""
    def gain(dropout: float) -> float | None:
        ratios = []
        for case, rows in by_case(results, K, M).items():
            if case[-1] == dropout and "eager" in rows and (fastest := ours(rows)):
                ratios.append(rows["eager"]["ms"] / fastest["ms"])
        return min(ratios, default=None)

    return gain


def over_frozen(results: list[Result]) -> float | None:
    """The largest of ours / frozen linear at 4096 x 4096, 8,192 tokens, without dropout."""
    ratios = []
    for (N, _, _, dropout), rows in by_case(results, 4096, 8192).items():
        if N == 4096 and not dropout and "frozen" in rows and (fastest := ours(rows)):
            ratios.append(fastest["ms"] / rows["frozen"]["ms"])
    return max(ratios, default=None)


def train_rows(results: list[Result], mode: str, batch: int) -> list[Result]:
    """The results of GPT-2 124M with rows of one length and --kernel auto, with CUDA graphs and without."""
    wanted = (mode, "gpt2", batch, "equal")
    return [result for result in results if result["table"] == "train" and result["kernel"] in (None, "auto")
            and tuple(result[name] for name in ("mode", "size", "batch", "rows")) == wanted]


def auto_gain(results: list[Result]) -> float | None:
    """The least of auto / torch in tokens/s, over the pairs that differ in --kernel alone."""
    rates: dict[tuple, dict[str, float]] = {}
    for result in results:
        if result["table"] == "train" and result["mode"] == "lora":
            setting = tuple(result[name] for name in ("size", "batch", "rows", "attention", "graphs"))
            rates.setdefault(setting, {})[result["kernel"]] = result["tokens_per_second"]
    ratios = [pair["auto"] / pair["torch"] for pair in rates.values() if {"auto", "torch"} <= pair.keys()]
    return min(ratios, default=None)


def stack_times(results: list[Result], batch: int) -> float | None:
    """minift's tokens/s over those of the fastest form of transformers + PEFT, mode lora, rows of one length."""
    rates = {}
    for result in results:
        if result["table"] == "peer" and (result["mode"], result["batch"], result["rows"]) == ("lora", batch, "equal"):
            rates[result["program"]] = result["tokens_per_second"]
    minift = rates.pop("minift", None)
    return minift / max(rates.values()) if minift and rates else None


def readme_lines(results: list[Result]) -> list[str]:
    """The table of GPU figures for the README, with the figures that were measured."""
    modes = list(dict.fromkeys(result["mode"] for result in results if result["table"] == "train"))
    rows = []
    for mode in modes:
        row: Result = {"mode": mode}
        for batch in (8, 64):
            row[str(batch)] = best(train_rows(results, mode, batch), "tokens_per_second")
            row[f"stack {batch}"] = best([result for result in results if result["table"] == "peer" and
                                          result["program"] != "minift" and result["rows"] == "equal" and
                                          (result["mode"], result["batch"]) == (mode, batch)], "tokens_per_second")
        fastest = max(train_rows(results, mode, 64), key=lambda result: result["tokens_per_second"], default={})
        row["peak"] = fastest.get("peak_memory_bytes")
        rows.append(row)
    if not rows:
        return ["nothing to change: no training step was measured"]
    machine = next((result["value"] for result in results if result.get("fact") == "machine"), "this machine")
    return [f"{machine}, rows of 170 tokens, medians (`python -m minift.bench gpu`):", "", table(rows, README_COLUMNS)]
