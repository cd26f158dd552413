from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Optional

import pytest

from ml_models.hints import Text, convert, metavar, show, without_none


@pytest.mark.parametrize(
    ("hint", "given", "value"),
    [
        (int, "-3", -3),
        (float, "1e-5", 1e-5),
        (float, "inf", float("inf")),
        (str, "", ""),
        (Path, "a/b", Path("a/b")),
        (Literal["a", 2], "2", 2),
        (int | Literal["release"], "release", "release"),
        (int | Literal["release"], "7", 7),
        (tuple[int, ...], ["1,2", "3"], (1, 2, 3)),
        (tuple[int, ...], [""], ()),
        (tuple[str, ...], ["a b,c"], ("a b", "c")),
        (tuple[str, ...], ["a,", "b"], ("a", "b")),
        (tuple[str, ...], [" a , b ,, c"], ("a", "b", "c")),
        (tuple[Path, ...], ["a,", "b"], (Path("a"), Path("b"))),
        (tuple[int, ...], [" 1, 2", "3 "], (1, 2, 3)),
        (tuple[Text, ...], ["a b,c", ""], ("a b,c", "")),
        (tuple[Literal["x", "y"], ...], ["x", "y"], ("x", "y")),
    ],
)
def test_words_become_values(hint: Any, given: Any, value: object) -> None:
    converted = convert(hint, given)
    assert converted == value
    assert type(converted) is type(value)


@pytest.mark.parametrize(
    ("hint", "given", "message"),
    [
        (int, "1.5", "^'1.5' is not an integer$"),
        (float, "NaN", "^'NaN' is not a number$"),
        (Path, "", "^'' is not a path$"),
        (tuple[int, ...], ["1", "x"], "^'x' is not an integer$"),
        (tuple[int, ...], ["1,"], "^'' is not an integer$"),
        (tuple[str, ...], [",", " "], "^',  ' has nothing between its commas$"),
        (
            Literal["fast", "slow"],
            "fats",
            r"^'fats' is not one of fast, slow; did you mean fast\?$",
        ),
        (int | Literal["release"], "x", "'x' is not an integer and 'x' is not one of release"),
    ],
)
def test_other_words_are_refused(hint: Any, given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(hint, given)


def test_none_is_no_word() -> None:
    assert without_none(int | None) is int
    assert without_none(Optional[tuple[int, ...]]) == tuple[int, ...]  # noqa: UP045
    assert without_none(int | str | None) == int | str
    assert without_none(bool) is bool


def test_help_names_the_type() -> None:
    assert metavar(tuple[Path, ...]) == "PATH"
    assert metavar(int | Literal["release"]) == "INT|{release}"


@pytest.mark.parametrize("hint", [dict, list[int], tuple[int, int], tuple[int], object, bytes])
def test_types_without_a_flag_are_refused(hint: Any) -> None:
    with pytest.raises(TypeError, match="no flag can be"):
        metavar(hint)


def test_defaults_are_shown_as_written() -> None:
    values = [True, False, (), (1, 2), 1e-5, Path("x"), "text"]
    assert [*map(show, values)] == ["on", "off", "none", "1 2", "1e-05", "x", "text"]
