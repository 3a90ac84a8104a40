"""The settings of `python -m minift.bench gpu` that reach the process of each stage."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minift.device import choose_dtype

Result = dict[str, Any]


@dataclass(frozen=True)
class Context:
    """The half hour's settings, and the results of the stages before this one."""

    dry: bool
    folder: Path  # of the report
    results: tuple[Result, ...] = ()

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.dry else choose_dtype("auto", self.device)

    @property
    def facts(self) -> Result:
        """The results of the stage "machine", by name."""
        return {result["fact"]: result["number"] for result in self.results if result["table"] == "machine"}
