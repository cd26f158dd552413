"""Jinja as chat templates use it, without letting them do anything but write text.

The environment that transformers renders chat templates in: the same syntax, the same functions.
`{% generation %}...{% endgeneration %}`, which marks what the model writes, puts `marks` around it.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from ml_data.instruction.conversation import RecordError

if TYPE_CHECKING:
    from jinja2.ext import Extension
    from jinja2.nodes import Node
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment


FAILURES = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What a template can cause besides jinja2.TemplateError."""


class Marks(NamedTuple):
    """What surrounds a text; nobody else writes it."""

    start: str
    end: str


def new_marks() -> Marks:
    """Return marks that no text has."""
    random = secrets.token_hex(16)
    return Marks(f"<{random}>", f"</{random}>")


def environment(marks: Marks = Marks("", "")) -> ImmutableSandboxedEnvironment:  # noqa: B008
    """Return the environment. Templates in it raise RecordError with `raise_exception`."""
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _generation(marks)]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    return environment


def _generation(marks: Marks) -> type[Extension]:
    from jinja2.ext import Extension
    from jinja2.nodes import CallBlock

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 (as jinja declares it)

        def parse(self, parser: Parser) -> Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Callable[[], str]) -> str:
            return f"{marks.start}{caller()}{marks.end}"

    return Generation


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return `value` as JSON: jinja's own filter escapes what HTML cannot have."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(message: str) -> NoReturn:
    raise RecordError(f"the chat template refuses: {message}")


def _now(format_: str) -> str:
    """Write today's date, or that of SOURCE_DATE_EPOCH (seconds), which makes runs repeatable."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    moment = datetime.fromtimestamp(int(epoch), timezone.utc) if epoch else datetime.now()
    return moment.strftime(format_)
