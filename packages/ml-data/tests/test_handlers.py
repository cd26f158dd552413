import json
from contextlib import suppress

import pytest
from hypothesis import given, settings, strategies

from ml_data.handlers import HANDLERS, columns_of, find, names
from ml_data.instruction.conversation import Conversation, Message, Preference, RecordError
from ml_models.flags import UsageError


def convert(name, record, mapping=None):
    handler = HANDLERS[name]
    columns = columns_of(handler, None if mapping is None else json.dumps(mapping))
    return list(handler.convert(record, columns))


def said(*messages, system=None, tools=None):
    return Conversation(tuple(Message(*message) for message in messages), system, tools)


def refused(name, record, match, mapping=None):
    with pytest.raises(RecordError, match=match):
        convert(name, record, mapping)


ALPACA = "AlpacaStyleInstructionHandler"
SHAREGPT = "SharegptStyleInstructionHandler"
OPENAI = "OpenAIInstructionHandler"
TOOL = {"name": "search", "description": "Look up.", "parameters": {"type": "object"}}
CALL = '{"name": "search", "arguments": {"q": "Köln"}}'

GOLDEN = {
    "AlpacaStyleInstructionHandler": (
        {
            "instruction": "Translate.",
            "input": "Hund",
            "output": "dog",
            "history": [["Hi", "Hello"], ["You?", "Fine"]],
            "system": "Be brief.",
        },
        [
            said(
                ("user", "Hi"),
                ("assistant", "Hello"),
                ("user", "You?"),
                ("assistant", "Fine"),
                ("user", "Translate.\nHund"),
                ("assistant", "dog"),
                system="Be brief.",
            )
        ],
    ),
    "SharegptStyleInstructionHandler": (
        {
            "conversations": [
                {"from": "system", "value": "You may search."},
                {"from": "human", "value": "Weather?"},
                {"from": "function_call", "value": CALL},
                {"from": "observation", "value": "rain"},
                {"from": "gpt", "value": "It rains."},
            ],
            "system": "overruled by the message",
            "tools": json.dumps([TOOL]),
        },
        [
            said(
                ("user", "Weather?"),
                ("function", CALL),
                ("observation", "rain"),
                ("assistant", "It rains."),
                system="You may search.",
                tools=json.dumps([TOOL]),
            )
        ],
    ),
    "OpenAIInstructionHandler": (
        {
            "messages": [
                {"role": "developer", "content": "You may search."},
                {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {
                            "id": "1",
                            "type": "function",
                            "function": {"name": "search", "arguments": '{"q": "Köln"}'},
                        },
                        {"id": "2", "type": "function", "function": {"name": "now"}},
                    ],
                },
                {"role": "tool", "tool_call_id": "1", "content": "rain"},
                {"role": "tool", "tool_call_id": "2", "content": "noon"},
                {"role": "assistant", "content": "It rains.", "weight": 0},
                {"role": "user", "content": "Thanks"},
                {"role": "assistant", "content": "Bye", "reasoning_content": "polite", "weight": 1},
            ],
            "tools": [{"type": "function", "function": TOOL}],
        },
        [
            said(
                ("user", "Weather?"),
                ("function", f'[{CALL}, {{"name": "now", "arguments": {{}}}}]'),
                ("observation", "rain\nnoon", True, ("rain", "noon")),
                ("assistant", "It rains.", False),
                ("user", "Thanks"),
                ("assistant", "<think>\npolite\n</think>\n\nBye"),
                system="You may search.",
                tools=json.dumps([TOOL]),
            )
        ],
    ),
    "GeneralInstructionHandler": (
        {"instruction": "Translate.", "input": "", "output": "dog"},
        [said(("user", "Translate.\n"), ("assistant", "dog"))],
    ),
    "BelleMultiTurnInstructionHandler": (
        {
            "instruction": "Human: Hi\nAssistant: Hello\nHuman: And you?\nAssistant:",
            "output": " Fine ",
        },
        [said(("user", "Hi"), ("assistant", "Hello"), ("user", "And you?"), ("assistant", "Fine"))],
    ),
    "MOSSInstructionHandler": (
        {
            "chat": {
                "turn_1": {"Human": "<|Human|>: Hi<eoh>\n", "MOSS": "<|MOSS|>: Hello<eom>\n"},
                "turn_2": {"Human": "<|Human|>: You?<eoh>\n", "MOSS": "<|MOSS|>: Fine<eom>\n"},
                "turn_3": None,
            }
        },
        [
            said(("user", "Hi"), ("assistant", "Hello")),
            said(("user", "Hi"), ("assistant", "Hello"), ("user", "You?"), ("assistant", "Fine")),
        ],
    ),
    "MOSSMultiTurnHandler": (
        {
            "chat": {
                "turn_1": {"Human": "<|Human|>: Hi<eoh>\n", "MOSS": "<|MOSS|>: Hello<eom>\n"},
                "turn_2": {"Human": "<|Human|>: You?<eoh>\n", "MOSS": "<|MOSS|>: Fine<eom>\n"},
            }
        },
        [said(("user", "Hi"), ("assistant", "Hello"), ("user", "You?"), ("assistant", "Fine"))],
    ),
    "LeetcodePythonInstructionHandler": (
        {
            "code_with_problem": "Two sum.\n\n```python\nold\n```",
            "code_only": "```python\nnew\n```",
            "explanation_only": "It adds.",
        },
        [said(("user", "Two sum."), ("assistant", "```python\nnew\n```\nIt adds."))],
    ),
    "AlpacaStylePairwiseHandler": (
        {
            "instruction": "2+2",
            "input": "?",
            "chosen": "4",
            "rejected": "5",
            "history": [["a", "b"]],
        },
        [
            Preference(
                said(("user", "a"), ("assistant", "b"), ("user", "2+2\n?")),
                Message("assistant", "4"),
                Message("assistant", "5"),
            )
        ],
    ),
    "SharegptStylePairwiseHandler": (
        {
            "conversations": [
                {"from": "system", "value": "Add."},
                {"from": "human", "value": "2+2?"},
            ],
            "chosen": {"from": "function_call", "value": CALL},
            "rejected": {"from": "gpt", "value": "5"},
        },
        [
            Preference(
                said(("user", "2+2?"), system="Add."),
                Message("function", CALL),
                Message("assistant", "5"),
            )
        ],
    ),
    "OpenAIPairwiseHandler": (
        {
            "chosen": [
                {"role": "user", "content": "2+2?"},
                {"role": "assistant", "content": "4"},
            ],
            "rejected": [
                {"role": "user", "content": "2+2?"},
                {"role": "assistant", "content": "5"},
            ],
        },
        [Preference(said(("user", "2+2?")), Message("assistant", "4"), Message("assistant", "5"))],
    ),
}


