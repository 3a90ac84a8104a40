"""Records -> pairs: layouts, templates, chats and values."""

import json
import random
from pathlib import Path

import pytest
from data_files import jsonl, read_file, texts, write

from minift.data.pairs import Pair, PairOptions, Prompt, read_prompts
from minift.data.templates import parse_template
from minift.errors import UserError

# Layouts and templates

LAYOUTS = {
    "prompt": ({"prompt": "P ", "completion": " C\n"}, "P ", " C\n"),
    "prompt wins": ({"dialogue": "D", "summary": "S", "prompt": "P", "completion": "C"}, "P", "C"),
    "with input": (
        {"instruction": "Do", "input": "it", "output": "done"}, "Do\n\nInput:\nit\n\nAnswer:", "done"),
    "blank input": ({"instruction": "Do", "input": " ", "output": "done"}, "Do\n\nAnswer:", "done"),
    "no input": ({"instruction": "Do", "output": "done"}, "Do\n\nAnswer:", "done"),
    "null input": ({"instruction": "Do", "input": None, "output": "done"}, "Do\n\nAnswer:", "done"),
    "samsum": ({"id": 3, "dialogue": "A: hi", "summary": "S"}, "A: hi\n\nSummary:", "S"),
    "e2e": ({"mr": "name : A", "ref": "R"}, "name : A\n\nText:", "R"),
    "context": ({"context": "C", "completion": "R"}, "C", "R"),
    "response": ({"prompt": "P", "response": "R"}, "P", "R"),
    "dolly": ({"instruction": "Do", "context": "it", "response": "done", "category": "x"},
              "Do\n\nInput:\nit\n\nAnswer:", "done"),
    "dolly without context": (
        {"instruction": "Do", "context": "", "response": "done"}, "Do\n\nAnswer:", "done"),
    "response with input": ({"instruction": "Do", "input": "it", "response": "done"},
                            "Do\n\nInput:\nit\n\nAnswer:", "done"),
    "question": ({"question": "Q?", "answer": "A"}, "Q?\n\nAnswer:", "A"),
    "question and context": ({"context": "C", "question": "Q?", "answer": "A"}, "C\n\nQ?\n\nAnswer:", "A"),
    "names in capitals": ({"Question": "Q?", " ANSWER": "A"}, "Q?\n\nAnswer:", "A"),
    "input and output": ({"input": "I", "output": "O"}, "I", "O"),
    "text": ({"text": " T\n", "meta": {"id": 1}}, "", " T\n"),
    "messages": (
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
                      {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Bye\n"},
                      {"role": "assistant", "content": " Bye. "}]},
        "System: Be brief.\nUser: Hi\nAssistant: Yes?\nUser: Bye\nAssistant:", " Bye. "),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_known_layouts(tmp_path, name):
    row, prompt, completion = LAYOUTS[name]
    pairs, notes = read_file(write(tmp_path / "train.jsonl", jsonl([row])))
    assert texts(pairs) == [(prompt, completion)]
    assert notes[0].startswith("train.jsonl: usable rows: 1, field")


def test_the_layout_is_said(tmp_path):
    row = LAYOUTS["samsum"][0]
    _, notes = read_file(write(tmp_path / "train.jsonl", jsonl([row])))
    assert notes == [
        r"train.jsonl: usable rows: 1, fields dialogue -> summary, template '{dialogue}\n\nSummary:'"
    ]


FLAGS = {
    "both fields": (dict(prompt_field="q", completion_field="a"), "Q", "A"),
    "template": (dict(template="{q} {{x}}\\n{prompt}:", completion_field="a"), "Q {x}\nP:", "A"),
    "field in template": (dict(prompt_field="q", template="<{q}>", completion_field="a"), "<Q>", "A"),
    "prompt field on a known layout": (dict(prompt_field="q"), "Q", "C"),
    "completion field on a known layout": (dict(completion_field="a"), "P", "A"),
    "template on a known layout": (dict(template="{prompt}!"), "P!", "C"),
    "optional": (
        dict(template="{q}{?none: ({none})}{?a:\\n{{{a}}}}", completion_field="prompt"), "Q\n{A}", "P"),
    "any name": (dict(prompt_field="#1 String", completion_field="a.b: c"), "one", "two"),
    "number sign in a template": (dict(template="{#1 String}!", completion_field="a"), "one!", "A"),
    "text alone": (dict(prompt_field="", completion_field="a"), "", "A"),
    "name with spaces": (dict(prompt_field="long name", completion_field="a"), "L", "A"),
}


@pytest.mark.parametrize("name", FLAGS)
def test_flags_override_the_layout(tmp_path, name):
    flags, prompt, completion = FLAGS[name]
    row = {"prompt": "P", "completion": "C", "q": "Q", "a": "A", "long name": "L",
           "#1 String": "one", "a.b: c": "two", "none": None}
    path = write(tmp_path / "rows.jsonl", jsonl([row]))
    assert texts(read_file(path, **flags)[0]) == [(prompt, completion)]


