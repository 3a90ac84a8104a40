"""A prediction for each row of a file: eval.py --predict.

Rows are read as a stream, in windows. Within a window, prompts of similar length form a batch; predictions are
written in the order of the rows. Windows, batches and seeds follow from the rows alone, so that a file which is
continued after an interruption is the same as one that was written without.
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
from minift.data.tokens import prompt_pieces, start_tokens, tokenize_rows
from minift.errors import UserError
from minift.files.weights import Base
from minift.model.generate import generate
from minift.model.gpt import GPT
from minift.options import option
from minift.report.prediction_rows import NewRows, find_layout, open_input, open_output

WINDOW_BATCHES = 16
WINDOW_CHARACTERS = 4 * 2**20  # of the rows in a window, all fields: bounds the memory


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
    """A tuned model with all that decides on its predictions, and counts for the report."""

    model: GPT
    base: Base
    data: DataOptions
    decoding: Decoding
    batch: int
    counts: dict[str, int] = field(default_factory=lambda: {"shortened": 0, "at_limit": 0})

    def prompt_room(self) -> int:
        """The most tokens of a prompt. Raises UserError if there is no room for one."""
        new, n_positions = self.decoding.max_new_tokens, self.model.config.n_positions
        room = n_positions - self.model.prompt_tokens - new
        if self.data.max_length is not None:
            room = min(room, self.data.max_length - 2)  # as in training: before a token of completion and end-of-text
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
        for prompt, row in zip(prompts, tokenize_rows(tokenizer, pieces, self.data.control_tokens), strict=True):
            ids = [i for piece in row for i in piece]
            if not ids:
                raise UserError(f"{source.with_name(prompt.where)}: the prompt has no tokens: mend or remove the row")
            dropped = max(0, len(start) + len(ids) - room)
            self.counts["shortened"] += dropped > 0
            encoded.append(start + ids[dropped:])
        return encoded

    def complete(self, prompts: list[Prompt], encoded: list[list[int]], number: int) -> list[str]:
        """The predictions of a batch; `number`, that of its first row in the file, decides on its seed."""
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
    """A generated text without --join, which training puts before completions that do not begin with white space."""
    rest = text.removeprefix(join)
    return rest if between(prompt, rest, join) and text.startswith(join) else text


def windows(rows: Iterable[Prompt], batch: int) -> Iterator[list[Prompt]]:
    """The rows in lists that are small enough for the memory."""
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
    """The places in a window of the prompts that are completed together: those of similar length. The batch with
    the earliest row comes first, so that rows can be written soon."""
    order = sorted(range(len(encoded)), key=lambda place: len(encoded[place]))
    cut = [order[begin : begin + batch] for begin in range(0, len(order), batch)]
    return sorted(cut, key=min)


def predict_rows(predictor: Predictor, rows: NewRows, room: int, done: int) -> Iterator[list[bytes]]:
    """The lines of all rows after the first `done`, in order: after each batch those that are complete."""
    begin = 0  # the number of the window's first row
    for window in windows(rows, predictor.batch):
        following = max(done - begin, 0)  # the place of the next row to write
        if following < len(window):
            encoded = predictor.encode(window, rows.path, room)
            texts: dict[int, str] = {}
            for places in batches(encoded, predictor.batch):
                if max(places) < done - begin:
                    continue  # all written before the interruption
                prompts = [window[place] for place in places]
                predicted = predictor.complete(prompts, [encoded[place] for place in places], begin + places[0])
                texts.update(zip(places, predicted, strict=True))
                lines = []
                while following in texts:
                    lines.append(rows.line(window[following], texts.pop(following)))
                    following += 1
                yield lines
        begin += len(window)


def predict(predictor: Predictor, options: PredictOptions, run_layout: AnyLayout | None) -> None:
    """--predict: every row of a file with its prediction, to --out or to standard output. Raises UserError, before
    the first prediction if a row cannot be used."""
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
