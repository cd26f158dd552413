"""Samples of a format whose tokens are letters, so that they can be written out by hand."""

from dataclasses import replace

import pytest

from ml_data.instruction.conversation import Conversation, Message, Preference
from ml_data.instruction.samples import LeftOutError, Limits, instruction_sample, preference_pair
from ml_data.instruction.turns import IGNORED, Turn, Turns


class Letters:
    """`S` and the system text, `Q` and a question, `A` and an answer; `.` ends an answer.

    With `efficient`, `.` follows the last answer only, and the `Q` after an answer has its label.
    """

    def __init__(self, *, efficient=False):
        self._efficient = efficient

    def encode(self, conversation):
        messages = conversation.messages
        system = f"S{conversation.system}" if conversation.system else ""
        turns = []
        for number in range(0, len(messages), 2):
            source = f"{system if not number else ''}Q{messages[number].content}A"
            target = messages[number + 1].content + ("" if self._efficient else ".")
            label = ord(".") if self._efficient and number else IGNORED
            turns.append(Turn(ids(source), ids(target), messages[number + 1].learned, label))
        return Turns(tuple(turns), (ord("."),) if self._efficient else ())


def ids(text):
    return [ord(letter) for letter in text]


def shown(sample):
    """Return the tokens, and below each its label, `_` where there is none."""
    labels = "".join("_" if label == IGNORED else chr(label) for label in sample.labels)
    return "".join(map(chr, sample.input_ids)), labels


def talk(*contents, system=None, learned=None):
    roles = ("user", "assistant")
    learned = learned or [True] * len(contents)
    return Conversation(
        tuple(
            Message(roles[number % 2], content, learned[number])
            for number, content in enumerate(contents)
        ),
        system,
    )


def sample(conversation, *, efficient=False, **limits):
    return shown(instruction_sample(conversation, Letters(efficient=efficient), Limits(**limits)))


THREE = talk("ab", "cd", "ef", "gh", "ij", "kl", system="s")


def test_the_loss_sees_every_answer_and_nothing_else():
    assert sample(THREE) == ("SsQabAcd.QefAgh.QijAkl.", "______cd.____gh.____kl.")


def test_the_loss_sees_the_last_answer_only_where_that_is_asked():
    assert sample(THREE, last_answer_only=True) == (
        "SsQabAcd.QefAgh.QijAkl.",
        "____________________kl.",
    )


def test_the_loss_does_not_see_an_answer_of_weight_0():
    weighted = talk("ab", "cd", "ef", "gh", learned=[True, False, True, True])
    assert sample(weighted) == ("QabAcd.QefAgh.", "___________gh.")


def test_without_a_token_of_its_own_the_end_of_an_answer_is_learned_at_the_next_question():
    assert sample(THREE, efficient=True) == ("SsQabAcdQefAghQijAkl.", "______cd.___gh.___kl.")


def test_the_end_of_an_answer_that_is_not_learned_is_not_learned_either():
    weighted = talk("ab", "cd", "ef", "gh", learned=[True, False, True, True])
    assert sample(weighted, efficient=True) == ("QabAcdQefAgh.", "__________gh.")
    weighted = talk("ab", "cd", "ef", "gh", learned=[True, True, True, False])
    assert sample(weighted, efficient=True) == ("QabAcdQefAgh.", "____cd.______")


def test_the_end_of_text_ends_a_sample_and_is_learned():
    assert sample(talk("ab", "cd"), eod=ord("$")) == ("QabAcd.$", "____cd.$")


# Too long.


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (23, ("SsQabAcd.QefAgh.QijAkl.", "______cd.____gh.____kl.")),
        (22, ("SsQabAcd.QefAgh.", "______cd.____gh.")),
        (16, ("SsQabAcd.QefAgh.", "______cd.____gh.")),
        (15, ("SsQabAcd.", "______cd.")),
        (9, ("SsQabAcd.", "______cd.")),
        (8, ("SsQabAcd", "______cd")),
        (7, ("SsQabAc", "______c")),
    ],
)
def test_a_long_conversation_keeps_its_first_turns(length, expected):
    assert sample(THREE, seq_length=length) == expected


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (23, ("SsQabAcd.QefAgh.QijAkl.", "____________________kl.")),
        (22, ("SsQefAgh.QijAkl.", "_____________kl.")),
        (15, ("SsQijAkl.", "______kl.")),
        (8, ("SsQijAkl", "______kl")),
        (7, ("SsQijAk", "______k")),
    ],
)
def test_where_the_last_answer_counts_the_last_turns_are_kept_and_the_system_text(length, expected):
    assert sample(THREE, seq_length=length, last_answer_only=True) == expected


