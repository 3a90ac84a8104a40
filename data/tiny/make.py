"""Make data/tiny from a seed: the general text, the pairs, the tokenizer and, with --train, the base
itself.

    python data/tiny/make.py            text, pairs and tokenizer, bit-identical on every machine (seconds)
    python data/tiny/make.py --train    and the base: a GPT-2 trained on the general text alone (minutes)
    python data/tiny/make.py --check    train the first steps again, compare the loss with training.json
    python data/tiny/make.py --train --shape 96 4 3 --out small    a smaller base on the same text, in another folder

The general training text goes to build/, which git ignores; the held-out text, the pairs, the tokenizer and
the base stay beside this script. Documents are joined by <|endoftext|> with nothing around it. world.py
holds the words and the chats, stories.py the other documents.
"""

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]

from stories import document  # noqa: E402
from world import NAMES, UNSEEN_NAMES, negotiated  # noqa: E402

from minift.device import fast_bf16  # noqa: E402
from minift.files import safetensors  # noqa: E402
from minift.files.weights import CONV1D  # noqa: E402
from minift.model.gpt import GPT, GPTConfig  # noqa: E402
from minift.model.packing import text_row  # noqa: E402
from minift.report.metrics import measure_losses  # noqa: E402

SEED = 1
END = "<|endoftext|>"
TRAIN_CHARS, HELD_OUT_CHARS = 8_000_000, 150_000
PAIRS = {"train": (2200, NAMES), "val": (200, NAMES), "test": (200, UNSEEN_NAMES)}  # rows, names
MAX_CHARS = 460  # of a dialogue: some 130 tokens
VOCAB_SIZE, CONTEXT = 2048, 256
SHAPE = {"n_embd": 192, "n_layer": 4, "n_head": 6}  # of the base; --shape gives another
BATCH, STEPS, WARMUP, COOLDOWN = 8, 6000, 50, 2400
LR, MUON_LR, WEIGHT_DECAY = 3e-3, 6e-3, 0.1
LOG_EVERY, CHECK_STEPS, TOLERANCE = 50, 300, 0.02  # in nats a token, means of LOG_EVERY steps


def general_text(split: str, chars: int) -> str:
    """Documents of a split until they hold `chars` characters; each has a seed of its own."""
    names, documents, size = sorted(NAMES + UNSEEN_NAMES), [], 0
    while size < chars:
        documents.append(document(Random(f"{SEED} {split} {len(documents)}"), names))
        size += len(documents[-1]) + len(END)
    return END.join(documents)


def make_pairs(split: str, rows: int, names: list[str], taken: set[str]) -> str:
    """JSON lines of chats of 4 to 10 turns and what was agreed; no chat is in `taken`, which grows."""
    lines, tried = [], 0
    while len(lines) < rows:
        chat, plan = negotiated(Random(f"{SEED} pairs {split} {tried}"), names)
        tried += 1
        dialogue = chat.text()
        if 4 <= len(chat.turns) <= 10 and len(dialogue) <= MAX_CHARS and dialogue not in taken:
            taken.add(dialogue)
            lines.append(json.dumps({"dialogue": dialogue, "summary": plan.summary()}) + "\n")
    return "".join(lines)