@pytest.mark.parametrize("name", sorted(HANDLERS))
def test_every_handler_reads_its_format(name):
    record, expected = GOLDEN[name]
    assert convert(name, record) == expected


@pytest.mark.parametrize("name", sorted(HANDLERS))
@pytest.mark.parametrize(
    "record",
    [
        {},
        {"text": "a"},
        {"instruction": 3, "prompt": 3, "conversations": 3, "messages": 3, "chat": 3},
        {"conversations": [], "messages": [], "chat": {}, "chosen": [], "rejected": []},
        {"conversations": [{}], "messages": [{}], "chosen": {}, "rejected": {}, "chat": {"a": {}}},
        {"conversations": [3], "messages": ["x"], "chat": {"turn": 3}, "code_with_problem": None},
        {"prompt": "a", "chosen": ["b"], "rejected": None, "messages": [{"role": ["user"]}]},
        {"instruction": "a", "output": "b", "history": "old", "system": 3, "tools": "{"},
    ],
    ids=["empty", "text", "numbers", "nothing", "blank", "words", "halves", "extras"],
)
def test_a_record_of_another_form_is_a_record_error_and_nothing_else(name, record):
    with suppress(RecordError):
        found = convert(name, record)
        assert all(isinstance(one, (Conversation, Preference)) for one in found)


