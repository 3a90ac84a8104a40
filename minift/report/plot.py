"""Pictures of runs.

matplotlib is optional, so it is imported where it is needed. Without it `draw_runs` and `draw_curves` raise
ModuleNotFoundError.
"""

import io
import math
import time
from pathlib import Path
from typing import Any

from minift.distributed import is_main
from minift.files.atomic import write_atomically
from minift.run.folder import read_metrics

FIRST_PICTURE = 30.0  # seconds from a run's begin to its first curves.png, if it lasts longer
MARKERS = "os^Dvp*X<>"  # ten colours, then another marker: a hundred runs look different


def draw_runs(folder: Path, results: list[dict[str, Any]]) -> None:
    """Write compare.png: losses during training, quality against trained parameters, forgetting against quality.

    Quality is ROUGE-L, or the test loss if a run has no ROUGE-L. result["run"] is the path of a run in `folder`.
    """
    from matplotlib.figure import Figure  # not pyplot: no window, no global state
    has_rouge = all(result["rougeL"] is not None for result in results)
    quality, base_quality = ("rougeL", "base_rougeL") if has_rouge else ("test_loss", "base_test_loss")
    quality_label = "ROUGE-L on the test rows" if has_rouge else "test loss, nats per target token"

    legend_rows = math.ceil(len(results) / 4)
    figure = Figure(figsize=(15, 4.8 + 0.25 * legend_rows), layout="constrained")
    losses, cost, forgetting = figure.subplots(1, 3)
    for i, result in enumerate(results):
        style = {"color": f"C{i % 10}", "marker": MARKERS[i // 10 % len(MARKERS)]}
        draw_losses(losses, read_metrics(folder / result["run"]), result["run"], style)
        point = style | {"markersize": 9, "linestyle": ""}
        if result[quality] is None:
            continue  # without test rows nothing is known but the losses
        cost.plot(result["trainable_parameters"], result[quality], **point)
        if result["forgetting"] is not None:
            forgetting.plot(result[quality], result["forgetting"], **point)
    for base in {result[base_quality] for result in results} - {None}:
        cost.axhline(base, color="grey", linestyle="--", linewidth=1)
        forgetting.axvline(base, color="grey", linestyle="--", linewidth=1)
    forgetting.axhline(0, color="grey", linewidth=1)

    losses.set(title="loss: validation solid, training dotted", xlabel="optimizer step")
    cost.set(title="quality against cost (dashed: the base)", xlabel="trained parameters", xscale="log",
             ylabel=quality_label)
    forgetting.set(title="forgetting against quality", xlabel=quality_label,
                   ylabel="loss on general text, after - before, nats per token")
    for axes in (losses, cost, forgetting):
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=min(4, len(results)))
    save(figure, folder / "compare.png")


def series(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a name in the lines of metrics.jsonl that have it."""
    # some lines are of steps, others of validations; a validation before the first step has no training loss
    found = [line for line in lines if line.get(name) is not None]
    return [line["step"] for line in found], [line[name] for line in found]


def draw_losses(axes: Any, lines: list[dict[str, Any]], label: str, style: dict[str, Any]) -> None:
    """The validation loss and the mean training loss between validations, from the lines of metrics.jsonl."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter
    steps, val_losses = series(lines, "val_loss")
    axes.plot(steps, val_losses, label=label, markersize=4, **style)
    steps, train_losses = series(lines, "train_loss")
    axes.plot(steps, train_losses, color=style["color"], linestyle=":")
    axes.set(yscale="log", ylabel="nats per target token")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))


def draw_curves(folder: Path) -> None:
    """Write curves.png of one run from its metrics.jsonl: losses, with the best step marked, and the learning rate."""
    from matplotlib.figure import Figure
    lines = read_metrics(folder)
    figure = Figure(figsize=(8, 6), layout="constrained")
    losses, rate = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    losses.plot(*series(lines, "loss"), color="C0", alpha=0.3, linewidth=1, label="training, each step")
    draw_losses(losses, lines, "validation", {"color": "C1", "marker": "o"})
    steps, val_losses = series(lines, "val_loss")
    if val_losses:
        best_loss, best_step = min(zip(val_losses, steps, strict=True))
        losses.axvline(best_step, color="grey", linestyle="--", linewidth=1,
                       label=f"best: {best_loss:.4f} at step {best_step}")
    rate.plot(*series(lines, "lr"), color="C2")
    losses.set(title="loss (dotted: training, mean between validations)")
    losses.legend()
    rate.set(xlabel="optimizer step", ylabel="learning rate")
    for axes in (losses, rate):
        axes.grid(alpha=0.3)
    save(figure, folder / "curves.png")


class LiveCurves:
    """curves.png during a run, drawn by rank 0 after validations; without matplotlib it does nothing."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.can_draw = is_main()
        self.next_time = time.monotonic() + FIRST_PICTURE

    def draw(self, is_last: bool = False) -> None:
        started = time.monotonic()
        if not self.can_draw or not is_last and started < self.next_time:
            return
        try:
            draw_curves(self.folder)
        except ImportError:
            self.can_draw = False
        now = time.monotonic()
        # A picture takes as long as many steps of a small model: so drawing takes a twentieth of a run's time at most.
        self.next_time = now + 19 * (now - started)


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG. Raises UserError."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    write_atomically(path, [png.getvalue()])