def test_an_overridden_completion_keeps_the_optional_input(tmp_path):
    rows = [{"instruction": "Do", "output": "x", "short": "y"}]
    path = write(tmp_path / "rows.jsonl", jsonl(rows))
    assert texts(read_file(path, completion_field="short")[0]) == [("Do\n\nAnswer:", "y")]


BAD_TEMPLATES = [
    "{dialogue.__class__}", "{dialogue[0]}", "{dialogue!r}", "{dialogue:>10}", "{dialogue:}", "{}", "{0}",
    "{1dialogue}", "{dialogue", "dialogue}", "{{dialogue}", "{dialogue}}", "{ dialogue}", "{{{dialogue",
    "{dia{x}logue}", "{dialogue}\udcff", "{?dialogue}", "{?dialogue:{x.y}}", "{?dialogue: {?x: y}}",
    "{?dialogue: x", "{?: x}{dialogue}", "{?0: x}{dialogue}",
]  # fmt: skip


@pytest.mark.parametrize("template", BAD_TEMPLATES)
def test_a_template_is_data(tmp_path, template):
    path = write(tmp_path / "rows.jsonl", jsonl([{"dialogue": "D", "summary": "S"}]))
    with pytest.raises(UserError, match="^--template .*(lone|plain field name|UTF-8)"):
        read_file(path, template=template)


def test_doubled_braces_are_those_of_str_format():
    generator = random.Random(0)
    for _ in range(300):
        template = "".join(generator.choices(["{{", "}}", "{x}", "t", " "], k=generator.randrange(1, 9)))
        filled = "".join("VALUE" if part.is_field else part.text for part in parse_template(template))
        assert filled == template.format(x="VALUE")


def test_a_value_is_never_a_template(tmp_path):
    path = write(tmp_path / "rows.jsonl", jsonl([{"dialogue": "{summary} {0.x}\\n", "summary": "S"}]))
    assert read_file(path)[0][0].prompt == "{summary} {0.x}\\n\n\nSummary:"