class AskedLast(Letters):
    """Writes the system text into the last question, as Mistral does."""

    def encode(self, conversation):
        *earlier, question, answer = conversation.messages
        asked = Message("user", f"{conversation.system}{question.content}")
        return super().encode(Conversation((*earlier, asked, answer)))


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (22, ("QabAcd.QefAgh.QsijAkl.", "____cd.____gh._____kl.")),
        (20, ("QabAcd.QsefAgh.", "____cd._____gh.")),
        (14, ("QsabAcd.", "_____cd.")),
        (7, ("QsabAcd", "_____cd")),
    ],
)
def test_what_is_left_is_written_like_a_conversation_that_ends_there(length, expected):
    assert shown(instruction_sample(THREE, AskedLast(), Limits(seq_length=length))) == expected


class Thinking(Letters):
    """Leaves out what earlier answers thought, which `>` ends, as Qwen 3 does."""

    def encode(self, conversation):
        *earlier, answer = conversation.messages
        said = [replace(message, content=message.content.split(">")[-1]) for message in earlier]
        return super().encode(Conversation((*said, answer)))


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (14, ("QabAcd.QefAgh.", "____cd.____gh.")),  # its first turn alone has 16 tokens
        (13, ("QabAthoughts>", "____thoughts>")),
    ],
)
def test_whole_turns_are_kept_although_fewer_turns_are_more_tokens(length, expected):
    talked = talk("ab", "thoughts>cd", "ef", "gh", "ij", "thoughts>kl")
    assert shown(instruction_sample(talked, Thinking(), Limits(seq_length=length))) == expected


@pytest.mark.parametrize("last_answer_only", [False, True])
def test_a_conversation_of_many_turns_is_not_encoded_once_for_each(last_answer_only):
    encoded = []

    class Counting(Letters):
        def encode(self, conversation):
            encoded.append(len(conversation.messages))
            return super().encode(conversation)

    limits = Limits(seq_length=70, last_answer_only=last_answer_only)
    kept = instruction_sample(talk(*["ab", "cd"] * 500), Counting(), limits)
    assert len(kept.input_ids) == 70
    assert len(encoded) < 15


def test_what_is_cut_says_so():
    limits = Limits(seq_length=16)
    assert instruction_sample(THREE, Letters(), limits).cut
    assert not instruction_sample(talk("ab", "cd"), Letters(), limits).cut


def test_the_end_of_a_cut_answer_is_not_learned():
    kept = sample(talk("ab", "cdefgh"), efficient=True, seq_length=7, eod=ord("$"))
    assert kept == ("QabAcde", "____cde")


def test_the_token_at_the_end_of_the_text_counts():
    assert sample(talk("ab", "cd", "ef", "gh"), seq_length=14, eod=ord("$")) == (
        "QabAcd.$",
        "____cd.$",
    )


def test_a_question_without_room_for_an_answer_is_left_out():
    with pytest.raises(LeftOutError, match="a question that leaves no room for an answer in 6 tok"):
        sample(THREE, seq_length=6)


def test_a_conversation_is_never_left_with_nothing_to_learn():
    """The turns that fit are not learned."""
    weighted = talk("ab", "cd", "ef", "gh", learned=[True, False, True, True])
    with pytest.raises(LeftOutError, match="no answer to learn"):
        sample(weighted, seq_length=10)


