"""A prediction for each row of a file: eval.py --predict.

A window of rows is read at a time, so that a file may be larger than the memory. In a window, prompts of similar length
form a batch; predictions are written in the order of the rows. Windows, batches and seeds depend on the rows alone: so
after an interruption the file of predictions is continued as if there had been none.
"""

import random
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm import tqdm

from minift.data.chats import between
from minift.data.dataset import DataOptions
from minift.data.layouts import AnyLayout, Layout
from minift.data.pairs import Prompt
from minift.data.tokens import prompt_pieces, start_tokens
from minift.data.words import TextTokenizer, to_ids
from minift.errors import UserError
from minift.files.weights import Base
from minift.model.generate import generate
from minift.model.gpt import GPT
from minift.options import option
from minift.report.prediction_rows import NewRows, find_layout, open_input, open_output

WINDOW_BATCHES = 16  # more batches in a window: more similar lengths, but a longer wait for the first lines
WINDOW_CHARACTERS = 4 * 2**20  # of all fields of a window's rows: bounds the memory


@dataclass(frozen=True)
class PredictOptions:
    predict: str | None = option(None, "a file of rows that need no completions: write a prediction for each; - reads "
                                       "standard input")
    out: str | None = option(None, "the file of predictions: each row with all its fields, as JSON; an unfinished file "
                                   "is continued (default: standard output)")
    prediction_field: str = option("prediction", "the field of a row that holds its prediction")


@dataclass(frozen=True)
class Decoding:
    """How texts are generated, see minift/model/generate.py."""

    max_new_tokens: int = option(64, "length limit of generated texts; a run's own replaces the default", least=1)
    temperature: float = option(0.0, "0 is greedy, 1 the model's own distribution", least=0)
    top_k: int | None = option(None, "sample among the k most likely tokens", least=1)
    top_p: float | None = option(None, "sample among the most likely tokens that hold this probability", above=0,
                                 most=1)
    seed: int = option(0, "seed of sampling", least=0)


@dataclass(frozen=True)
class Predictor:
    """A tuned model and all settings that its predictions depend on, with counts for the report."""

    model: GPT
    base: Base
    data: DataOptions
    decoding: Decoding
    batch: int
    counts: dict[str, int] = field(default_factory=lambda: {"shortened": 0, "at_limit": 0})

    def prompt_room(self) -> int:
        """The most tokens of a prompt. Raises UserError if no token fits."""
        new, n_positions = self.decoding.max_new_tokens, self.model.config.n_positions
        room = n_positions - self.model.prompt_tokens - new
        if self.data.max_length is not None:
            # as in training, where at least one token of the completion and the end-of-text follow
            room = min(room, self.data.max_length - 2)
        if room <= len(start_tokens(self.base.tokenizer)):
            raise UserError(f"--max-new-tokens {new} leaves no room for a prompt in the model's {n_positions} "
                            "positions: lower it")
        return room

    def encode(self, prompts: list[Prompt], source: Path, room: int) -> list[list[int]]:
        """The tokens of prompts as in training. A prompt of more than `room` tokens loses its beginning."""
        tokenizer = self.base.tokenizer
        start = start_tokens(tokenizer)
        pieces = [[text for text, _ in prompt_pieces(prompt.text, prompt.learned)] for prompt in prompts]
        encoded = []
        rows = TextTokenizer(tokenizer, self.data.control_tokens).tokenize_rows(pieces)
        for prompt, row in zip(prompts, rows, strict=True):
            ids = to_ids(b"".join(row))
            if not ids:
                raise UserError(f"{source.with_name(prompt.where)}: the prompt has no tokens: mend or remove the row")
            dropped = max(0, len(start) + len(ids) - room)
            self.counts["shortened"] += dropped > 0
            encoded.append(start + ids[dropped:])
        return encoded

    def complete(self, prompts: list[Prompt], encoded: list[list[int]], number: int) -> list[str]:
        """The predictions of a batch. Its seed depends on `number`, that of its first row in the file."""
        seed = random.Random(f"{self.decoding.seed} {number}").getrandbits(62)
        settings = asdict(self.decoding) | {"seed": seed}
        new = generate(self.model, encoded, stop=self.base.eos_token_id, **settings)
        self.counts["at_limit"] += sum(len(ids) == self.decoding.max_new_tokens for ids in new)
        texts = []
        for prompt, ids in zip(prompts, new, strict=True):
            text = self.base.tokenizer.decode(ids)
            texts.append(without_join(prompt.text, text, self.data.separator))
        return texts


