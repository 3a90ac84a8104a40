"""Pictures of runs.

matplotlib is optional, so it is imported where it is needed. Without it the functions that draw raise
ModuleNotFoundError.
"""

import io
import math
import time
from pathlib import Path
from typing import Any

from minift.distributed import is_main
from minift.files.atomic import write_atomically
from minift.report.runs import Run
from minift.report.sizes import by_mode, quality_of, short_count
from minift.run.folder import read_metrics

FIRST_PICTURE = 30.0  # seconds from a run's begin to its first curves.png, if it lasts longer
MARKERS = "os^Dvp*X<>"  # ten colours, then another marker: a hundred runs look different


def draw_runs(path: Path, folder: Path, runs: list[Run]) -> None:
    """Write a picture of runs, whose folders are `folder`/NAME: losses during training, quality against trained
    parameters, forgetting against quality and, after a search, its trials. Bars are 95 % intervals; of forgetting, the
    standard deviation over seeds."""
    from matplotlib.figure import Figure  # not pyplot: no window, no global state
    measure, quality_label = quality_of(runs)
    has_trials = any(run.trials for run in runs)
    rows, columns = (2, 2) if has_trials else (1, 3)
    legend_rows = math.ceil(len(runs) / 4)
    figure = Figure(figsize=(5.2 * columns, 4.6 * rows + 0.25 * legend_rows), layout="constrained")
    losses, cost, forgetting, *trials = figure.subplots(rows, columns).flat
    for i, run in enumerate(runs):
        style = {"color": f"C{i % 10}", "marker": MARKERS[i // 10 % len(MARKERS)]}
        draw_losses(losses, read_metrics(folder / run.name), run.name, style)
        draw_scores(cost, forgetting, run, measure, style | {"markersize": 5, "linestyle": "", "capsize": 4})
        for axes in trials:
            draw_trials(axes, run, style)
    for base in {run.result[f"base_{measure}"] for run in runs} - {None}:
        cost.axhline(base, color="grey", linestyle="--", linewidth=1)
        forgetting.axvline(base, color="grey", linestyle="--", linewidth=1)
    forgetting.axhline(0, color="grey", linewidth=1)

    losses.set(title="loss: validation solid, training dotted", xlabel="optimizer step")
    cost.set(title="quality against cost (dashed: the base; bars: 95 %)", xlabel="trained parameters", xscale="log",
             ylabel=quality_label)
    forgetting.set(title="forgetting against quality (bars: std, 95 %)", xlabel=quality_label,
                   ylabel="loss on general text, after - before, nats per token")
    for axes in trials:
        axes.set(title="trials (ring: chosen, cross: stopped early)", xlabel="learning rate", xscale="log",
                 ylabel="lowest validation loss, nats per target token")
        log_losses(axes)
    for axes in (losses, cost, forgetting, *trials):
        axes.grid(alpha=0.3)
    figure.legend(*losses.get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(runs)))
    save(figure, path)


def draw_scores(cost: Any, forgetting: Any, run: Run, measure: str, style: dict[str, Any]) -> None:
    """A run's point in two of the pictures; none without test rows, where nothing is known but the losses."""
    value, interval = run.result[measure], run.result.get(f"{measure}_interval")
    if value is None:
        return
    bar = bars([value], [interval])
    cost.errorbar(run.result["trainable_parameters"], value, yerr=bar, **style)
    if run.result["forgetting"] is not None:
        forgetting.errorbar(value, run.result["forgetting"], xerr=bar, yerr=run.result.get("forgetting_std"), **style)


def bars(values: list[float], intervals: list[list[float] | None]) -> list[list[float]]:
    """The lengths of error bars below and above values; 0 where there is no interval."""
    ends = [interval or [value, value] for value, interval in zip(values, intervals, strict=True)]
    return [[max(0.0, value - low) for value, (low, _) in zip(values, ends, strict=True)],
            [max(0.0, high - value) for value, (_, high) in zip(values, ends, strict=True)]]


def draw_trials(axes: Any, run: Run, style: dict[str, Any]) -> None:
    """The validation loss of each trial over its learning rate: a line for each setting of the other options."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for trial in run.trials:
        options, loss = dict(trial["options"]), trial["val_loss"]
        rate = options.pop("lr", run.result["learning_rate"])
        if loss is None:
            continue  # it failed
        lines.setdefault(str(options), []).append((rate, loss))
        if trial["chosen"]:
            axes.plot(rate, loss, marker="o", markersize=14, markerfacecolor="none", color=style["color"])
        if "stopped" in trial:
            axes.plot(rate, loss, marker="x", markersize=10, color=style["color"])
    for points in lines.values():
        axes.plot(*zip(*sorted(points), strict=True), **style)


def draw_sizes(path: Path, runs: list[Run]) -> None:
    """Write a picture of quality against the size of the base, with a line for each mode (Lester et al. 2021,
    figure 1)."""
    from matplotlib.figure import Figure
    measure, quality_label = quality_of(runs)
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    base = {run.result["total_parameters"]: run.result[f"base_{measure}"] for of_size in by_mode(runs).values()
            for run in of_size.values()}
    axes.plot(*zip(*sorted(base.items()), strict=True), color="grey", linestyle="--", marker=".", label="base")
    for i, (mode, of_size) in enumerate(by_mode(runs).items()):
        values = [of_size[size].result[measure] for size in sorted(of_size)]
        intervals = [of_size[size].result.get(f"{measure}_interval") for size in sorted(of_size)]
        axes.errorbar(sorted(of_size), values, yerr=bars(values, intervals), label=mode, color=f"C{i % 10}",
                      marker=MARKERS[i // 10 % len(MARKERS)], markersize=4, capsize=4)
    axes.set(title="quality against the size of the base (bars: 95 % intervals)", xlabel="parameters of the base",
             xscale="log", ylabel=quality_label)
    axes.set_xticks(sorted(base), [short_count(size) for size in sorted(base)])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)


def series(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a name in the lines of metrics.jsonl that have it."""
    # some lines are of steps, others of validations; a validation before the first step has no training loss
    found = [line for line in lines if line.get(name) is not None]
    return [line["step"] for line in found], [line[name] for line in found]


def draw_losses(axes: Any, lines: list[dict[str, Any]], label: str, style: dict[str, Any]) -> None:
    """The validation loss and the mean training loss between validations, from the lines of metrics.jsonl."""
    from matplotlib.ticker import MaxNLocator
    steps, val_losses = series(lines, "val_loss")
    axes.plot(steps, val_losses, label=label, markersize=4, **style)
    steps, train_losses = series(lines, "train_loss")
    axes.plot(steps, train_losses, color=style["color"], linestyle=":")
    axes.set(ylabel="nats per target token")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    log_losses(axes)


def log_losses(axes: Any) -> None:
    """Losses on a logarithmic scale, as decimal numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))  # labels of more ticks would overlap
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


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
