"""The result.json of a finished run, and the lines that train.py prints of it."""

import math
from pathlib import Path
from typing import Any

from minift.data.tokens import Example
from minift.distributed import broadcast
from minift.files.checkpoint import Progress
from minift.report.metrics import limit_report
from minift.report.table import cell, format_bytes
from minift.run.folder import read_metrics


def progress_facts(progress: Progress, folder: Path) -> dict[str, Any]:
    """Steps, losses, speed and memory of a training, by the names of result.json."""
    was_validated = math.isfinite(progress.best_val_loss)  # infinity without validation rows
    return {
        "steps": progress.step,
        "best_step": progress.best_step,
        "stopped_early": progress.early_stopped,
        "train_loss": progress.train_loss,
        "best_val_loss": progress.best_val_loss if was_validated else None,
        "tokens_per_second": progress.tokens / progress.seconds,
        "steady_tokens_per_second": steady_speed(broadcast(lambda: read_metrics(folder))),
        "peak_memory_bytes": progress.peak_memory_bytes or None,
    }


def steady_speed(lines: list[dict[str, Any]]) -> float | None:
    """Tokens per second of a training without its first five steps, or its first half if it has fewer than ten: these
    fill caches. From the lines of metrics.jsonl; None if an earlier version wrote them, without times."""
    steps = [line for line in lines if "seconds" in line]
    steady = steps[min(5, len(steps) // 2) :]
    if not steady:
        return None
    return sum(line["tokens"] for line in steady) / sum(line["seconds"] for line in steady)


def make_result(facts: dict[str, Any], scores: dict[str, Any], base_scores: dict[str, Any]) -> dict[str, Any]:
    """The content of result.json: facts of the run, its test scores, and some scores of its base."""
    result = dict(facts)
    for name in ("loss", "perplexity"):
        result[f"test_{name}"] = scores[name]
    for name in ("token_accuracy", "exact_match", "rouge1", "rouge2", "rougeL"):
        result[name] = scores[name]
    result |= {"base_test_loss": base_scores["loss"], "base_rougeL": base_scores["rougeL"], "forgetting": None}
    result |= {"unsupported": scores["unsupported"], "base_unsupported": base_scores["unsupported"]}
    if scores["general_loss"] is not None:
        result["forgetting"] = scores["general_loss"] - base_scores["general_loss"]
    for name in ("completions_at_limit", "prompts_shortened", "references_over_limit"):
        result[name] = scores[name]
    return result


def summary(result: dict[str, Any], scores: dict[str, Any], base_scores: dict[str, Any], examples: list[Example],
            max_new_tokens: int) -> str:
    """A few completions of base and tuned model, then the scores in one line."""
    lines = []
    for i, example in enumerate(examples[:3]):
        lines += ["", f"  {example.pair.where}   {example.pair.completion!r}",
                  f"  base   {base_scores['completions'][i]!r}", f"  tuned  {scores['completions'][i]!r}"]
    lines += ["", f"{result['mode']}: {scores_line(result)}"]
    lines += [f"  {line}" for line in limit_report(scores, max_new_tokens)]
    return "\n".join(lines)


def scores_line(result: dict[str, Any]) -> str:
    """The scores and the cost of a run."""
    parts = []
    if result["test_loss"] is not None:
        parts.append(f"test loss {result['base_test_loss']:.4f} -> {result['test_loss']:.4f}")
    if result["rougeL"] is not None:
        parts.append(f"ROUGE-L {result['base_rougeL']:.3f} -> {result['rougeL']:.3f}")
    if result["unsupported"] is not None:
        before = cell(result["base_unsupported"], "{:.1%}".format)  # a base may write no names
        parts.append(f"unsupported {before} -> {result['unsupported']:.1%}")
    if result["forgetting"] is not None:
        parts.append(f"forgetting {result['forgetting']:+.4f}")
    if result["steady_tokens_per_second"] is not None:
        parts.append(f"{result['tokens_per_second']:,.0f} tokens/s (steady {result['steady_tokens_per_second']:,.0f})")
    parts += [f"tuned file {format_bytes(result['tuned_bytes'])}",
              f"peak memory {cell(result['peak_memory_bytes'], format_bytes)}",
              f"predicted {cell(result['predicted_peak_bytes'], format_bytes)}"]
    return ", ".join(parts)