BAD_FLAGS = {
    "unknown layout": ({"q": "x", "a": "y"}, {}, "rows.jsonl: which of its fields 'q', 'a' .*--prompt-field"),
    "no completion": ({"q": "x", "a": "y"}, {"prompt_field": "q"}, "which .*--completion-field"),
    "no prompt": ({"q": "x", "a": "y"}, {"completion_field": "a"}, "which of its fields"),
    "unknown field": ({"q": "x", "a": "y"}, {"prompt_field": "z", "completion_field": "a"}, "no field 'z'"),
    "unknown completion": ({"prompt": "x", "completion": "y"}, {"completion_field": "z"}, "no field 'z'"),
    "unknown in template": ({"mr": "x", "ref": "y"}, {"template": "{mr}{z}"}, "'z', there are 'mr', 'ref'"),
    "no field": ({"mr": "x", "ref": "y"}, {"template": "Say:"}, "'Say:' uses no field"),
    "the answer": ({"mr": "x", "ref": "y"}, {"template": "{mr} {ref}"}, "holds the completion's field 'ref'"),
    "the same": ({"mr": "x", "ref": "y"}, {"prompt_field": "ref"}, "holds the completion's field 'ref'"),
    "contradiction": ({"mr": "x", "ref": "y"}, {"prompt_field": "mr", "template": "{ref}"}, "does not use"),
    "chat": ({"messages": [], "x": "y"}, {"prompt_field": "x"}, "which of its fields 'messages', 'x'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_wrong_fields_are_refused_whatever_skip_bad_says(tmp_path, name):
    row, flags, message = BAD_FLAGS[name]
    path = write(tmp_path / "rows.jsonl", jsonl([row]))
    for skip_bad in (False, True):
        with pytest.raises(UserError, match=message):
            read_file(path, skip_bad=skip_bad, **flags)


# Chats

BAD_MESSAGES = {
    "no list": ("hello", "must be a list of objects"),
    "empty": ([], "must be a list of objects"),
    "texts": (["hello"], "must be a list of objects"),
    "no answer": ([{"role": "user", "content": "x"}], "no turn of 'messages' is the assistant's"),
    "unknown role": ([{"role": "alien", "content": "x"}], "role 'alien'"),
    "role no text": ([{"role": [1], "content": "x"}], "field 'role' is a list"),
    "no role": ([{"content": "x"}], "no field 'role'"),
    "a picture": ([{"role": "user", "content": [{"type": "image_url"}]}], "a part of type 'image_url'"),
    "half learned": ([{"role": "assistant", "content": "x", "weight": 0.5}], "field 'weight' is 0.5"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_MESSAGES)
def test_bad_messages(tmp_path, name):
    turns, message = BAD_MESSAGES[name]
    path = write(tmp_path / "chat.jsonl", jsonl([LAYOUTS["messages"][0], {"messages": turns}]))
    with pytest.raises(UserError, match=f"chat.jsonl:2: .*{message}"):
        read_file(path)


def chat(*turns: tuple[str, str]) -> list[dict]:
    return [{"role": role, "content": content} for role, content in turns]


def learned_texts(pair: Pair) -> list[str]:
    return [pair.prompt[begin:end] for begin, end in pair.learned] + [pair.completion]


def read_one(tmp_path: Path, row: dict, **flags) -> Pair:
    pairs, _ = read_file(write(tmp_path / "chat.jsonl", jsonl([row])), **flags)
    return pairs[0]


def test_every_answer_is_learned(tmp_path):
    turns = chat(("system", "Be brief."), ("user", "Hi"), ("assistant", "Yes?"), ("user", "Bye"),
                 ("assistant", "Bye."))
    pair = read_one(tmp_path, {"messages": turns})
    assert pair.prompt == "System: Be brief.\nUser: Hi\nAssistant: Yes?\nUser: Bye\nAssistant:"
    assert learned_texts(pair) == [" Yes?", "Bye."]
    assert learned_texts(read_one(tmp_path, {"messages": turns}, turns="last")) == ["Bye."]
    assert learned_texts(read_one(tmp_path, {"messages": turns}, join="")) == ["Yes?", "Bye."]


def test_an_answer_with_weight_0_is_not_learned(tmp_path):
    for key, value in (("weight", 0), ("weight", "0"), ("train", False), ("loss", 0.0)):
        turns = chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
        turns[1][key] = value
        assert learned_texts(read_one(tmp_path, {"messages": turns})) == ["d"]
        turns[1][key], turns[3][key] = 1, value
        pair = read_one(tmp_path, {"messages": turns})
        assert (pair.prompt, learned_texts(pair)) == ("User: a\nAssistant:", ["b"])


def test_turns_after_the_last_answer_are_left_out(tmp_path):
    turns = chat(("user", "a"), ("assistant", "b"), ("user", "thanks"))
    assert texts([read_one(tmp_path, {"messages": turns})]) == [("User: a\nAssistant:", "b")]


def test_chats_of_from_and_value(tmp_path):
    said = [("system", "Be short."), ("human", "Hi"), ("gpt", "Yes?"), ("human", "Bye"), ("gpt", "Bye.")]
    turns = [{"from": role, "value": text} for role, text in said]
    prompt = "System: Be short.\nUser: Hi\nAssistant: Yes?\nUser: Bye\nAssistant:"
    for row in ({"conversations": turns}, {"conversations": turns[1:], "system": "Be short."}):
        pair = read_one(tmp_path, row)
        assert (pair.prompt, learned_texts(pair)) == (prompt, [" Yes?", "Bye."])


def test_the_turns_of_tools_are_text(tmp_path):
    call = [{"type": "function", "function": {"name": "look", "arguments": '{"é": 1}'}}]
    turns = [{"role": "developer", "content": "Look."}, {"role": "user", "content": "Who?"},
             {"role": "assistant", "content": None, "tool_calls": call}, {"role": "tool", "content": "Ann"},
             {"role": "assistant", "content": "Wait.", "function_call": {"name": "f"}},
             {"role": "function", "content": {"dish": "soup"}},
             {"role": "assistant", "content": [{"type": "text", "text": "Ann,"}, " soup."]}]
    pair = read_one(tmp_path, {"messages": turns, "tools": []})
    assert read_file(tmp_path / "chat.jsonl")[1][0].endswith("(--turns last: the last one), not used: tools")
    written = json.dumps(call, ensure_ascii=False)
    assert pair.prompt == (f"System: Look.\nUser: Who?\nAssistant: {written}\nTool: Ann\n"
                           'Assistant: Wait.\n{"name": "f"}\nTool: {"dish": "soup"}\nAssistant:')
    assert learned_texts(pair) == [f" {written}", ' Wait.\n{"name": "f"}', "Ann, soup."]


def test_chats_without_an_answer_are_dropped_and_counted(tmp_path):
    rows = [{"messages": chat(("user", "a"), ("assistant", "b"))},
            {"messages": chat(("user", "a"), ("assistant", ""))}, {"messages": chat(("assistant", "b"))}]
    pairs, notes = read_file(write(tmp_path / "a.jsonl", jsonl(rows)))
    assert texts(pairs) == [("User: a\nAssistant:", "b")]
    assert notes[1:] == ["a.jsonl: rows dropped for an empty prompt: 1, first a.jsonl:3",
                         "a.jsonl: rows dropped for an empty completion: 1, first a.jsonl:2"]


# Values


def test_values_that_are_not_text(tmp_path):
    values = {"3": "3", "2.50": "2.50", "1e5": "1e5", "-0.0": "-0.0", "true": "true", "false": "false",
              '{"a": [1, null, "é"]}': '{"a": [1, null, "é"]}', "[]": "[]", "1" + 19 * "0": "1" + 19 * "0"}
    lines = [f'{{"prompt": {value}, "completion": {value}}}' for value in values]
    pairs, _ = read_file(write(tmp_path / "a.jsonl", "\n".join(lines)))
    assert texts(pairs) == [(text, text) for text in values.values()]


def test_a_missing_value_is_refused(tmp_path):
    for value in ("null", "NaN"):
        path = write(tmp_path / "a.jsonl", f'{{"prompt": {value}, "completion": "x"}}\n')
        with pytest.raises(UserError, match="a.jsonl:1: field 'prompt' is null"):
            read_file(path)


def test_white_space_is_kept(tmp_path):
    row = {"prompt": "def f():\n", "completion": "    return 1\n\n"}
    assert texts([read_one(tmp_path, row)]) == [(row["prompt"], row["completion"])]


def test_a_row_says_whether_it_is_learned(tmp_path):
    rows = [{"prompt": str(i), "completion": "x"} for i in range(5)]
    rows[1]["weight"], rows[2]["weight"], rows[3]["train"], rows[4]["loss"] = 0, 1, False, True
    pairs, notes = read_file(write(tmp_path / "a.jsonl", jsonl(rows)))
    assert [pair.prompt for pair in pairs] == ["0", "2", "4"]
    assert notes[1] == "a.jsonl: rows dropped for a weight of 0: 2, first a.jsonl:2"
    rows[2]["weight"] = 72.5
    path = write(tmp_path / "a.jsonl", jsonl(rows))
    with pytest.raises(UserError, match="a.jsonl:3: field 'weight' is 72.5, and must be 1 .*rename it"):
        read_file(path)
    assert read_file(path, template="{prompt} {?weight:{weight}}")[0][2].prompt == "2 72.5"


def test_text_beside_a_label_is_asked_about(tmp_path):
    path = write(tmp_path / "a.jsonl", jsonl([{"text": "T", "label": 1}]))
    with pytest.raises(UserError, match="which of its fields 'text', 'label'"):
        read_file(path)
    assert texts(read_file(path, "text", "label")[0]) == [("T", "1")]


def test_turns_in_prompt_and_completion(tmp_path):
    prompt = chat(("user", "a"), ("assistant", "b"), ("user", "c"))
    row = {"prompt": prompt, "completion": chat(("assistant", "d"))}
    pair = read_one(tmp_path, row)
    assert (pair.prompt, learned_texts(pair)) == ("User: a\nAssistant: b\nUser: c\nAssistant:", ["d"])


# Prompts that wait for their completions

PROMPTS = {
    "known": ({"dialogue": "D", "id": 1}, {}, "D\n\nSummary:"),
    "with a completion": ({"dialogue": "D", "summary": "S"}, {}, "D\n\nSummary:"),
    "template": ({"q": "Q"}, dict(template="{q}?"), "Q?"),
    "field": ({"q": "Q"}, dict(prompt_field="q", completion_field="a"), "Q"),
    "instruction": ({"instruction": "Do", "input": "it"}, {}, "Do\n\nInput:\nit\n\nAnswer:"),
    "chat": ({"messages": chat(("user", "a"), ("assistant", "b"), ("user", "c"))}, {},
             "User: a\nAssistant: b\nUser: c\nAssistant:"),
    "answered chat": ({"messages": chat(("user", "a"), ("assistant", "b"))}, {}, "User: a\nAssistant:"),
    "text": ({"text": "Once"}, {}, "Once"),
}  # fmt: skip


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_without_completions(tmp_path, name):
    row, flags, text = PROMPTS[name]
    path = write(tmp_path / "new.jsonl", jsonl([row, row]))
    prompts = list(read_prompts(path, PairOptions(**flags)))
    assert prompts == [Prompt(text, row, "new.jsonl:1"), Prompt(text, row, "new.jsonl:2")]


def test_rows_that_give_no_prompt(tmp_path):
    for row, message in (({"dialogue": " "}, "the prompt is empty"), ({"x": "y"}, "no field 'dialogue'")):
        path = write(tmp_path / "new.jsonl", jsonl([{"dialogue": "D"}, row]))
        with pytest.raises(UserError, match=f"new.jsonl:2: {message}"):
            list(read_prompts(path, PairOptions()))
    with pytest.raises(UserError, match="which of its fields 'x'"):
        list(read_prompts(write(path, jsonl([{"x": "y"}])), PairOptions()))