WORDS = ["from", "value", "role", "content", "tool_calls", "function", "name", "arguments"]
WORDS += ["weight", "function_call", "reasoning_content", "type", "text", "Human", "MOSS"]
JSON = strategies.recursive(
    strategies.none()
    | strategies.booleans()
    | strategies.integers()
    | strategies.floats()
    | strategies.sampled_from(["", "a", "{}", "[]", "human", "gpt", "user", "assistant", "tool"]),
    lambda inner: (
        strategies.lists(inner, max_size=3)
        | strategies.dictionaries(
            strategies.sampled_from(WORDS),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
COLUMNS = sorted({key for record, _ in GOLDEN.values() for key in record} | {"functions", "tools"})


@settings(derandomize=True, max_examples=300, deadline=None)
@given(record=strategies.dictionaries(strategies.sampled_from(COLUMNS), JSON, max_size=5))
def test_whatever_a_record_holds_is_understood_or_a_record_error(record):
    for name in HANDLERS:
        with suppress(RecordError):
            assert all(isinstance(one, (Conversation, Preference)) for one in convert(name, record))


@settings(derandomize=True, max_examples=300, deadline=None)
@given(value=JSON, other=JSON)
def test_a_golden_record_with_one_value_changed_is_understood_or_a_record_error(value, other):
    for name, (record, _) in GOLDEN.items():
        for key in record:
            for changed in (value, [value, other], {"a": value}):
                with suppress(RecordError):
                    convert(name, {**record, key: changed})


# Alpaca.


def test_optional_columns_may_be_missing_or_null():
    plain = {"instruction": "Hi", "output": "Hello"}
    nulls = dict.fromkeys(("input", "history", "system", "tools"))
    assert convert(ALPACA, plain) == convert(ALPACA, {**plain, **nulls})
    assert convert(ALPACA, plain) == [said(("user", "Hi"), ("assistant", "Hello"))]


def test_columns_have_the_names_that_map_keys_gives():
    record = {"q": "Hi", "a": "Hello", "input": "x", "past": [["one", "two"]]}
    mapping = {"prompt": "q", "response": "a", "query": "", "history": "past"}
    expected = said(("user", "one"), ("assistant", "two"), ("user", "Hi"), ("assistant", "Hello"))
    assert convert(ALPACA, record, mapping) == [expected]


def test_an_optional_column_may_be_missing_of_a_record():
    record = {"instruction": "Hi", "output": "Hello"}
    assert convert(ALPACA, record, {"history": "past"}) == convert(ALPACA, record)


def test_a_history_that_is_no_list_of_pairs_is_refused():
    record = {"instruction": "Hi", "output": "Hello"}
    refused(ALPACA, {**record, "history": {"q": "a"}}, "'history' is not a list of turns but {")
    refused(ALPACA, {**record, "history": [["q", "a", "b"]]}, r"turn 1 of 'history' is not \[q")
    refused(ALPACA, {**record, "history": [["q", None]]}, "turn 1 of 'history' is not text but nu")


def test_an_answer_that_is_null_or_no_text_is_refused():
    refused(ALPACA, {"instruction": "Hi", "output": None}, "the value of 'output' is null")
    refused(ALPACA, {"instruction": "Hi", "output": 3}, "the value of 'output' is not text but 3")


def test_one_column_may_hold_both_answers():
    pair = "AlpacaStylePairwiseHandler"
    one = convert(pair, {"instruction": "2+2?", "chosen": ["4", "5"]})
    assert one == convert(pair, {"instruction": "2+2?", "chosen": "4", "rejected": "5"})
    refused(pair, {"instruction": "2+2?", "chosen": ["4"]}, "is not a list of two answers")


# ShareGPT.


def test_tags_name_keys_and_roles():
    record = {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
        ]
    }
    tags = {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
    }
    found = convert(SHAREGPT, record, {"messages": "messages", "tags": tags})
    assert found == [said(("user", "Hi"), ("assistant", "Hello"))]


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([("gpt", "Hello")], "message 1 is of assistant, must be of user or observation"),
        ([("human", "a"), ("human", "b")], "message 2 is of user, must be of assistant or func"),
        ([("human", "a")], "message 1, the last, is not answered"),
        ([("human", "a"), ("bot", "b")], "message 2 is of \"bot\", must be of 'human', 'gpt'"),
        ([("system", "only")], "no messages"),
        ([("system", "s"), ("gpt", "b")], "message 1 after the system text is of assistant"),
        ([("system", "s"), ("human", None)], "the 'value' of message 2 is not text but null"),
        ([("human", "a"), ("function_call", "look it up")], "message 2 calls a tool, but is not J"),
        ([("human", "a"), ("function_call", "[3]")], "a tool has no name: 3"),
        ([("human", None), ("gpt", "b")], "the 'value' of message 1 is not text but null"),
    ],
    ids=[
        "begins",
        "twice",
        "open",
        "unknown",
        "system",
        "first",
        "second",
        "no-json",
        "no-call",
        "null",
    ],
)
def test_messages_out_of_order_are_refused(messages, match):
    record = {"conversations": [{"from": role, "value": text} for role, text in messages]}
    refused(SHAREGPT, record, match)


