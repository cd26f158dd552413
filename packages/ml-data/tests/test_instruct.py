from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import tokenizers
from sample_files import ALPACA, column, runner, samples, write

from ml_data.description import to_json
from ml_data.instruction.sample_info import info_path, read_sample_info
from ml_models.flags import UsageError

IGNORED = -100


@pytest.fixture(scope="module")
def backend(bpe):
    return tokenizers.Tokenizer.from_file(str(bpe / "tokenizer.json"))


@pytest.fixture
def instruct(bpe, tmp_path):
    return runner(bpe, tmp_path)


def masked(ids, learned):
    return [id_ if here else IGNORED for id_, here in zip(ids, learned, strict=True)]


def records_of(texts, count):
    """Records of real text, some short and some long."""
    lines = [line.strip() for text in texts for line in text.split("\n") if line.strip()]
    return [
        {
            "instruction": lines[number % len(lines)],
            "input": lines[7 * number % len(lines)] if number % 3 else "",
            "output": " ".join(lines[number % 50 : number % 50 + 1 + number % 8]),
            "history": [[lines[n], lines[n + 1]] for n in range(number % 4)],
        }
        for number in range(count)
    ]


# What is written.


def test_a_sample_is_question_and_answer_encoded_piece_by_piece(instruct, backend):
    record = {
        "instruction": "Say 北京",
        "input": "now",
        "output": "  it's\nGröße",
        "history": [["Hi", "Hello"]],
        "system": "Be brief.",
    }
    ((ids, labels),) = samples(instruct([record]))
    eos = "</s>"
    pieces = [
        ("Be brief.\n", False),
        ("Human: Hi\nAssistant: ", False),
        ("Hello", True),
        (eos, True),
        ("\n", False),
        ("Human: Say 北京\nnow\nAssistant: ", False),
        ("  it's\nGröße", True),
        (eos, True),
    ]
    encoded = [(backend.encode(text).ids, learned) for text, learned in pieces]
    assert ids == [id_ for piece, _ in encoded for id_ in piece]
    expected = [learned for piece, learned in encoded for _ in piece]
    assert labels == masked(ids, expected)


def test_the_files_are_modellinks_three(instruct, tmp_path):
    prefix = instruct([{"instruction": "Hi", "output": "Hello"}] * 3)
    names = {f"out_packed_{name}_document" for name in ("input_ids", "attention_mask", "labels")}
    written = {path.name for path in tmp_path.iterdir()} - {"records.jsonl"}
    assert written == {f"{name}{end}" for name in names for end in (".bin", ".idx")} | {
        "out_packed.json"
    }
    lengths = [len(ids) for ids, _ in samples(prefix)]
    assert column(prefix, "attention_mask") == [[[1] * length] for length in lengths]


def test_the_description_says_what_was_made_of_what(instruct, bpe):
    records = [{"instruction": "Hi", "output": "Hello"}, {"instruction": "Hi", "output": ""}]
    prefix = instruct([*records, {"output": "no"}], "--on-error", "skip", "--append-eod")
    info = read_sample_info(prefix)
    ((ids, labels),) = samples(prefix)
    assert info.kind == "instruction"
    assert Path(info.tokenizer).parent == bpe
    assert (info.template, info.handlers, info.append_eod) == ("default", (ALPACA,), True)
    assert (info.samples, info.rows, info.packed, info.cut) == (1, 1, False, 0)
    assert (info.records, info.skipped, info.failed) == (3, {"an empty answer": 1}, 1)
    assert (info.tokens, info.longest) == (len(ids), len(ids))
    assert info.learned_tokens == sum(label != IGNORED for label in labels)
    assert ids[-2:] == labels[-2:] == [1, 1]  # of the template, and of --append-eod
    for name, file in info.files.items():
        path = Path(f"{prefix}_packed_{name}_document.bin")
        assert path.stat().st_size == file.bin_bytes


def test_a_description_names_a_path_that_is_not_utf_8(instruct):
    prefix = instruct([{"instruction": "Hi", "output": "Hello"}])
    info = dataclasses.replace(read_sample_info(prefix), tokenizer=os.fsdecode(b"/t\xff"))
    info_path(prefix).write_bytes(to_json(info).encode())
    assert read_sample_info(prefix) == info


