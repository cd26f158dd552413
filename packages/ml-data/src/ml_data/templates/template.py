r"""What a template says: what stands around each message, as data.

Everything is a list of items. Each item is tokenized by itself, and without a BOS or EOS of the
tokenizer's own, so that the same text has the same tokens wherever it stands:

| in the file | means |
|---|---|
| `"Human: {{content}}\n"` | text; `{{content}}` is the message, `{{round}}` counts from 0 |
| `{"token": "[gMASK]"}` | the token of that name, looked up in the vocabulary, not read as text |
| `{"special": "bos"}`, `{"special": "eos"}` | the tokenizer's own token of that role |

The tokens of a conversation are, turn after turn (separator from the second turn on):

    prefix system user | assistant    separator user | assistant    ...    suffix
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from ml_data.templates.encoding import TemplateFormat
    from ml_data.templates.thoughts import Thinking
    from ml_data.templates.tool_format import ToolFormat
    from ml_data.tokenizer import Tokenizer

PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")


@dataclass(frozen=True)
class Text:
    """Text, with places for what varies."""

    text: str

    @property
    def placeholders(self) -> set[str]:
        """Return the names of what varies."""
        return set(PLACEHOLDER.findall(self.text))

    def render(self, values: Mapping[str, str]) -> str:
        """Return the text with `values` in it; what looks like a placeholder in a value stays."""
        return PLACEHOLDER.sub(lambda match: values[match[1]], self.text)


@dataclass(frozen=True)
class Token:
    """A token by its name."""

    name: str


@dataclass(frozen=True)
class Special:
    """A token by its role."""

    role: Literal["bos", "eos"]


Items = tuple[Text | Token | Special, ...]
"""A part of a template."""

Place = Literal["front", "first_question", "last_question"]
"""Before everything, or inside a question of the user."""


@dataclass(frozen=True, kw_only=True)
class Template:
    """One file; the fields are its keys."""

    name: str
    """The name of the file."""
    about: str = ""
    """Which models have it, and where it was published."""
    prefix: Items = ()
    """Begins the conversation."""
    system: Items
    """The system text; nothing where there is none, unless `force_system`."""
    system_with_tools: Items
    """The same in a conversation that has tools."""
    user: Items
    observation: Items
    """What a tool answered."""
    observation_separator: str = "\n"
    """Between what several tools answered, where all of it stands in one `observation`."""
    assistant: Items
    function: Items
    """The model calls tools; the content is what the tool format makes of the calls."""
    separator: Items = ()
    """Between turns."""
    suffix: Items = ()
    """Ends the conversation."""
    tools: Items = ()
    """Descriptions of tools that stand by themselves, before the system text or a question. Without
    this they follow the system text, or begin the text of the question."""
    tools_in: Place = "front"
    tool_format: ToolFormat | None = None
    default_system: str = ""
    """The system text of conversations that have none."""
    system_in: Place = "front"
    """Inside a question, `system` with the system text begins the text of that question."""
    force_system: bool = False
    """Write `system` although there is no text for it."""
    trim: bool = False
    """Messages lose the white space around them."""
    thinking: Thinking | None = None
    stop_words: tuple[str, ...] = ()
    """Tokens that end an answer."""
    special_tokens: tuple[str, ...] = ()
    """What the texts of this template spell that must be one token each."""
    efficient_eos: bool = False
    """No token ends an answer: EOS is the label of what follows it, and the conversation's end."""
    replace_eos: bool = False
    """EOS is the first of `stop_words`, not the tokenizer's own."""

    def format(self, tokenizer: Tokenizer) -> TemplateFormat:
        """Return what encodes conversations with this template and `tokenizer`.

        Raises:
            UsageError: The tokenizer lacks a token that the template needs.
        """
        from ml_data.templates.encoding import build_format

        return build_format(self, tokenizer)
