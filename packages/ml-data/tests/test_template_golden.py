"""Every template, token for token, against what others make of the same conversations.

The golden files were written by ModelLink's own code, by published chat templates, or by hand
(`origin` says which), never by the code under test.
"""

from __future__ import annotations

import json
from functools import cache

import pytest
from golden_conversations import GOLDEN, conversations, golden_tokenizer

from ml_data.instruction.conversation import Conversation, Message
from ml_data.instruction.turns import IGNORED
from ml_data.templates import load_template, names
from ml_data.tokenizer import load_tokenizer

REAL = json.loads((GOLDEN / "real_tokenizers.json").read_text())["tokenizers"]
MODELLINK = {"alpaca", "chatglm2", "chatglm3", "chatglm3_system", "chatml", "chatml_de"} | {
    *("default", "empty", "gemma", "glm4", "llama2", "llama3", "mistral", "mixtral", "qwen")
}
DEEPSEEK_EOS = "<\uff5cend\u2581of\u2581sentence\uff5c>"


@cache
def read(name: str) -> dict:
    return json.loads((GOLDEN / "templates" / f"{name}.json").read_text(encoding="utf-8"))


CASES = [(name, case) for name in names() for case in read(name)["cases"]]


def test_the_templates_of_modellink_are_there():
    assert {*names()} >= MODELLINK


@pytest.mark.parametrize(("name", "case"), CASES)
def test_template_gives_the_golden_tokens(name, case):
    golden = read(name)["cases"][case]
    turns = load_template(name).format(golden_tokenizer()).encode(conversations()[case])
    assert [[turn.source, turn.target] for turn in turns.turns] == golden["ids"]
    assert list(turns.end) == golden["end"]
    assert [turn.source_label for turn in turns.turns] == golden["source_labels"]


@pytest.mark.parametrize("name", names())
def test_golden_texts_are_those_of_the_golden_tokens(name):
    tokenizer = golden_tokenizer()
    for case in read(name)["cases"].values():
        decoded = [
            [tokenizer.decode(ids, skip_special_tokens=False) for ids in turn]
            for turn in case["ids"]
        ]
        assert decoded == case["text"]


@pytest.mark.parametrize("name", [n for n in names() if load_template(n).efficient_eos])
def test_without_a_token_of_its_own_the_end_of_an_answer_is_the_label_of_what_follows(name):
    tokenizer = golden_tokenizer()
    turns = load_template(name).format(tokenizer).encode(conversations()["system"])
    assert [turn.source_label for turn in turns.turns] == [IGNORED, tokenizer.eod]
    assert turns.end == (tokenizer.eod,)


@pytest.mark.parametrize("name", ["qwen", "llama3", "gemma2"])
def test_the_stop_word_replaces_eos(name):
    tokenizer = golden_tokenizer()
    template = load_template(name)
    assert template.format(tokenizer).eos == tokenizer.token_id(template.stop_words[0])


@pytest.mark.parametrize(
    ("asset_name", "name"), [(asset, name) for asset in REAL for name in REAL[asset]]
)
def test_template_gives_the_tokens_of_the_real_tokenizer(asset, asset_name, name):
    tokenizer = load_tokenizer(asset(asset_name))
    for case, expected in REAL[asset_name][name].items():
        turns = load_template(name).format(tokenizer).encode(conversations()[case])
        ids = [id_ for turn in turns.turns for id_ in (*turn.source, *turn.target)]
        assert [*ids, *turns.end] == expected, case


PUBLISHED = {
    "deepseek3": "deepseek_r1_distill",
    "gemma2": "gemma",
    "gemma3": "gemma3",
    "llama3.1": "llama3_2",
    "phi3": "phi3",
    "qwen2.5": "qwen2_5",
    "qwen3": "qwen3",
    "qwen3_nothink": "qwen3_instruct_2507",
}


