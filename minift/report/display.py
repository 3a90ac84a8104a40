"""The terminal during training: a bar and lines, and in a search the number of the run and the time left."""

import sys
import time
from pathlib import Path

from tqdm import tqdm

from minift import openmp
from minift.files.checkpoint import Progress
from minift.report.plot import LiveCurves
from minift.run.config import Config


class Display:
    """The runs of one command. `expected`: the number of trainings, trials and repetitions included; `is_estimate`:
    more may follow, as --lr auto decides during the search."""

    def __init__(self, expected: int, is_estimate: bool):
        self.expected, self.is_estimate = expected, is_estimate
        self.number = 0  # of the current training
        self.trained = 0  # trainings that this process has ended; an earlier one may have ended others
        self.said_crowded = False
        self.began = time.monotonic()

    def place(self) -> str:
        about = "about " if self.is_estimate else ""
        return f"run {self.number} of {about}{max(self.expected, self.number)}"

    def time_left(self, part: float = 0.0) -> str:
        """`part`: of the current training, in 0..1. From the mean time of all trainings so far, with their scores."""
        left = max(0, self.expected - self.number) + (1 - part if part else 0)
        if self.trained + part == 0 or left == 0:
            return ""
        seconds = (time.monotonic() - self.began) / (self.trained + part) * left
        return f", about {seconds / 60:.0f} min left" if seconds > 90 else f", about {seconds:.0f} s left"

    def skip(self, count: int) -> None:
        """Count trainings that an earlier process has ended."""
        self.number += count

    def expect(self, more: int) -> None:
        """Correct the number of trainings."""
        self.expected += more

    def report(self, config: Config, outcome: str) -> None:
        """The line of a trial or a repetition that has ended."""
        print(f"{self.place()}: {config.mode} {config.part}: {outcome}{self.time_left()}")


class TrainingView:
    """One training, used by its loop as a context. A trial or a repetition has a bar and no lines of its own."""

    def __init__(self, display: Display, config: Config, folder: Path, steps: int, progress: Progress):
        self.display, self.config, self.steps = display, config, steps
        self.will_train = progress.step < steps and not progress.early_stopped
        display.number += self.will_train
        self.curves = None if config.part else LiveCurves(folder)
        name = f"{display.place()}: {config.mode} {config.part}" if config.part else config.mode
        self.bar = tqdm(total=steps, initial=progress.step, desc=name, unit="step", file=sys.stdout,
                        leave=not config.part, disable=not sys.stdout.isatty())

    def __enter__(self) -> "TrainingView":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()
        self.display.trained += self.will_train

    def say(self, line: str) -> None:
        if not self.config.part:
            self.bar.write(line, file=sys.stdout)

    def step(self, progress: Progress, loss: float, lr: float) -> None:
        self.bar.update()
        if self.config.part:
            self.bar.set_postfix_str(f"loss={loss:.3f}{self.display.time_left(progress.step / self.steps)}")
        else:
            speed = progress.tokens / progress.seconds
            self.bar.set_postfix(loss=f"{loss:.3f}", lr=f"{lr:.1e}", tok_s=f"{speed:.0f}")

    def validation(self, progress: Progress, val_loss: float | None, lr: float = 0.0) -> None:
        self.say(status(self.config.mode, progress, self.steps, val_loss, lr))
        if openmp.crowded.is_set() and not self.display.said_crowded:
            self.bar.write("  other programs use cores of this machine: beside them training is slower, on two cores "
                           "half as fast", file=sys.stdout)
            self.display.said_crowded = True

    def draw(self) -> None:
        if self.curves:
            self.curves.draw()

    def end(self, progress: Progress) -> None:
        """After the loop."""
        mode = self.config.mode
        if progress.early_stopped:
            self.say(f"{mode}: stopped early, {self.config.train.patience} validations without a better loss")
        if self.curves:
            self.curves.draw(is_last=True)
        if progress.best_step == 0:
            self.say(f"{mode} did not beat its start: no validation after step 0 had a lower loss than "
                     f"{progress.best_val_loss:.4f}, and the parameters of step 0 are kept: try another --lr or more "
                     "--steps")


def status(mode: str, progress: Progress, steps: int, val_loss: float | None, lr: float) -> str:
    """The line printed after a validation."""
    line = f"{mode} step {progress.step}/{steps}"
    val = "" if val_loss is None else f"  val {val_loss:.4f}"
    if progress.step == 0:
        return f"{line}{val}  the start"
    best = "  best" if val and progress.best_step == progress.step else ""
    speed = progress.tokens / progress.seconds
    return f"{line}  train {progress.train_loss:.4f}{val}  lr {lr:.1e}  {speed:,.0f} tokens/s{best}"