def test_a_message_without_its_keys_names_those_it_has():
    record = {"conversations": [{"role": "user", "content": "Hi"}]}
    refused(SHAREGPT, record, "message 1 has no 'from'; its keys are 'role', 'content'")


def test_tools_are_plain_functions_however_they_are_written():
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    wrapped = [{"type": "function", "function": TOOL}]
    for tools in (wrapped, json.dumps(wrapped), [TOOL]):
        (found,) = convert(SHAREGPT, {"conversations": turns, "tools": tools})
        assert json.loads(found.tools) == [TOOL]
    for tools in ("", " ", "[]", None, []):
        (found,) = convert(SHAREGPT, {"conversations": turns, "tools": tools})
        assert found.tools is None
    refused(SHAREGPT, {"conversations": turns, "tools": "search"}, "the tools are not JSON")
    refused(SHAREGPT, {"conversations": turns, "tools": [{"n": 1}]}, "a tool has no name")


def test_json_in_a_string_that_cannot_be_encoded_is_refused():
    """Whoever reads the file has looked at the text of a record, not into JSON in it."""
    half = r'[{"name": "\ud800"}]'
    turns = [{"from": "human", "value": "a"}, {"from": "function_call", "value": half}]
    refused(SHAREGPT, {"conversations": turns}, r"the calls have half a character \(\\ud800\)")
    turns[1] = {"from": "gpt", "value": "b"}
    refused(SHAREGPT, {"conversations": turns, "tools": half}, "the tools have half a character")


# OpenAI.


