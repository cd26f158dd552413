r"""Text to sentences, by a rule that needs no data and no language.

A sentence ends
- after `. ! ? …` (and closing quotes or brackets) where white space follows and then something
  that is not a small letter, unless the word before a `.` is an abbreviation or one capital letter;
- after the wide stop, exclamation and question marks of Chinese and Japanese (and closing quotes or
  brackets), whatever follows;
- at an empty line, which ends headings and paragraphs.

Megatron-LM and ModelLink ask NLTK's Punkt, whose tables are trained for a language and downloaded;
its sentences differ from these now and then.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_CLOSING = "\"')\\]}»”\u2019」』\uff09】》"
_END = re.compile(
    rf"(?P<wide>[。\uff01\uff1f]+[{_CLOSING}]*)|(?P<narrow>[.!?…]+[{_CLOSING}]*)|(?P<empty>\n[^\S\n]*\n)"
)
_SPACE = re.compile(r"\s*")
_LAST_WORD = re.compile(r"[\w.]+$")
_LONGEST_WORD = 16
_SHORT = """
al approx b c ca capt cf col dept dr e.g ed eds eq eqs etc fig figs gen gov i.e inc jr lt ltd
maj messrs mr mrs ms mt no nos p pp prof ref refs rep rev sec sen sgt sr st vol vols vs
jan feb mar apr jun jul aug sep sept oct nov dec
"""
_ABBREVIATIONS = frozenset(_SHORT.split())


def split_sentences(text: str, *, keep_newlines: bool = False) -> list[str]:
    """Return the sentences of a text.

    The white space between them is left out; with `keep_newlines` it stays at the end of the
    sentence before, and the sentences together are the text.
    """
    ends = [*_ends(text), len(text)]
    pieces = [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    if not keep_newlines:
        pieces = [piece.strip() for piece in pieces]
    return [piece for piece in pieces if piece]


def _ends(text: str) -> Iterator[int]:
    """Yield where sentences end, behind the white space that follows them."""
    position = following = 0
    for match in _END.finditer(text):
        if match.start() < following:  # an empty line in white space that was passed over
            continue
        space = _SPACE.match(text, match.end())
        following = space.end() if space else match.end()
        if match.lastgroup == "narrow" and not _ends_sentence(text, match, following):
            continue
        if text[position : match.end()].strip():
            position = following
            yield position


def _ends_sentence(text: str, match: re.Match[str], following: int) -> bool:
    """Return whether one of `. ! ? …` ends a sentence, which goes on at `following`."""
    if following == match.end() or text[following : following + 1].islower():
        return False
    if match.group() != ".":
        return True
    word = _LAST_WORD.search(text[max(0, match.start() - _LONGEST_WORD) : match.start()])
    if word is None:
        return True
    initial = len(word.group()) == 1 and word.group().isupper()
    return not initial and word.group().lower() not in _ABBREVIATIONS