def test_long_conversations_are_left_out_where_that_is_asked():
    for last in (False, True):
        limits = {"on_too_long": "skip", "last_answer_only": last}
        assert sample(THREE, seq_length=23, **limits)[0] == "SsQabAcd.QefAgh.QijAkl."
        with pytest.raises(LeftOutError, match=r"^more than 22 tokens$"):
            sample(THREE, seq_length=22, **limits)


def test_a_kept_conversation_does_not_begin_with_what_a_tool_answered():
    messages = (
        Message("user", "ab"),
        Message("function", "cd"),
        Message("observation", "ef"),
        Message("assistant", "gh"),
        Message("user", "ij"),
        Message("assistant", "kl"),
    )
    tools = Conversation(messages)
    assert sample(tools, seq_length=20, last_answer_only=True)[0] == "QijAkl."


@pytest.mark.parametrize("length", range(2, 30))
def test_whatever_is_written_fits_and_has_a_label_after_the_first_token(length):
    for limits in ({}, {"last_answer_only": True}, {"eod": 36}, {"on_too_long": "skip"}):
        for efficient in (False, True):
            try:
                tokens, labels = sample(THREE, efficient=efficient, seq_length=length, **limits)
            except LeftOutError:
                continue
            assert len(tokens) == len(labels) <= length
            assert set(labels[1:]) != {"_"}


# Nothing to learn.


def test_an_empty_answer_or_question_is_left_out():
    with pytest.raises(LeftOutError, match="an empty answer"):
        sample(talk("ab", " \n"))
    with pytest.raises(LeftOutError, match="an empty question"):
        sample(talk("", "cd"))


def test_a_tool_may_answer_nothing():
    messages = [("user", "ab"), ("function", "cd"), ("observation", ""), ("assistant", "gh")]
    tools = Conversation(tuple(Message(*message) for message in messages))
    assert sample(tools)[0] == "QabAcd.QAgh."


# Preferences.


def pair(question, chosen, rejected, **limits):
    preference = Preference(
        question, Message("assistant", chosen, learned=False), Message("assistant", rejected)
    )
    found = preference_pair(preference, Letters(), Limits(**limits))
    return shown(found.chosen), shown(found.rejected)


def test_both_sides_of_a_preference_have_the_question_and_learn_their_answer_only():
    assert pair(talk("ab", "cd", "ef", system="s"), "gh", "xyz") == (
        ("SsQabAcd.QefAgh.", "_____________gh."),
        ("SsQabAcd.QefAxyz.", "_____________xyz."),
    )


def test_both_sides_of_a_preference_lose_the_same_turns():
    assert pair(talk("ab", "cd", "ef", system="s"), "gh", "xyz", seq_length=16) == (
        ("SsQefAgh.", "______gh."),
        ("SsQefAxyz.", "______xyz."),
    )


def test_the_longer_answer_of_a_preference_is_cut():
    assert pair(talk("ab"), "gh", "xyzxyz", seq_length=8) == (
        ("QabAgh.", "____gh."),
        ("QabAxyzx", "____xyzx"),
    )


@pytest.mark.parametrize(
    ("answers", "limits", "reason"),
    [
        (("gh", "gh"), {}, "the chosen answer is the rejected one"),
        (("ghx", "ghy"), {"seq_length": 6}, "answers that differ only after 6 tokens"),
        (("gh", "xyz"), {"seq_length": 4}, "a question that leaves no room"),
        (("gh", ""), {}, "an empty answer"),
        (("gh", "GH"), {}, "the chosen answer is the rejected one"),
        (("gh", "xyzxyz"), {"seq_length": 8, "on_too_long": "skip"}, "more than 8 tokens"),
    ],
    ids=["same", "late", "long", "empty", "case", "skip"],
)
def test_preferences_without_a_difference_to_learn_are_left_out(answers, limits, reason):
    """The template writes small letters only."""

    class Small(Letters):
        def encode(self, conversation):
            messages = [replace(m, content=m.content.lower()) for m in conversation.messages]
            return super().encode(Conversation(tuple(messages)))

    preference = Preference(talk("ab"), *(Message("assistant", answer) for answer in answers))
    with pytest.raises(LeftOutError, match=reason):
        preference_pair(preference, Small(), Limits(**limits))
