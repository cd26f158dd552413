"""The Jinja template that comes with a tokenizer: where it is, what it is given, what it writes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ml_data.instruction.conversation import Conversation, Message, RecordError
from ml_data.templates.sandbox import FAILURES, Marks, environment, new_marks, to_json
from ml_data.templates.tool_format import read_calls, read_tools
from ml_models.flags import UsageError

Json = dict[str, Any]


class Rendered(NamedTuple):
    """A conversation as text."""

    text: str
    generated: tuple[tuple[int, int], ...]
    """Beginning and end of what the template marks as written by the model; most mark nothing."""


@dataclass(frozen=True)
class ChatTemplate:
    """A template, ready to render."""

    path: Path
    templates: Mapping[str, Any]
    """By name: `default`, and `tool_use` where there is one for conversations with tools."""
    special_tokens: Mapping[str, str]
    """`bos_token` and others, as the template names them."""
    marks: Marks

    def render(
        self, messages: Sequence[Json], tools: Sequence[Json] | None, *, ask: bool = False
    ) -> Rendered:
        """Return messages as text; with `ask`, what makes the model answer comes last.

        Raises:
            RecordError: The template refuses them.
        """
        import jinja2

        name = "tool_use" if tools and "tool_use" in self.templates else "default"
        try:
            text = self.templates[name].render(
                messages=messages, tools=tools, add_generation_prompt=ask, **self.special_tokens
            )
        except RecordError:
            raise
        except (jinja2.TemplateError, *FAILURES) as error:
            raise RecordError(f"the chat template fails: {error}") from error
        return _unmark(text, self.marks)


def read_chat_template(directory: Path) -> ChatTemplate:
    """Read the template in a tokenizer's directory, as transformers finds it.

    Raises:
        UsageError: There is none, or it is not Jinja.
    """
    import jinja2

    config = _read_json(directory / "tokenizer_config.json")
    named = {**_read_json(directory / "special_tokens_map.json"), **config}
    path, sources = _sources(directory, config)
    marks = new_marks()
    jinja = environment(marks)
    try:
        templates = {name: jinja.from_string(source) for name, source in sources.items()}
    except jinja2.TemplateError as error:
        raise UsageError(f"{path}: the chat template is not Jinja ({error})") from error
    if "default" not in templates:
        raise UsageError(f"{path}: no chat template is named default, only {', '.join(sources)}")
    tokens = {name: _spelling(token) for name, token in named.items() if name.endswith("_token")}
    known = {name: token for name, token in tokens.items() if token is not None}
    return ChatTemplate(path, templates, known, marks)


def _sources(directory: Path, config: Json) -> tuple[Path, dict[str, str]]:
    """Return where the templates are, and each by its name."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        others = sorted((directory / "additional_chat_templates").glob("*.jinja"))
        named = {path.stem: _read_text(path) for path in others}
        return file, {**named, "default": _read_text(file)}
    for path, content in (
        (directory / "tokenizer_config.json", config),
        (directory / "chat_template.json", _read_json(directory / "chat_template.json")),
    ):
        source = content.get("chat_template")
        if isinstance(source, str):
            return path, {"default": source}
        if isinstance(source, list):
            return path, dict(_named(path, entry) for entry in source)
    raise UsageError(
        f"--hf-chat-template: tokenizer {directory} comes with no chat template "
        "(chat_template.jinja, or chat_template in tokenizer_config.json); choose a --prompt-type"
    )


def _named(path: Path, entry: Any) -> tuple[str, str]:
    match entry:
        case {"name": str(name), "template": str(template)}:
            return name, template
    raise UsageError(f"{path}: chat_template must be a list of objects with name and template")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except ValueError as error:
        raise UsageError(f"{path}: not UTF-8 ({error})") from error


def _read_json(path: Path) -> Json:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: not a JSON object")
    return content


def _spelling(token: Any) -> str | None:
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _unmark(text: str, marks: Marks) -> Rendered:
    """Take the marks out of a text."""
    plain, spans = "", []
    while marks.start in text:
        before, _, rest = text.partition(marks.start)
        inside, _, text = rest.partition(marks.end)
        spans.append((len(plain) + len(before), len(plain) + len(before) + len(inside)))
        plain += before + inside
    return Rendered(plain + text, tuple(spans))


# What a template is given.


class CallForm(NamedTuple):
    """What published templates do not agree on in messages that call tools."""

    no_text: str | None
    """The content of a message that is nothing but calls."""
    text_arguments: bool
    """Arguments are JSON in a string, not an object."""


CALL_FORMS = (
    CallForm("", text_arguments=False),
    CallForm(None, text_arguments=False),
    CallForm("", text_arguments=True),
    CallForm(None, text_arguments=True),
)


def messages_of(conversation: Conversation, form: CallForm) -> list[Json]:
    """Return a conversation as transformers' chat templates read it."""
    messages: list[Json] = []
    if conversation.system:
        messages.append({"role": "system", "content": conversation.system})
    calls = 0
    ids: list[str] = []  # of the calls that are answered next
    for message in conversation.messages:
        if message.role == "function":
            messages.append(_calling(message, calls, form))
            ids = [call["id"] for call in messages[-1]["tool_calls"]]
            calls += len(ids)
        elif message.role == "observation":
            answers = itertools.zip_longest(message.observed, ids[: len(message.observed)])
            messages += [
                {"role": "tool", "content": content, "tool_call_id": id_ or ""}
                for content, id_ in answers
            ]
        else:
            messages.append({"role": message.role, "content": message.content})
    return messages


def tools_of(conversation: Conversation) -> list[Json] | None:
    """Return the tools of a conversation as transformers' chat templates read them."""
    if conversation.tools is None:
        return None
    functions = read_tools(conversation.tools)
    return [{"type": "function", "function": function} for function in functions] or None


def _calling(message: Message, earlier: int, form: CallForm) -> Json:
    """Return a message with calls, numbered after the `earlier` ones."""
    calls, text = read_calls(message.content)
    if form.text_arguments:
        calls = [{**call, "arguments": to_json(call["arguments"])} for call in calls]
    return {
        "role": "assistant",
        "content": text or form.no_text,
        "tool_calls": [
            # Mistral's templates want nine letters or digits
            {"id": f"call{number:05}", "type": "function", "function": call}
            for number, call in enumerate(calls, earlier + 1)
        ],
    }