@pytest.mark.parametrize(
    ("message", "match"),
    [
        ({"content": [{"type": "image_url"}]}, "message 2 has a part that is not text"),
        ({"content": "b", "weight": 0.5}, "the weight of message 2 is 0.5, must be 0 or 1"),
        (
            {"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            "the arguments of 'f' are not JSON",
        ),
        ({"tool_calls": {"function": {"name": "f"}}}, "the tool_calls of message 2 are not a list"),
    ],
    ids=["image", "weight", "arguments", "calls"],
)
def test_what_no_template_can_write_is_refused(message, match):
    asked = {"role": "user", "content": "a"}
    answer = {"role": "assistant", **message}
    refused(OPENAI, {"messages": [asked, answer]}, match)
    system = {"role": "system", "content": "s"}
    refused(OPENAI, {"messages": [system, asked, answer]}, match.replace("message 2", "message 3"))


def test_what_is_said_before_a_call_is_kept():
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    answer = {
        "role": "assistant",
        "content": "Wait.",
        "reasoning_content": "f",
        "tool_calls": calls,
    }
    (found,) = convert(OPENAI, {"messages": [{"role": "user", "content": "a"}, answer]})
    assert found.messages[1].role == "function"
    assert json.loads(found.messages[1].content) == {
        "content": "<think>\nf\n</think>\n\nWait.",
        "tool_calls": [{"name": "f", "arguments": {}}],
    }


def test_the_older_functions_are_read():
    record = {
        "messages": [
            {"role": "user", "content": "a"},
            {
                "role": "assistant",
                "content": None,
                "function_call": {"name": "search", "arguments": '{"q": "Köln"}'},
            },
            {"role": "function", "name": "search", "content": "rain"},
            {"role": "assistant", "content": "b"},
        ],
        "functions": [TOOL],
    }
    (found,) = convert(OPENAI, record)
    assert [message.role for message in found.messages][1:3] == ["function", "observation"]
    assert found.messages[1].content == CALL
    assert json.loads(found.tools) == [TOOL]


def test_preferences_that_differ_in_their_question_are_refused():
    turn = {"role": "assistant", "content": "4"}
    record = {
        "chosen": [{"role": "user", "content": "2+2?"}, turn],
        "rejected": [{"role": "user", "content": "2+3?"}, turn],
    }
    refused("OpenAIPairwiseHandler", record, "differ before their last message")


def test_an_answer_that_is_no_message_is_refused():
    record = {"messages": [{"role": "user", "content": "2+2?"}], "chosen": "user", "rejected": "5"}
    refused("OpenAIPairwiseHandler", record, 'chosen is not a message but "user"')
    refused("OpenAIPairwiseHandler", {**record, "chosen": ["user"], "rejected": ["user"]}, "chosen")


# The others.


def test_a_belle_instruction_without_its_marks_is_refused():
    name, output = "BelleMultiTurnInstructionHandler", "b"
    for text in ("a", "Human: a", "Human: a Assistant: b Assistant:", "Human: a Assistant: b"):
        refused(name, {"instruction": text, "output": output}, "is not 'Human:")


# Names and columns.


def test_an_unknown_handler_is_an_error_that_lists_the_names():
    with pytest.raises(UsageError, match="AlpacaStyle: unknown; there are AlpacaStyleInstruction"):
        find("AlpacaStyle", pairwise=False)
    assert "LlamaFactoryInstructionHandler" in names(pairwise=False)


def test_a_handler_of_the_other_command_is_named_with_it():
    with pytest.raises(UsageError, match="that is for ml-data preference"):
        find("AlpacaStylePairwiseHandler", pairwise=False)
    with pytest.raises(UsageError, match="that is for ml-data instruct"):
        find(ALPACA, pairwise=True)


@pytest.mark.parametrize(
    ("mapping", "match"),
    [
        ("{", "--map-keys: not JSON"),
        ("[]", "--map-keys: not a JSON object but"),
        ('{"promt": "q"}', "no key 'promt'; this handler has prompt, .*; did you mean prompt"),
        ('{"tags": {"user_tag": "u"}}', "no key 'tags'; this handler has prompt, query"),
        ('{"prompt": 3}', "prompt must be a name, not 3"),
    ],
    ids=["json", "object", "key", "tags", "name"],
)
def test_wrong_map_keys_are_named(mapping, match):
    with pytest.raises(UsageError, match=match):
        columns_of(HANDLERS[ALPACA], mapping)


def test_wrong_tags_are_named():
    with pytest.raises(UsageError, match="no tag 'user'; did you mean user_tag"):
        columns_of(HANDLERS[SHAREGPT], '{"tags": {"user": "u"}}')
    with pytest.raises(UsageError, match="tags must be an object, not 3"):
        columns_of(HANDLERS[SHAREGPT], '{"tags": 3}')
