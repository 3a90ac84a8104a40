"""Runs in one picture: compare.png, if matplotlib is there."""

import math
from pathlib import Path
from typing import Any

from minift.run.folder import read_metrics

MARKERS = "os^Dvp*X<>"


def draw(folder: Path, results: list[dict[str, Any]]) -> None:
    """compare.png with three panels: the loss as training went, quality against trained parameters,
    forgetting against quality. Each result holds its run's path in `folder` under `run`. Raises
    ModuleNotFoundError without matplotlib."""
    from matplotlib.figure import Figure  # not pyplot: no window, no global state
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter
    legend_rows = math.ceil(len(results) / 4)
    figure = Figure(figsize=(15, 4.8 + 0.25 * legend_rows), layout="constrained")
    curves, cost, memory = figure.subplots(1, 3)
    for i, result in enumerate(results):
        look = {"color": f"C{i % 10}", "marker": MARKERS[i // 10 % len(MARKERS)]}
        lines = [line for line in read_metrics(folder / result["run"]) if "val_loss" in line]
        steps = [line["step"] for line in lines]
        curves.plot(steps, [line["val_loss"] for line in lines], label=result["run"], markersize=4, **look)
        curves.plot(steps, [line["train_loss"] for line in lines], color=look["color"], linestyle=":")
        cost.plot(result["trainable_parameters"], result["rougeL"], markersize=9, linestyle="", **look)
        if result["forgetting"] is not None:
            memory.plot(result["rougeL"], result["forgetting"], markersize=9, linestyle="", **look)
    for base in {result["base_rougeL"] for result in results}:
        cost.axhline(base, color="grey", linestyle="--", linewidth=1)
        memory.axvline(base, color="grey", linestyle="--", linewidth=1)
    memory.axhline(0, color="grey", linewidth=1)
    curves.set(title="loss: validation solid, training dotted", xlabel="optimizer step",
               ylabel="nats a target token", yscale="log")
    curves.xaxis.set_major_locator(MaxNLocator(integer=True))
    curves.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    curves.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
    cost.set(title="quality against cost (dashed: the base)", xlabel="parameters that train", xscale="log",
             ylabel="ROUGE-L on the test rows")
    memory.set(title="forgetting against quality", xlabel="ROUGE-L on the test rows",
               ylabel="loss on general text, after - before, nats a token")
    for axes in (curves, cost, memory):
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=min(4, len(results)))
    figure.savefig(folder / "compare.png", dpi=120)
