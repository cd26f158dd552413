"""Templates as files: the user's own, and what is said of files that are none."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from dataclasses import fields

import pytest
from golden_conversations import TOKENIZER, conversations, golden_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ml_data.instruction.conversation import Conversation, Message, RecordError
from ml_data.templates import Template, load_template, names
from ml_data.tokenizer import load_tokenizer
from ml_models.flags import UsageError

OWN = {
    "about": "Ours.",
    "prefix": [{"special": "bos"}],
    "system": ["System: {{content}}\n"],
    "user": ["Q{{round}}: {{content}}\nA:"],
    "separator": ["\n"],
}


@pytest.fixture
def write(tmp_path):
    def write(content, name="own.json"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return write


def say(*texts, **options) -> Conversation:
    roles = ("user", "assistant")
    return Conversation(tuple(Message(roles[n % 2], t) for n, t in enumerate(texts)), **options)


def decoded(path, conversation) -> list[tuple[str, str]]:
    tokenizer = golden_tokenizer()
    turns = load_template(path).format(tokenizer).encode(conversation).turns
    return [
        tuple(tokenizer.decode(ids, skip_special_tokens=False) for ids in turn[:2])
        for turn in turns
    ]


def test_a_file_anywhere_is_a_template(write):
    assert decoded(write(OWN), say("a", "b", "c", "d", system="Be brief.")) == [
        ("<s>System: Be brief.\nQ0: a\nA:", "b</s>"),
        ("\nQ1: c\nA:", "d</s>"),
    ]


def test_a_file_without_keys_is_the_messages_with_eos(write):
    assert decoded(write({}), say("a", "b")) == [("a", "b</s>")]


def test_a_template_extends_one_that_comes_with_the_package(write):
    path = write({"extends": "qwen", "default_system": "You are Bob."})
    ((source, target),) = decoded(path, say("a", "b"))
    assert source.startswith("<|im_start|>system\nYou are Bob.<|im_end|>\n")
    assert target == "b<|im_end|>"


def test_a_template_extends_a_file_beside_it(write):
    write(OWN, "parent.json")
    path = write({"extends": "parent.json", "separator": [" || "]})
    assert decoded(path, say("a", "b", "c", "d"))[1][0] == " || Q1: c\nA:"


def test_a_tool_format_beside_a_template_writes_its_tools(write):
    write(
        "{% macro describe(tools) %}[{{ tools[0].name }}]{% endmacro %}"
        "{% macro call(calls, text) %}{{ text }}!{{ calls[0].name }}{% endmacro %}"
        "{% macro observe(content) %}<{{ content }}>{% endmacro %}",
        "mine.jinja",
    )
    path = write({**OWN, "tool_format": "mine.jinja"})
    assert decoded(path, conversations()["tools"]) == [
        ("<s>System: [get_weather]\nQ0: Is it cold in Beijing?\nA:", "!get_weather</s>"),
        ('\nQ1: <{"temperature": 3}>\nA:', "Yes, 3 degrees.</s>"),
    ]


def test_the_separator_of_answers_goes_with_what_stands_around_them(write):
    call = Message("function", json.dumps([{"name": "f", "arguments": {}}] * 2))
    seen = Message("observation", " r\ns", answers=(" r", "s"))
    conversation = Conversation((Message("user", "a"), call, seen, Message("assistant", "b")))
    own = {"extends": "qwen2.5", "observation": ["<{{content}}>"], "trim": True}
    assert decoded(write(own), conversation)[1][0] == "<r\ns>"
    own["observation_separator"] = "><"
    assert decoded(write(own), conversation)[1][0] == "<r><s>"


def test_placeholders_in_a_message_are_text(write):
    conversation = say("{{content}} {{round}}", "{{content}}", system="{{round}}")
    assert decoded(write(OWN), conversation) == [
        ("<s>System: {{round}}\nQ0: {{content}} {{round}}\nA:", "{{content}}</s>")
    ]


def test_each_item_is_tokenized_by_itself(write):
    """As ModelLink does: the same text has the same tokens wherever it stands."""
    tokenizer = golden_tokenizer()
    path = write({"user": ["the", "the {{content}}"]})
    (turn,) = load_template(path).format(tokenizer).encode(say("day", "x")).turns
    pieces = tokenizer.encode_batch(["the", "the day"], add_special_tokens=False)
    assert turn.source == [*pieces[0], *pieces[1]]


def test_the_default_system_text_stands_where_a_conversation_has_none_or_an_empty_one(write):
    path = write({**OWN, "default_system": "Default."})
    for system in (None, ""):
        assert decoded(path, say("a", "b", system=system))[0][0].startswith("<s>System: Default.")


def test_force_system_writes_the_system_part_without_a_text(write):
    path = write({**OWN, "force_system": True})
    assert decoded(path, say("a", "b"))[0][0] == "<s>System: \nQ0: a\nA:"


def test_a_message_that_is_not_learned_is_marked(write):
    answer = Message("assistant", "b", learned=False)
    conversation = Conversation((Message("user", "a"), answer))
    turns = load_template(write(OWN)).format(golden_tokenizer()).encode(conversation)
    assert [turn.learned for turn in turns.turns] == [False]


def test_a_conversation_without_the_last_answer_is_refused():
    chat = load_template("default").format(golden_tokenizer())
    with pytest.raises(RecordError, match="ends without an answer"):
        chat.encode(say("a"))


def test_a_template_without_tools_refuses_them(write):
    chat = load_template(write(OWN)).format(golden_tokenizer())
    with pytest.raises(RecordError, match="template own has no form for tools"):
        chat.encode(conversations()["tools"])
    call = Message("function", '{"name": "f", "arguments": {}}')
    with pytest.raises(RecordError, match="template own has no form for calls of tools"):
        chat.encode(Conversation((Message("user", "a"), call)))


def test_an_unknown_name_lists_the_names():
    with pytest.raises(UsageError, match=r"--prompt-type lama3: .*did you mean .?llama3") as error:
        load_template("lama3")
    assert all(name in str(error.value) for name in names())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        pytest.param("[" * 100_000, "not valid JSON", id="deep"),
        ("[]", "not a JSON object"),
        ({"usr": []}, "unknown key 'usr'.*user"),
        ({"user": "x {{content}}"}, 'user is "x .*must be a list of items'),
        ({"user": ["x"]}, r"user is \[\"x\"\], must be texts with {{content}} in one"),
        ({"user": ["{{content}}{{idx}}"]}, r"with no placeholder but {{content}} and {{round}}"),
        ({"prefix": ["{{content}}"]}, "prefix .*with no placeholder$"),
        ({"prefix": [{"special": "pad"}]}, "prefix is .*must be a list of texts"),
        ({"prefix": [{"token": "a", "id": 1}]}, "must be a list of texts"),
        ({"trim": 1}, "trim is 1, must be true or false"),
        ({"stop_words": "x"}, "stop_words is .*must be a list of texts"),
        ({"default_system": 3}, "default_system is 3, must be text"),
        ({"system_in": "back"}, "system_in is .*one of front, first_question, last_question"),
        ({"thinking": {"start": "<think>"}}, 'thinking is .*must be {"start": text, "end": text}'),
        ({"replace_eos": True}, "replace_eos needs stop_words"),
        ({"extends": "nobody"}, "extends 'nobody', of which there is none"),
        ({"extends": "own.json"}, "extends 'own.json', which extends it"),
        ({"extends": 7}, "extends is 7, must be the name"),
        ({"tool_format": "none.jinja"}, "tool format .*none.jinja: No such file"),
        ({"tool_format": "own.json"}, "own.json: defines no macro describe and no macro call"),
        (
            {"system_in": "first_question", "system": [{"special": "bos"}, "{{content}}"]},
            "system must be text only",
        ),
    ],
)
def test_a_malformed_file_is_named_with_what_would_be_right(write, tmp_path, content, message):
    path = write(content)
    with pytest.raises(UsageError, match=message) as error:
        load_template(path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"gone.json: No such file"):
        load_template(str(tmp_path / "gone.json"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"special_tokens": ["<|x|>", "<|im_end|>", "<|y|>"]}, r"needs <\|x\|> <\|y\|>;.*has no"),
        ({"prefix": [{"token": "<|x|>"}]}, r"needs <\|x\|>; tokenizer .* has no such token"),
        ({"stop_words": ["<|x|>"], "replace_eos": True}, r"needs <\|x\|>"),
    ],
)
def test_a_token_that_the_tokenizer_lacks_is_named(write, keys, message):
    with pytest.raises(UsageError, match=f"template own {message}"):
        load_template(write(keys)).format(golden_tokenizer())


def test_a_tokenizer_without_eos_or_bos_is_told_from_the_template(write, tmp_path):
    shutil.copy(TOKENIZER / "tokenizer.json", tmp_path)
    bare = load_tokenizer(tmp_path)
    assert (bare.bos, bare.eod) == (None, None)
    with pytest.raises(UsageError, match="template default needs a token that ends a text"):
        load_template("default").format(bare)
    own = write({"extends": "qwen", "prefix": [{"special": "bos"}]})
    with pytest.raises(UsageError, match="template own needs a token that begins a text"):
        load_template(own).format(bare)
    assert load_template("qwen").format(bare).eos == bare.token_id("<|im_end|>")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
ITEMS = st.lists(
    st.text(max_size=8)
    | st.sampled_from(["{{content}}", {"special": "eos"}, {"token": "<s>"}, {"token": 1}])
    | JSON,
    max_size=3,
)
KEYS = [field.name for field in fields(Template)] + ["extends"]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(KEYS), ITEMS | JSON, max_size=4))
def test_any_json_is_a_template_or_a_usage_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(content))
    with contextlib.suppress(UsageError, RecordError):
        load_template(str(path)).format(golden_tokenizer()).encode(conversations()["system"])


def test_importing_templates_imports_no_library():
    run = [sys.executable, "-c", "import sys, ml_data.templates; print(*sys.modules)"]
    imported = subprocess.run(run, capture_output=True, text=True, check=True).stdout.split()
    heavy = {"jinja2", "tokenizers", "transformers", "torch", "sentencepiece", "pyarrow"}
    assert not heavy & {name.partition(".")[0] for name in imported}


def test_every_kind_of_tokenizer_can_be_given_a_template(bpe, sentencepiece_model, tmp_path):
    """Also where nothing but the template's own texts is in a conversation."""
    path = tmp_path / "slow"
    shutil.copytree(bpe, path)
    (path / "tokenizer.json").rename(path / "x.json")
    content = json.loads((path / "x.json").read_text())
    (path / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    merges = [
        pair if isinstance(pair, str) else " ".join(pair) for pair in content["model"]["merges"]
    ]
    (path / "merges.txt").write_text("\n".join(merges))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    for directory in (bpe, sentencepiece_model, path):
        chat = load_template("empty").format(load_tokenizer(directory))
        assert [turn[:2] for turn in chat.encode(say("", "")).turns] == [([], [])]
        assert chat.encode(say("a", "b")).turns[0].target
