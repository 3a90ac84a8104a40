"""Fixtures that several test files share: tiny random models, their folders, and a tokenizer."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import one_thread as one_thread_without_plan
from tokenizers import ByteLevelBPETokenizer, Tokenizer

from minift.files.gpt2_config import parse_config
from minift.model.gpt import GPT, GPTConfig

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test needs a network
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported: its kernels run as numpy, slowly

TINY = dict(vocab_size=97, n_positions=96, n_embd=24, n_layer=3, n_head=3, eos_token_id=96)
TEXTS = (
    "The fridge is broken again. Can you call the landlord, please? I'll do it after lunch.",
    "Anna: are we still meeting at 7 pm? Ben: yes, see you there! Anna: great, don't be late :-)",
    "Name: The Golden Palace, food: Italian, price: cheap. The Golden Palace serves cheap Italian food.",
    "Sum\u00e9rien, \u00fcber, na\u00efve caf\u00e9 \u2014 1,024 positions; 50,257 tokens.\n\nA\ttab.",
)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # on tensors this small a second thread only waits, long on a busy machine


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """Runs without a prediction of their memory, which takes longer than such a run."""
    with one_thread_without_plan(predict=False):
        yield


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> None:
    """Values at which every parameter matters: biases are not zero, norms not one, attention not flat."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            parameter.normal_(0.0, 1.3 / parameter.shape[-1] ** 0.5, generator=generator)
        else:
            mean = 1.0 if "ln_" in name and name.endswith("weight") else 0.0
            parameter.normal_(mean, 0.3, generator=generator)


@pytest.fixture(scope="session")
def make_gpt() -> Callable[..., GPT]:
    """make_gpt(seed=0, **config): a random model of ours, in eval mode."""

    def make(seed: int = 0, **changes: Any) -> GPT:
        model = GPT(GPTConfig(**TINY | changes))
        randomise(model, seed)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def make_reference() -> Callable[..., torch.nn.Module]:
    """make_reference(seed=0, **config): a random GPT2LMHeadModel of transformers, in eval mode."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def make(seed: int = 0, **changes: Any) -> torch.nn.Module:
        settings = TINY | {"bos_token_id": 96} | changes
        with torch.random.fork_rng():
            # transformers' other forms of attention once ignored scale_attn_weights; "eager" is written out
            reference = GPT2LMHeadModel(GPT2Config(**settings, attn_implementation="eager"))
        randomise(reference, seed)
        return reference.eval()

    return make


@pytest.fixture(scope="session")
def from_reference() -> Callable[[torch.nn.Module], GPT]:
    """Our model with a reference's values, turned round by the type of the layer that owns them."""
    from transformers.pytorch_utils import Conv1D

    def convert(reference: torch.nn.Module) -> GPT:
        model = GPT(parse_config(reference.config.to_dict(), "reference"))
        values = dict(reference.transformer.named_parameters())
        for name, module in reference.transformer.named_modules():
            if isinstance(module, Conv1D):
                values[f"{name}.weight"] = module.weight.T
        model.load_state_dict({name: value.detach().clone() for name, value in values.items()})
        return model.eval()

    return convert


@pytest.fixture(scope="session")
def texts() -> tuple[str, ...]:
    """What the tokenizer was trained on."""
    return TEXTS


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vocab.json and merges.txt of a small byte-level BPE, as GPT-2's own files are."""
    folder = tmp_path_factory.mktemp("tokenizer")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        TEXTS * 2, vocab_size=320, min_frequency=2, special_tokens=["<|endoftext|>"], show_progress=False
    )
    bpe.save_model(str(folder))
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    files = (str(tokenizer_folder / file) for file in ("vocab.json", "merges.txt"))
    return ByteLevelBPETokenizer(*files)._tokenizer


@pytest.fixture(scope="session")
def model_folder(
    tmp_path_factory: pytest.TempPathFactory,
    make_reference: Callable[..., torch.nn.Module],
    tokenizer_folder: Path,
) -> Path:
    """A folder that transformers saved, with a tokenizer: the vocabulary has 320 tokens, 0 is end-of-text."""
    folder = tmp_path_factory.mktemp("models") / "base"
    make_reference(vocab_size=320, eos_token_id=0, bos_token_id=0).save_pretrained(folder)
    for file in ("vocab.json", "merges.txt"):
        (folder / file).write_bytes((tokenizer_folder / file).read_bytes())
    return folder
