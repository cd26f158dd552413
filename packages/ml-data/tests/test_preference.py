from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers

from ml_data.indexed import IndexedDataset
from ml_data.instruction.sample_info import read_sample_info
from ml_data.preference import main
from ml_models.flags import UsageError

IGNORED = -100
COLUMNS = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")
RECORD = {
    "instruction": "2+2?",
    "chosen": "It is 4.",
    "rejected": "It is 5, I think.",
    "history": [["Hi", "Hello"]],
    "system": "Add.",
}


@pytest.fixture(scope="module")
def ids(bpe):
    backend = tokenizers.Tokenizer.from_file(str(bpe / "tokenizer.json"))
    return lambda text: backend.encode(text).ids


@pytest.fixture
def prefer(bpe, tmp_path):
    """Run `ml-data preference` on records, and return the prefix of what it wrote."""

    def run(records, *flags, handler="AlpacaStylePairwiseHandler", name="out"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        prefix = tmp_path / name
        argv = ["--input", str(path), "--output-prefix", str(prefix), "--handler-name", handler]
        argv += ["--tokenizer-name-or-path", str(bpe), "--prompt-type", "default"]
        argv += [] if "--workers" in flags else ["--workers", "1"]
        assert main([*argv, *flags], "ml-data preference") == 0
        return prefix

    return run


def pairs(prefix):
    """Return the four columns of each preference."""
    datasets = [IndexedDataset(f"{prefix}_packed_{name}_document") for name in COLUMNS]
    count = len(datasets[0])
    return [tuple(dataset[number].tolist() for dataset in datasets) for number in range(count)]


def expected(ids, question, chosen, rejected):
    """Return the four columns; the template ends an answer with token 1."""
    asked = [token for text in question for token in (ids(text) if isinstance(text, str) else text)]
    sides = [[*ids(answer), 1] for answer in (chosen, rejected)]
    return tuple(
        part for side in sides for part in ([*asked, *side], [IGNORED] * len(asked) + side)
    )


QUESTION = (
    "Add.\n",
    "Human: Hi\nAssistant: ",
    "Hello",
    [1],
    "\n",
    "Human: 2+2?\nAssistant: ",
)


def test_both_sides_share_the_question_and_only_their_answers_are_learned(prefer, ids):
    assert pairs(prefer([RECORD])) == [
        expected(ids, QUESTION, RECORD["chosen"], RECORD["rejected"])
    ]


def test_sharegpt_and_openai_give_the_same_as_alpaca(prefer):
    said = [("human", "Hi"), ("gpt", "Hello"), ("human", "2+2?")]
    sharegpt = {
        "conversations": [{"from": role, "value": text} for role, text in said],
        "chosen": {"from": "gpt", "value": RECORD["chosen"]},
        "rejected": {"from": "gpt", "value": RECORD["rejected"]},
        "system": "Add.",
    }
    roles = {"human": "user", "gpt": "assistant"}
    asked = [{"role": "system", "content": "Add."}]
    asked += [{"role": roles[role], "content": text} for role, text in said]
    openai = {
        side: [*asked, {"role": "assistant", "content": RECORD[side]}]
        for side in ("chosen", "rejected")
    }
    alpaca = pairs(prefer([RECORD]))
    assert pairs(prefer([sharegpt], handler="SharegptStylePairwiseHandler", name="s")) == alpaca
    assert pairs(prefer([openai], handler="OpenAIPairwiseHandler", name="o")) == alpaca


def test_the_files_and_their_description(prefer, tmp_path):
    same = {**RECORD, "rejected": RECORD["chosen"]}
    prefix = prefer([RECORD, same, RECORD])
    names = {path.name for path in tmp_path.iterdir()} - {"out.jsonl", "out_packed.json"}
    assert names == {f"out_packed_{c}_document.{end}" for c in COLUMNS for end in ("bin", "idx")}
    info = read_sample_info(prefix)
    assert (info.kind, info.samples, info.records) == ("preference", 2, 3)
    assert info.skipped == {"the chosen answer is the rejected one": 1}
    assert info.tokens == sum(len(p[0]) + len(p[2]) for p in pairs(prefix))
    assert info.longest == max(len(side) for p in pairs(prefix) for side in (p[0], p[2]))
    assert info.learned_tokens == sum(
        label != IGNORED for p in pairs(prefix) for label in (*p[1], *p[3])
    )


def test_what_is_too_long_loses_its_first_turns_and_keeps_the_system_text(prefer, ids):
    asked = ("Add.\n", "Human: 2+2?\nAssistant: ")
    whole = expected(ids, asked, RECORD["chosen"], RECORD["rejected"])
    length = len(whole[2])
    assert pairs(prefer([RECORD], "--seq-length", str(length))) == [whole]
    (cut,) = pairs(prefer([RECORD], "--seq-length", str(length - 1), name="cut"))
    assert cut == (whole[0], whole[1], whole[2][:-1], whole[3][:-1])


def test_what_is_too_long_is_left_out_where_that_is_asked(prefer):
    short = {"instruction": "2?", "chosen": "4", "rejected": "5"}
    ((ids, *_),) = pairs(prefer([short], "--append-eod", name="short"))
    flags = ["--seq-length", str(len(ids)), "--on-too-long", "skip", "--append-eod"]
    prefix = prefer([RECORD, short], *flags)
    assert len(pairs(prefix)) == 1
    assert read_sample_info(prefix).skipped == {f"more than {len(ids)} tokens": 1}
    assert all(side[-2:] == [1, 1] for side in pairs(prefix)[0])


def test_the_files_are_the_same_for_any_number_of_workers(prefer, tmp_path):
    records = [
        {**RECORD, "instruction": f"{n}+2?", "chosen": "4" * (n % 40 + 1)} for n in range(500)
    ]
    paths = [tmp_path / f"records{number}.jsonl" for number in range(5)]
    for number, path in enumerate(paths):
        path.write_text("".join(json.dumps(record) + "\n" for record in records[number:]))
    contents = []
    for workers in ("1", "2"):
        prefer(records, "--workers", workers, "--input", *map(str, paths), name=f"w{workers}")
        found = sorted(tmp_path.glob(f"w{workers}_packed*"))
        contents.append([path.read_bytes() for path in found])
    assert len(contents[0]) == 9
    assert contents[0] == contents[1]


def test_a_preference_without_an_answer_names_the_record(prefer):
    record = {"instruction": "2+2?", "chosen": "4"}
    with pytest.raises(UsageError, match=r"out.jsonl:1: no column 'rejected'; the columns are"):
        prefer([record])


def test_data_of_instructions_is_for_the_other_command(prefer):
    with pytest.raises(UsageError, match="that is for ml-data instruct"):
        prefer([RECORD], handler="AlpacaStyleInstructionHandler")


def test_modellinks_map_keys_are_understood(prefer, ids):
    """An empty name is a column that is not there."""
    record = {"question": "2+2?", "system": "Add.", "chosen": "4", "rejected": "5"}
    keys = json.dumps({"prompt": "question", "query": "", "system": "system"})
    asked = ("Add.\n", "Human: 2+2?\nAssistant: ")
    assert pairs(prefer([record], "--map-keys", keys)) == [expected(ids, asked, "4", "5")]


def test_real_preferences_keep_their_text(asset, tmp_path):
    """A large tokenizer, text in two languages: decoding gives back what went in."""
    directory = asset("tokenizer-deepseek")
    records = [
        {
            "instruction": "春眠不觉晓\u3000的下一句:",
            "chosen": "处处闻啼鸟。",
            "rejected": "Größe 🙂",
        },
        {"instruction": "def f():\n    return", "chosen": "\t1  \n", "rejected": "    pass"},
    ]
    path = tmp_path / "real.json"
    path.write_text(json.dumps(records))
    argv = ["--input", str(path), "--output-prefix", str(tmp_path / "real")]
    argv += ["--handler-name", "AlpacaStylePairwiseHandler", "--prompt-type", "default"]
    argv += ["--tokenizer-name-or-path", str(directory)]
    assert main(argv, "ml-data preference") == 0
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    for record, columns in zip(records, pairs(tmp_path / "real"), strict=True):
        for side, labels in (("chosen", columns[1]), ("rejected", columns[3])):
            learned = [label for label in labels if label != IGNORED]
            assert backend.decode(learned) == record[side]
    assert Path(read_sample_info(tmp_path / "real").tokenizer).parent == directory
