"""eval.py --prompt: the text in the run's template, and its continuations."""

import sys
from dataclasses import asdict
from typing import Any

from minift.data.dataset import DataOptions, read_layout
from minift.data.layouts import AnyLayout, ChatLayout, TextLayout
from minift.data.templates import fill, used_fields
from minift.data.tokens import start_tokens, tokenize
from minift.errors import UserError
from minift.files.weights import Base
from minift.model.generate import generate
from minift.model.gpt import GPT
from minift.report.predict import Decoding


def find_run_layout(data: DataOptions) -> tuple[AnyLayout | None, str]:
    """The layout of the run's rows; or None and the reason, such as data that was deleted.

    Raises UserError for a wrong --template.
    """
    if data.template is not None or data.prompt_field:
        return read_layout(data), ""  # from the flags alone
    try:
        return read_layout(data), ""
    except UserError as error:
        return None, str(error)


def read_prompt(text: str) -> str:
    """The text of --prompt; "-" is standard input. Raises UserError."""
    if text != "-":
        return text
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt -: standard input is not UTF-8 text: {error}") from None


def apply_template(data: DataOptions, text: str) -> tuple[str, str]:
    """A prompt in the run's template, if that needs only one field; and a line that says whether it was applied."""
    layout, reason = find_run_layout(data)
    if layout is None:
        return text, f"the prompt is taken as it is: the run's template is not known, {reason}"
    if isinstance(layout, TextLayout):
        return text, "the prompt is taken as it is: the run learned texts without a template"
    if isinstance(layout, ChatLayout):
        fields: dict[str, Any] = {layout.needed[0]: [{"role": "user", "content": text}]}
        text, _ = layout.prompt_of(fields)
        return text, "the prompt is the user's turn of a chat, as in the run's rows (--raw takes it as it is)"
    names = layout.needed or used_fields(layout.prompt)
    if len(names) > 1:
        return text, (f"the prompt is taken as it is: the run's template {layout.template!r} has the fields "
                      f"{', '.join(names)}, and --prompt gives one; --predict takes rows with all of them")
    line = f"the prompt is {names[0]} in the run's template {layout.template!r} (--raw takes it as it is)"
    return fill(layout.prompt, {names[0]: text}), line


def print_continuations(base: Base, tuned: dict[str, GPT], prompt: str, raw: bool, data: DataOptions,
                        decoding: Decoding) -> None:
    """The continuation of --prompt; of several models the base's too, each behind its name. Raises UserError."""
    text, line = read_prompt(prompt), ""
    if not raw:
        text, line = apply_template(data, text)
    ids = start_tokens(base.tokenizer) + tokenize(base.tokenizer, [text], data.control_tokens)[0]
    models = {"base": base.model, **tuned} if len(tuned) > 1 else tuned
    continuations = {}
    for name, model in models.items():
        new = generate(model, [ids], stop=base.eos_token_id, **asdict(decoding))
        continuations[name] = base.tokenizer.decode(new[0])
    if line:  # on stderr, so that standard output is the continuation alone
        print(line, file=sys.stderr)
    for name, continuation in continuations.items():
        print(f"{name}: {continuation}" if len(models) > 1 else continuation)
