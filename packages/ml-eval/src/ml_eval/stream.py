"""Text as its tokens come: nothing shown too early, and nothing shown twice.

A token is not a piece of text: one Chinese character may take three tokens, and a tokenizer may
spell a token differently after another one. So the last few tokens are decoded together, and what
is new at the end of their text is shown, unless it ends in U+FFFD, which is how every tokenizer
decodes a character that is not complete yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_INCOMPLETE = "�"


class Detokenizer:
    """Turns a stream of ids into a stream of text."""

    def __init__(self, decode: Callable[[list[int]], str], context: Sequence[int] = ()) -> None:
        """Begin after a text.

        Args:
            decode: The tokenizer's; ids in, text out.
            context: Ids of the text before, so that the first word keeps the space before it.
        """
        self._decode = decode
        self._window = list(context)
        self._complete = len(self._window)
        self._shown = len(decode(self._window)) if self._window else 0

    def push(self, token: int) -> str:
        """Take a token; return the text that is certain now and was not before."""
        self._window.append(token)
        text = self._decode(self._window)
        end = len(text.rstrip(_INCOMPLETE))
        new = text[self._shown : end]
        if new:
            self._shown = end
            if end == len(text):
                self._move_window()
        return new

    def finish(self) -> str:
        """Return what was held back, after the last token."""
        text = self._decode(self._window)
        new, self._shown = text[self._shown :], len(text)
        return new

    def _move_window(self) -> None:
        """Drop tokens from the window up to the last place but this where the text was complete.

        Cut elsewhere it might begin within a character. What is left before new tokens is never
        empty, as a space at the start of a text may be dropped.
        """
        self._window = self._window[self._complete :]
        self._complete = len(self._window)
        self._shown = len(self._decode(self._window))


class StopText:
    """Ends a stream of text before any of some strings; holds back what may be the start of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False
        """Whether one of the strings has come up; nothing more comes then."""

    def push(self, text: str) -> str:
        """Take text; return what is certain to come before any of the strings."""
        if self.found:
            return ""
        text = self._held + text
        starts = [start for start in map(text.find, self._stops) if start >= 0]
        if starts:
            self._held, self.found = "", True
            return text[: min(starts)]
        end = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[end:]
        return text[:end]

    def finish(self) -> str:
        """Return what was held back, after the last text."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` are the beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