def test_a_description_of_another_run_is_refused(instruct):
    prefix = instruct([{"instruction": "Hi", "output": "Hello"}])
    tokens = Path(f"{prefix}_packed_labels_document.bin")
    tokens.write_bytes(tokens.read_bytes() + bytes(4))
    with pytest.raises(UsageError, match="not of the same run"):
        read_sample_info(prefix)
    description = Path(f"{prefix}_packed.json")
    wrong = description.read_text().replace('"vocab_size": 2000', '"vocab_size": "2000"')
    for content in (wrong, '{"files": {}}', "[]", "{"):
        description.write_text(content)
        with pytest.raises(UsageError, match="not the description of samples"):
            read_sample_info(prefix)
    assert read_sample_info("nowhere") is None


@pytest.mark.parametrize("flags", [[], ["--pack", "--seq-length", "200"]], ids=["plain", "pack"])
def test_the_files_are_the_same_for_any_number_of_workers(instruct, texts, tmp_path, flags):
    """Many files are many chunks, so that the workers get different ones."""
    paths = [
        write(tmp_path / f"{number}.jsonl", records_of(texts, 60 + number)) for number in range(7)
    ]
    contents = []
    for workers in ("1", "2", "3"):
        prefix = instruct(paths, *flags, "--workers", workers, name=f"w{workers}")
        found = sorted(tmp_path.glob(f"{prefix.name}_packed*"))
        contents.append([path.read_bytes() for path in found])
    assert len(contents[0]) == 7
    assert contents[0] == contents[1] == contents[2]


def test_packed_rows_hold_the_same_samples_with_their_boundaries(instruct, texts):
    records = records_of(texts, 300)
    flags = ["--seq-length", "256"]
    plain = samples(instruct(records, *flags))
    prefix = instruct(records, *flags, "--pack", name="packed")
    ids, labels = column(prefix, "input_ids"), column(prefix, "labels")
    flat = [
        pair
        for row, row_labels in zip(ids, labels, strict=True)
        for pair in zip(row, row_labels, strict=True)
    ]
    assert sorted(flat) == sorted(plain)
    assert column(prefix, "attention_mask") == [[[1] * len(s) for s in row] for row in ids]
    rows = [sum(map(len, row)) for row in ids]
    assert max(rows) <= 256
    assert sum(rows) / (256 * len(rows)) > 0.97
    info = read_sample_info(prefix)
    assert (info.samples, info.rows, info.packed) == (len(plain), len(ids), True)


def test_only_the_last_answer_is_learned_with_mask_history(instruct, backend):
    record = {"instruction": "Hi", "output": "Hello", "history": [["a", "b"], ["c", "d"]]}
    ((ids, labels),) = samples(instruct([record], "--mask-history"))
    learned = [*backend.encode("Hello").ids, 1]
    assert labels == [IGNORED] * (len(ids) - len(learned)) + learned


def test_a_template_with_an_end_of_its_own_appends_that(backend, tmp_path, bpe, instruct):
    """As ModelLink, which made it the tokenizer's end of text."""
    directory = tmp_path / "chatml"
    directory.mkdir()
    more = tokenizers.Tokenizer.from_file(str(bpe / "tokenizer.json"))
    more.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    more.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_bytes((bpe / "tokenizer_config.json").read_bytes())
    flags = ["--append-eod", "--tokenizer-name-or-path", str(directory)]
    ((ids, labels),) = samples(
        instruct([{"instruction": "Hi", "output": "Hello"}], *flags, prompt="chatml")
    )
    end = more.token_to_id("<|im_end|>")
    assert labels[-3:] == ids[-3:] == [backend.encode("Hello").ids[-1], end, end]


# Handlers with a form of their own.

PROMPT = (
    "\nBelow is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request. Please note that you need "
    "to think through your response logically and step by step.\n"
)


def whole_text(backend, prompt, answer):
    """Encode as one text; the loss sees the tokens that hold something of the answer."""
    encoding = backend.encode(prompt + answer)
    learned = [end > len(prompt) for _, end in encoding.offsets]
    return encoding.ids, masked(encoding.ids, learned)


def turns(*pairs):
    """Return the text before the last answer, and that answer."""
    text = PROMPT
    for asked, said in pairs:
        before = f"{text}### Instruction:\n{asked}\n### Response:\n"
        text = f"{before}{said}\n"
    return before, text[len(before) :]