def without_join(prompt: str, text: str, join: str) -> str:
    """A generated text without the `join` that training puts between prompt and completion."""
    rest = text.removeprefix(join)
    # between() is "" where training puts no join: there, the text began with this white space itself
    was_joined = text.startswith(join) and between(prompt, rest, join)
    return rest if was_joined else text


def windows(rows: Iterable[Prompt], batch: int) -> Iterator[list[Prompt]]:
    """The rows in lists of at most WINDOW_BATCHES batches and about WINDOW_CHARACTERS characters."""
    window, characters = [], 0
    for prompt in rows:
        window.append(prompt)
        characters += len(prompt.text) + sum(len(str(value)) for value in prompt.fields.values())
        if len(window) == WINDOW_BATCHES * batch or characters >= WINDOW_CHARACTERS:
            yield window
            window, characters = [], 0
    if window:
        yield window


def batches(encoded: list[list[int]], batch: int) -> list[list[int]]:
    """The prompts of a window in batches of similar length, each as a list of indices in the window."""
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    cut = [order[begin : begin + batch] for begin in range(0, len(order), batch)]
    return sorted(cut, key=min)  # the batch with the earliest row comes first, so that rows can be written soon


def predict_rows(predictor: Predictor, rows: NewRows, room: int, done: int) -> Iterator[list[bytes]]:
    """The lines of all rows after the first `done`, in order; after each batch, the lines that can be written."""
    begin = 0  # the number of the window's first row
    for window in windows(rows, predictor.batch):
        next_row = max(done - begin, 0)  # the index in the window of the next row to write
        if next_row < len(window):
            encoded = predictor.encode(window, rows.path, room)
            texts: dict[int, str] = {}  # predictions that wait for an earlier row, by their index in the window
            for indices in batches(encoded, predictor.batch):
                if max(indices) < done - begin:
                    continue  # all of them were written before the interruption
                prompts = [window[i] for i in indices]
                predicted = predictor.complete(prompts, [encoded[i] for i in indices], begin + indices[0])
                texts.update(zip(indices, predicted, strict=True))
                lines = []
                while next_row in texts:
                    lines.append(rows.line(window[next_row], texts.pop(next_row)))
                    next_row += 1
                yield lines
        begin += len(window)


def predict(predictor: Predictor, options: PredictOptions, run_layout: AnyLayout | None) -> None:
    """eval.py --predict: write every row of a file with its prediction, to --out or to standard output.

    Raises UserError; if a row cannot be used, before the first prediction.
    """
    room = predictor.prompt_room()
    with open_input(options.predict) as path:
        layout = find_layout(path, predictor.data, run_layout)
        rows = NewRows(path, predictor.data, layout, options.prediction_field)
        total = rows.check()
        how = f"template {layout.template!r}" if isinstance(layout, Layout) else f"chats of field {layout.needed[0]}"
        how += "" if layout is run_layout else ", chosen by the fields of the rows"
        target = "standard output" if options.out in (None, "-") else options.out
        try:
            with open_output(options.out, rows) as (file, done):
                there = f"; {done:,} of them are in {target} already and stay" if done else ""
                print(f"{path.name}: {total:,} rows, {how}{there}", file=sys.stderr)
                bar = tqdm(total=total, initial=done, unit="row", file=sys.stderr, disable=not sys.stderr.isatty())
                with bar:
                    for lines in predict_rows(predictor, rows, room, done):
                        file.write(b"".join(lines))
                        file.flush()
                        bar.update(len(lines))
        except OSError as error:
            raise UserError(f"{target}: cannot be written: {error.strerror or error}") from None
        print(f"{target}: {total - done:,} predictions written", file=sys.stderr)
    shortened, at_limit = predictor.counts["shortened"], predictor.counts["at_limit"]
    if shortened:
        print(f"{shortened:,} prompts lost their beginning to make room for new tokens", file=sys.stderr)
    if at_limit:
        limit = predictor.decoding.max_new_tokens
        print(f"{at_limit:,} predictions were cut at the limit: --max-new-tokens is {limit}", file=sys.stderr)
