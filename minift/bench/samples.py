"""A base with random weights and rows of realistic lengths, for benchmarks that run the real scripts."""

import json
import random
from pathlib import Path

import torch

from minift.bench.models import random_model
from minift.files import weights
from minift.files.atomic import read_json_lines
from minift.files.weights import Base
from minift.run.config import TINY

SPREAD = 0.6  # of the logarithm of a prompt's length; SAMSum's is 0.7 with GPT-2's tokens


def write_base(folder: Path, size: str) -> None:
    """A Hugging Face folder with the shape of a preset, random weights, and the embedded base's tokenizer."""
    tiny = weights.load(str(TINY))
    model = random_model(size, torch.float32, torch.device("cpu"))
    base = Base(size, None, model, tiny.tokenizer, None, tiny.eos_token_id)
    weights.save_folder(base, model, folder)


def embedded_pairs() -> list[dict[str, str]]:
    """The embedded training rows, with `dialogue` and `summary`."""
    return read_json_lines(TINY / "pairs" / "train.jsonl")


def write_rows(path: Path, count: int, mean_tokens: int, seed: int = 0) -> None:
    """A file of prompts and completions: embedded dialogues, one after another until a prompt has its length. Lengths
    are log-normal; a mean of 145 tokens and a median completion of 20 are like SAMSum with GPT-2's tokenizer."""
    rng = random.Random(seed)
    tokenizer = weights.load_on_meta(str(TINY)).tokenizer
    pairs = embedded_pairs()
    lines = [line for pair in pairs for line in pair["dialogue"].split("\n")]
    lengths = [len(encoding.ids) + 1 for encoding in tokenizer.encode_batch(lines)]  # 1: the line end
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            # log-normal with this mean: the mean of its factor is 1
            wanted = mean_tokens * rng.lognormvariate(-SPREAD**2 / 2, SPREAD)
            start, tokens, prompt = rng.randrange(len(lines)), 0, []
            while not prompt or tokens < wanted:
                number = (start + len(prompt)) % len(lines)
                prompt.append(lines[number])
                tokens += lengths[number]
            row = {"prompt": "\n".join(prompt), "completion": rng.choice(pairs)["summary"]}
            file.write(json.dumps(row) + "\n")