def train_tokenizer(text: str) -> Tokenizer:
    """A byte-level BPE, as GPT-2's; decode(encode(x)) == x for any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=[END], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(text.split(END), trainer)
    return tokenizer


def write_text(path: Path, text: str) -> str:
    """Write as UTF-8 with plain line feeds; gives the SHA-256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode("utf-8")
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def make_text(out: Path) -> tuple[str, str, Tokenizer]:
    """Write texts, pairs, tokenizer and hashes.json below `out`; gives training text, held-out text and
    tokenizer."""
    training, held_out = general_text("train", TRAIN_CHARS), general_text("held-out", HELD_OUT_CHARS)
    hashes = {"build/general_train.txt": write_text(out / "build/general_train.txt", training),
              "general.txt": write_text(out / "general.txt", held_out)}
    taken: set[str] = set()
    for split, (rows, names) in PAIRS.items():
        file = f"pairs/{split}.jsonl"
        hashes[file] = write_text(out / file, make_pairs(split, rows, names, taken))
    tokenizer = train_tokenizer(training)
    hashes["tokenizer.json"] = write_text(out / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")
    write_text(out / "hashes.json", json.dumps(hashes, indent=2) + "\n")
    return training, held_out, tokenizer


def lr_factor(step: int) -> float:
    """The share of the peak learning rate at a step: warm-up, then constant, then linearly down to 0."""
    return min((step + 1) / WARMUP, 1.0, (STEPS - step) / COOLDOWN)


def sinusoids(positions: int, width: int) -> torch.Tensor:
    """(positions, width): sines and cosines of the position (Vaswani et al. 2017, section 3.5)."""
    angles = torch.outer(torch.arange(positions), 1000.0 ** (-torch.arange(width // 2) / (width // 2)))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def new_model(shape: dict[str, int]) -> GPT:
    """GPT-2's initial values but for the embeddings. In so short a training, attention to the token before,
    on which copying rests, is learned in time only if neighbouring positions look alike from the start."""
    model = GPT(GPTConfig(vocab_size=VOCAB_SIZE, n_positions=CONTEXT, eos_token_id=0, **shape))
    model.init_weights(SEED)
    with torch.no_grad():
        model.wte.weight.mul_(5)
        model.wpe.weight.copy_(0.05 * sinusoids(CONTEXT, shape["n_embd"]))
    model.set_compute_dtype(torch.bfloat16 if fast_bf16(torch.device("cpu")) else torch.float32)
    return model


def make_optimizers(model: GPT) -> list[torch.optim.Optimizer]:
    """Muon (Jordan 2024) for the matrices of the blocks, AdamW for the rest; positions learn slowly."""
    matrices = [p for p in model.h.parameters() if p.dim() == 2]
    bare = [model.wte.weight, *(p for p in model.parameters() if p.dim() == 1)]
    groups = [{"params": bare}, {"params": [model.wpe.weight], "lr": LR / 10}]
    return [torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.98), weight_decay=0.0, fused=True)]


def train(model: GPT, ids: list[int], steps: int) -> list[float]:
    """The first `steps` of the STEPS-step schedule on a stream of tokens; gives the mean loss of
    every LOG_EVERY steps. Windows of CONTEXT tokens are drawn without replacement, at another offset in each
    epoch."""
    optimizers = make_optimizers(model)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor) for optimizer in optimizers]
    generator, order, losses, curve = torch.Generator().manual_seed(SEED), [], [], []
    started = time.perf_counter()
    for step in range(steps):
        if len(order) < BATCH:
            offset = int(torch.randint(CONTEXT, (), generator=generator))
            windows = (len(ids) - 1 - offset) // CONTEXT
            order = [offset + CONTEXT * i for i in torch.randperm(windows, generator=generator).tolist()]
        starts = [order.pop() for _ in range(BATCH)]
        batch = model.pack([text_row(ids[start : start + CONTEXT + 1]) for start in starts])
        loss = model.loss(batch) / (BATCH * CONTEXT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        losses.append(loss.item())
        if len(losses) == LOG_EVERY:
            curve.append(round(sum(losses) / LOG_EVERY, 4))
            losses = []
            seconds = time.perf_counter() - started
            print(f"step {step + 1:5d}  loss {curve[-1]:.4f}  {seconds:.0f} s", flush=True)
    return curve


def held_out_loss(model: GPT, ids: list[int]) -> float:
    """Nats a token, in windows of half the context."""
    window = CONTEXT // 2
    rows = [text_row(ids[start : start + window + 1]) for start in range(0, len(ids) - 1, window)]
    return measure_losses(model, rows, batch=32)["loss"]


@torch.no_grad()
def save(model: GPT, shape: dict[str, int], out: Path) -> None:
    """The base as a Hugging Face folder in fp16."""
    state = {name: p.T if CONV1D.fullmatch(name) else p for name, p in model.named_parameters()}
    tensors = {f"transformer.{name}": tensor.half().contiguous() for name, tensor in state.items()}
    safetensors.write(out / "model.safetensors", tensors, {"format": "pt"})
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": VOCAB_SIZE,
              "n_positions": CONTEXT, **shape, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
              "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0,
              "tie_word_embeddings": True, "dtype": "float16"}
    write_text(out / "config.json", json.dumps(config, indent=2) + "\n")


def train_base(out: Path, shape: dict[str, int], training: str, held_out: str, tokenizer: Tokenizer) -> None:
    """Train the base, save it, and record how it went in training.json."""
    started, model = time.perf_counter(), new_model(shape)
    ids = tokenizer.encode(training).ids
    curve = train(model, ids, STEPS)
    seconds = time.perf_counter() - started
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())  # the loss is that of the file
    model.set_compute_dtype(torch.float32)
    record = {
        "held_out_loss": round(held_out_loss(model, tokenizer.encode(held_out).ids), 4),
        "seconds": round(seconds), "threads": torch.get_num_threads(), "bf16": fast_bf16(torch.device("cpu")),
        "parameters": sum(p.numel() for p in model.parameters()), "training_tokens": len(ids),
        "settings": {"seed": SEED, "vocab_size": VOCAB_SIZE, "context": CONTEXT, **shape, "batch": BATCH,
                     "steps": STEPS, "warmup": WARMUP, "cooldown": COOLDOWN, "lr": LR, "muon_lr": MUON_LR,
                     "weight_decay": WEIGHT_DECAY},
        "log_every": LOG_EVERY, "loss": curve,
    }
    save(model, shape, out)
    write_text(out / "training.json", json.dumps(record) + "\n")
    print(f"held-out loss {record['held_out_loss']} nats a token, {seconds:.0f} s")


def check(training: str, tokenizer: Tokenizer) -> bool:
    """Train the first CHECK_STEPS again; whether their loss is the recorded one within TOLERANCE."""
    recorded = json.loads((HERE / "training.json").read_text(encoding="utf-8"))["loss"]
    curve = train(new_model(SHAPE), tokenizer.encode(training).ids, CHECK_STEPS)
    worst = max(abs(now - then) for now, then in zip(curve, recorded, strict=False))
    same = worst <= TOLERANCE
    print(f"{CHECK_STEPS} steps: the loss {'matches' if same else 'does not match'} training.json: "
          f"largest difference {worst:.4f} nats a token, tolerance {TOLERANCE}")
    return same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to (default: this script's)")
    parser.add_argument("--train", action="store_true", help="also train the base")
    parser.add_argument("--check", action="store_true", help="train its first steps and compare")
    parser.add_argument("--shape", type=int, nargs=3, metavar=tuple(SHAPE),
                        help="of the base that --train makes (default: that of the base here)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    arguments = parser.parse_args()
    if arguments.shape and (not arguments.train or arguments.check or arguments.out.resolve() == HERE):
        parser.error("--shape needs --train and another folder for --out, and does not go with --check")
    shape = dict(zip(SHAPE, arguments.shape or SHAPE.values(), strict=True))
    torch.set_num_threads(arguments.threads)
    training, held_out, tokenizer = make_text(arguments.out)
    if arguments.check and not check(training, tokenizer):
        sys.exit(1)
    if arguments.train:
        train_base(arguments.out, shape, training, held_out, tokenizer)


if __name__ == "__main__":
    main()
