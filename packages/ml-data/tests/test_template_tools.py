"""Tools in templates: what is told of them, calls, answers, and records that are none of it."""

from __future__ import annotations

import json

import pytest
from golden_conversations import golden_tokenizer

from ml_data.instruction.conversation import Conversation, Message, RecordError
from ml_data.templates import load_template

TOOLS = [{"name": "f", "description": "F.", "parameters": {"type": "object", "properties": {}}}]
CALL = {"name": "f", "arguments": {"a": "é", "n": [1, None, True]}}


def written(template, content, tools=None) -> tuple[str, str]:
    """Return question and answer of a conversation that calls a function."""
    tokenizer = golden_tokenizer()
    messages = (Message("user", "Q"), Message("function", content))
    conversation = Conversation(messages, tools=tools)
    (turn,) = load_template(template).format(tokenizer).encode(conversation).turns
    return tuple(tokenizer.decode(ids, skip_special_tokens=False) for ids in turn[:2])


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        [CALL],
        {**CALL, "arguments": json.dumps(CALL["arguments"])},
        {"type": "function", "function": CALL},
        {"content": None, "tool_calls": [{"id": "1", "type": "function", "function": CALL}]},
    ],
    ids=["call", "list", "text arguments", "wrapped", "message"],
)
def test_a_call_is_the_same_in_every_spelling(call):
    expected = 'Action: f\nAction Input: {"a": "é", "n": [1, null, true]}</s>'
    assert written("default", json.dumps(call))[1] == expected


@pytest.mark.parametrize(
    ("template", "answer"),
    [
        ("default", "Well.\nAction: f\nAction Input: {}\nAction: g\nAction Input: {}</s>"),
        (
            "qwen2.5",
            'Well.\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n'
            '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call><|im_end|>\n',
        ),
    ],
)
def test_text_stands_before_calls_and_calls_follow_each_other(template, answer):
    calls = [{"name": name, "arguments": {}} for name in "fg"]
    assert written(template, json.dumps({"content": "Well.", "tool_calls": calls}))[1] == answer


@pytest.mark.parametrize("template", ["llama3.1", "glm4", "chatglm3"])
def test_a_model_that_calls_one_tool_at_a_time_refuses_two(template):
    with pytest.raises(RecordError, match="one tool at a time"):
        written(template, json.dumps([CALL, CALL]))


@pytest.mark.parametrize("template", ["llama3.1", "mistral_v3", "chatglm3"])
def test_text_that_has_no_form_before_a_call_is_refused_not_dropped(template):
    with pytest.raises(RecordError, match="no form for text before"):
        written(template, json.dumps({"content": "Well.", "tool_calls": [CALL]}))


def test_tools_in_openai_spelling_are_the_same():
    wrapped = [{"type": "function", "function": tool} for tool in TOOLS]
    call = json.dumps(CALL)
    assert written("qwen3", call, json.dumps(TOOLS)) == written("qwen3", call, json.dumps(wrapped))


def test_an_empty_list_of_tools_is_no_tools():
    assert written("qwen2.5", json.dumps(CALL), "[]") == written("qwen2.5", json.dumps(CALL))


def test_tools_follow_the_system_text_after_a_blank_line_that_goes_without_one():
    assert "<|im_start|>system\n# Tools" in written("qwen3", json.dumps(CALL), json.dumps(TOOLS))[0]
    with_default = written("qwen2.5", json.dumps(CALL), json.dumps(TOOLS))[0]
    assert "You are a helpful assistant.\n\n# Tools" in with_default


def test_an_argument_may_have_the_name_of_a_method():
    properties = {name: {"type": "string"} for name in ("items", "keys", "name")}
    tool = {"name": "f", "parameters": {"properties": properties, "required": ["items"]}}
    question = written("default", json.dumps(CALL), json.dumps([tool]))[0]
    assert "  - items (string, required): \n  - keys (string): \n  - name (string): \n" in question


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Action: f", r"function call: not JSON \(Action: f\)"),
        ("3", r"function call: not an object \(3\)"),
        ("[]", "function call: an empty list"),
        ('{"content": "x", "tool_calls": []}', "function call: an empty list"),
        ('{"arguments": {}}', "function call: no name"),
        ('{"name": "f"}', "function call: no arguments"),
        ('{"name": "f", "arguments": "{"}', "function call: arguments that are not JSON"),
    ],
)
def test_a_message_that_calls_nothing_is_refused(content, message):
    with pytest.raises(RecordError, match=message):
        written("default", content)


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("tools", "tools: not JSON"),
        ('["f"]', "tools: not an object"),
        ('[{"description": "F."}]', "tools: a tool without a name"),
        ('[{"name": "f", "parameters": 3}]', "tools: parameters that are not an object"),
        ('[{"name": "f", "parameters": {"properties": ["a"]}}]', "describe fails"),
    ],
)
def test_tools_that_are_none_are_refused(tools, message):
    with pytest.raises(RecordError, match=message):
        written("default", json.dumps(CALL), tools)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("default", "\nHuman: cold\nnoon\nAssistant: "),
        ("mistral_v3", '[TOOL_RESULTS]{"content": "cold\\nnoon"}[/TOOL_RESULTS]'),
    ],
)
def test_a_template_with_one_place_for_answers_has_a_line_of_each(template, expected):
    tokenizer = golden_tokenizer()
    messages = (
        Message("user", "Q"),
        Message("function", json.dumps([CALL, CALL])),
        Message("observation", "cold\nnoon", answers=("cold", "noon")),
        Message("assistant", "A"),
    )
    turns = load_template(template).format(tokenizer).encode(Conversation(messages)).turns
    assert tokenizer.decode(turns[1].source, skip_special_tokens=False) == expected


def test_what_a_tool_answers_is_json_where_the_model_reads_json():
    tokenizer = golden_tokenizer()

    def question(template, content):
        messages = (
            Message("user", "Q"),
            Message("function", json.dumps(CALL)),
            Message("observation", content),
            Message("assistant", "A"),
        )
        turns = load_template(template).format(tokenizer).encode(Conversation(messages)).turns
        return tokenizer.decode(turns[1].source, skip_special_tokens=False)

    assert '{"content": "cold"}[/TOOL_RESULTS]' in question("mistral_v3", "cold")
    assert '{"content": {"t": 3}}[/TOOL_RESULTS]' in question("mistral_v3", '{"t": 3}')
    assert '\n\n"cold"<|eot_id|>' in question("llama3.1", "cold")
