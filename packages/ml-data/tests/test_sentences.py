from __future__ import annotations

import random
import time

import pytest

from ml_data.pretraining.sentences import split_sentences


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("A pause ... and on. It ends.", ["A pause ... and on.", "It ends."]),
        ('He said "Go." Then he went.', ['He said "Go."', "Then he went."]),
        ("(In brackets.) After.", ["(In brackets.)", "After."]),
        ("Dr. Who met Mr. J. R. Smith, cf. Fig. 3. He left.",
         ["Dr. Who met Mr. J. R. Smith, cf. Fig. 3.", "He left."]),
        ("Version 3.11 costs 1.50. 2 of them.", ["Version 3.11 costs 1.50.", "2 of them."]),
        ("a line\nthat goes on. And\nanother.", ["a line\nthat goes on.", "And\nanother."]),
        ("Heading\n\nText below", ["Heading", "Text below"]),
        ("End.\n\n\nNext", ["End.", "Next"]),
        ("春眠不觉晓。处处闻啼鸟\uff01夜来风雨声\uff1f“花落。”知多少",
         ["春眠不觉晓。", "处处闻啼鸟\uff01", "夜来风雨声\uff1f", "“花落。”", "知多少"]),
        ("Really?! Yes… No", ["Really?!", "Yes…", "No"]),
        ("", []),
        (" \n\n\t ", []),
        (".", ["."]),
        ("...", ["..."]),
    ],
)  # fmt: skip
def test_sentences_end_where_a_reader_ends_them(text, sentences):
    assert split_sentences(text) == sentences


def test_white_space_stays_with_the_sentence_before_if_it_is_kept():
    text = "  One.  Two\n\nThree! \n"
    assert split_sentences(text) == ["One.", "Two", "Three!"]
    assert split_sentences(text, keep_newlines=True) == ["  One.  ", "Two\n\n", "Three! \n"]


def test_nothing_is_lost(texts):
    chosen = random.Random(0)
    noise = ["".join(chosen.choices(".!?…。 \n\n\"')aAé北", k=80)) for _ in range(500)]
    for text in [*texts, *noise]:
        assert "".join(split_sentences(text, keep_newlines=True)) == text
        words = [word for sentence in split_sentences(text) for word in sentence.split()]
        assert "".join(words) == "".join(text.split())


@pytest.mark.parametrize(
    "text", ["." * 10**6, "\n" * 10**6, "\n " * 10**6, ". " * 10**6, "a" * 10**6]
)
def test_the_time_is_linear_in_the_length(text):
    begin = time.process_time()
    split_sentences(text)
    assert time.process_time() - begin < 10