@pytest.mark.parametrize(("name", "published"), PUBLISHED.items())
def test_template_writes_the_text_of_the_published_one(asset, name, published):
    """transformers renders the model's own Jinja template."""
    from transformers.utils.chat_template_utils import render_jinja_template

    source = (asset("chat-templates") / f"{published}.jinja").read_text(encoding="utf-8")
    tokenizer = golden_tokenizer()
    for case in read(name)["cases"]:
        conversation = conversations()[case]
        text = render_jinja_template(
            [_openai(conversation)],
            tools=_tools(conversation),
            chat_template=source.replace(DEEPSEEK_EOS, "</s>"),
            bos_token="<s>",
            eos_token="<|endoftext|>" if name == "phi3" else "</s>",
            date_string="26 Jul 2024",
        )[0][0]
        turns = load_template(name).format(tokenizer).encode(conversation)
        ids = [id_ for turn in turns.turns for id_ in (*turn.source, *turn.target)]
        assert tokenizer.decode([*ids, *turns.end], skip_special_tokens=False) == text, case


@pytest.mark.parametrize("text", ["", "Well."])
@pytest.mark.parametrize("last", ["call", "answer"])
def test_thoughts_before_calls_of_tools_are_those_of_the_published_template(asset, text, last):
    """Those before the last question are forgotten, like those of any answer."""
    from transformers.utils.chat_template_utils import render_jinja_template

    call = {"name": "f", "arguments": {"a": 1}}
    thought = "<think>\nf knows.\n</think>\n\n" + text
    function = Message("function", json.dumps({"content": thought, "tool_calls": [call]}))
    turn = [Message("user", "Q"), function, Message("observation", "r"), Message("assistant", "A")]
    conversation = Conversation((*turn, *(turn[:2] if last == "call" else turn)))
    openai = _openai(conversation)
    for message in openai:
        if "tool_calls" in message:
            calls = [{"type": "function", "function": call}]
            message.update(content=thought, tool_calls=calls)
    source = (asset("chat-templates") / "qwen3.jinja").read_text(encoding="utf-8")
    expected = render_jinja_template([openai], chat_template=source)[0][0]
    tokenizer = golden_tokenizer()
    turns = load_template("qwen3").format(tokenizer).encode(conversation)
    ids = [id_ for turn in turns.turns for id_ in (*turn.source, *turn.target)]
    assert tokenizer.decode(ids, skip_special_tokens=False) == expected


@pytest.mark.parametrize("last", ["call", "answer"])
@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "qwen3_nothink"])
def test_answers_of_several_tools_stand_apart_as_in_the_published_template(asset, name, last):
    from transformers.utils.chat_template_utils import render_jinja_template

    calls = [{"name": "f", "arguments": {"a": number}} for number in (1, 2)]
    function = Message("function", json.dumps(calls))
    seen = Message("observation", "r\ns", answers=("r", "s"))
    turns = (Message("user", "Q"), function, seen, function if last == "call" else _ANSWER)
    openai = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        *({"role": "tool", "content": answer} for answer in seen.answers),
        {"role": "assistant", "content": "", "tool_calls": calls}
        if last == "call"
        else {"role": "assistant", "content": _ANSWER.content},
    ]
    source = (asset("chat-templates") / f"{PUBLISHED[name]}.jinja").read_text(encoding="utf-8")
    expected = render_jinja_template([openai], chat_template=source)[0][0]
    tokenizer = golden_tokenizer()
    encoded = load_template(name).format(tokenizer).encode(Conversation(turns)).turns
    ids = [id_ for turn in encoded for id_ in (*turn.source, *turn.target)]
    assert tokenizer.decode(ids, skip_special_tokens=False) == expected


_ANSWER = Message("assistant", "A")


def _openai(conversation) -> list[dict]:
    messages = [{"role": "system", "content": conversation.system}] if conversation.system else []
    for message in conversation.messages:
        if message.role == "function":
            call = {"type": "function", "function": json.loads(message.content)}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        else:
            role = "tool" if message.role == "observation" else message.role
            messages.append({"role": role, "content": message.content})
    return messages


def _tools(conversation) -> list[dict] | None:
    if conversation.tools is None:
        return None
    return [{"type": "function", "function": tool} for tool in json.loads(conversation.tools)]
