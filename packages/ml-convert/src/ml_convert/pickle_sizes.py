"""Checking that a pickle asks for no more memory than it has bytes.

The unpickler makes room for as many remembered objects as the largest number an object is
remembered under, and a string says how long it is. Both are numbers in the file: five damaged bytes
would be enough to ask for gigabytes.
"""

from __future__ import annotations

import pickletools
from functools import cache

_REMEMBER = {"PUT", "BINPUT", "LONG_BINPUT"}


@cache
def _operations() -> tuple[dict[int, int], frozenset[int]]:
    """Return how long the argument of each operation is, and which of them remember objects.

    Lengths below zero are as in pickletools: of a line, or as the first 1, 4 or 8 bytes say.
    """
    lengths, remember = {}, set()
    for operation in pickletools.opcodes:
        code = ord(operation.code)
        lengths[code] = operation.arg.n if operation.arg else 0
        if operation.arg and operation.arg.name == "stringnl_noescape_pair":
            lengths[code] = _TWO_LINES
        if operation.name in _REMEMBER:
            remember.add(code)
    return lengths, frozenset(remember)


_TWO_LINES = -100
_COUNTED = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}


def check_sizes(content: bytes) -> None:
    """Check the numbers of a pickle, up to its end.

    Raises:
        ValueError: One is larger than the pickle has bytes, or it is cut short.
    """
    lengths, remember = _operations()
    place, size = 0, len(content)
    while place < size:
        code = content[place]
        if code == 0x2E:  # STOP
            return
        if code not in lengths:
            raise ValueError(f"byte {place} is no operation")
        start, length = place + 1, lengths[code]
        place = start + length if length >= 0 else _end(content, start, length)
        if place > size:
            raise ValueError(f"the argument of byte {start - 1} reaches beyond the end")
        if code in remember and _number(content[start:place], is_text=length < 0) > size:
            raise ValueError(f"byte {start - 1} remembers more objects than there are bytes")
    raise ValueError("it has no end")


def _end(content: bytes, start: int, length: int) -> int:
    """Find the end of an argument whose length is not fixed."""
    if length in _COUNTED:
        width = _COUNTED[length]
        return start + width + int.from_bytes(content[start : start + width], "little")
    for _ in range(2 if length == _TWO_LINES else 1):
        start = content.index(b"\n", start) + 1
    return start


def _number(argument: bytes, *, is_text: bool) -> int:
    return int(argument) if is_text else int.from_bytes(argument, "little")
