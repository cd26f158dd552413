"""The texts of a record for pre-training: its columns, or one text made of several of them.

The texts that ModelLink's handlers make, with one difference: a record without an input has no
section for it, where theirs says `###None`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from ml_data.reading import text_of

PretrainHandler = Literal[
    "GeneralPretrainHandler", "AlpacaPretrainHandler", "StackOverflowPythonPretrainHandler"
]
"""ModelLink's names. The first takes columns as they are; the others make the column `text`."""

MADE = "text"
"""The column that handlers make."""

_ASSISTANT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
_ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
)


def made_text(handler: PretrainHandler) -> Callable[[dict[str, Any]], dict[str, Any]] | None:
    """Return what makes a record of its texts from a record, None if it has them already.

    The function raises RecordError where a column is missing.
    """
    return _HANDLERS[handler]


def _alpaca(record: dict[str, Any]) -> dict[str, Any]:
    instruction, response = text_of(record, "instruction"), text_of(record, "output")
    given = text_of(record, "input") if record.get("input") is not None else ""
    asked = f"### Instruction:\n{instruction}\n\n"
    asked += f"### Input:\n{given}\n\n" if given else ""
    return {MADE: f"{_ASSISTANT}USER: {_ALPACA}{asked}### Response: ASSISTANT: {response}"}


def _stack_overflow(record: dict[str, Any]) -> dict[str, Any]:
    title, question, answer = (
        text_of(record, column) for column in ("title", "question_body", "answer_body")
    )
    return {MADE: f"In python, {title}\n### Question:\n{question}\n### Response:\n{answer}\n"}


_HANDLERS: dict[PretrainHandler, Callable[[dict[str, Any]], dict[str, Any]] | None] = {
    "GeneralPretrainHandler": None,
    "AlpacaPretrainHandler": _alpaca,
    "StackOverflowPythonPretrainHandler": _stack_overflow,
}