FIXED = {
    "GeneralInstructionHandler": (
        {"instruction": "Say it", "input": "", "output": " it"},
        [turns(("Say it\n", " it"))],
    ),
    "BelleMultiTurnInstructionHandler": (
        {"instruction": "Human: Hi\nAssistant: Hello\nHuman: You?\nAssistant:", "output": "Fine"},
        [turns(("Hi", "Hello"), ("You?", "Fine"))],
    ),
    "MOSSInstructionHandler": (
        {
            "chat": {
                "turn_1": {"Human": "<|Human|>: Hi<eoh>", "MOSS": "<|MOSS|>: Hello<eom>"},
                "turn_2": {"Human": "<|Human|>: You?<eoh>", "MOSS": "<|MOSS|>: Fine<eom>"},
            }
        },
        [turns(("Hi", "Hello")), turns(("Hi", "Hello"), ("You?", "Fine"))],
    ),
    "LeetcodePythonInstructionHandler": (
        {"code_with_problem": "Add.\n```x```", "code_only": "```y```", "explanation_only": "So."},
        [turns(("Add.", "```y```\nSo."))],
    ),
}


@pytest.mark.parametrize("handler", sorted(FIXED))
def test_a_handler_with_a_form_of_its_own_writes_one_text(instruct, backend, handler):
    record, expected = FIXED[handler]
    prefix = instruct([record], handler=handler, prompt=None)
    assert samples(prefix) == [whole_text(backend, *text) for text in expected]
    assert read_sample_info(prefix).template == handler


def test_a_token_of_prompt_and_answer_belongs_to_the_answer(instruct, backend):
    """A line break before the answer makes one token with that of the prompt."""
    record = {"instruction": "Say it", "input": "", "output": "\n\n\n    it"}
    before, answer = turns(("Say it\n", record["output"]))
    expected = whole_text(backend, before, answer)
    alone = backend.encode(before).ids
    assert expected[0][: len(alone)] != alone, "the case this test is about"
    prefix = instruct([record], handler="GeneralInstructionHandler", prompt=None)
    assert samples(prefix) == [expected]


def test_moss_turns_are_marked_by_two_tokens_and_end_where_the_next_begins(instruct, backend):
    record = FIXED["MOSSInstructionHandler"][0]
    prefix = instruct([record], handler="MOSSMultiTurnHandler", prompt=None)
    hi, hello, you, fine = (backend.encode(text).ids for text in ("Hi", "Hello", "You?", "Fine"))
    none = [IGNORED]
    ids = [195, *hi, 196, *hello, 195, *you, 196, *fine, 1]
    labels = [*none, *none * len(hi), *none, *hello, 1, *none * len(you), *none, *fine, 1]
    assert samples(prefix) == [(ids, labels)]


def test_the_chat_template_of_the_tokenizer_is_used_where_that_is_asked(
    bpe, backend, tmp_path, instruct
):
    directory = tmp_path / "with_template"
    directory.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((bpe / name).read_bytes())
    template = (
        "{% for m in messages %}{{ '<s>' if m['role'] == 'user' }}{{ m['content'] }}"
        "{{ '</s>' if m['role'] == 'assistant' else ':' }}{% endfor %}"
    )
    (directory / "chat_template.jinja").write_text(template)
    flags = ["--hf-chat-template", "--tokenizer-name-or-path", str(directory)]
    prefix = instruct([{"instruction": "Hi", "output": "Hello"}], *flags, prompt=None)
    ((ids, labels),) = samples(prefix)
    assert ids == backend.encode("<s>Hi:Hello</s>").ids
    learned = [label for label in labels if label != IGNORED]
    assert learned == backend.encode("Hello</s>").ids
    assert read_sample_info(prefix).template == "hf-chat-template"


def test_a_column_that_is_named_must_be_in_some_record(instruct, tmp_path):
    plain = {"instruction": "Hi", "output": "Hello"}
    talk = {**plain, "past": [["Are you", "I am"]]}
    records = [plain] * 300 + [talk] + [plain] * 300
    named = ("--map-keys", '{"history": "past"}')
    lengths = [len(ids) for ids, _ in samples(instruct(records, *named, "--workers", "2"))]
    assert lengths.index(max(lengths)) == 300
    with pytest.raises(UsageError, match=r"^--map-keys: no record of .*jsonl has a column 'past'$"):
        instruct([plain] * 3, *named, name="none")
    assert not list(tmp_path.glob("none*"))
