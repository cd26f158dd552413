import json
from pathlib import Path

import pytest

from ml_data.handlers.dataset_info import datasets
from ml_data.instruct import main as instruct
from ml_data.instruction.sample_info import read_sample_info
from ml_data.preference import main as prefer
from ml_models.flags import UsageError

ENTRIES = {
    "plain": {"file_name": "plain.json", "file_sha1": "607f94a7f581341e59685aef32f531095232cf23"},
    "mapped": {
        "file_name": "sub/mapped.jsonl",
        "columns": {"prompt": "q", "response": "a", "history": "past"},
        "num_samples": 2,
    },
    "talk": {
        "file_name": "talk.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "tools": "functions"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
        },
    },
    "openai": {"file_name": "talk.json", "formatting": "openai"},
    "pairs": {"file_name": "pairs.json", "ranking": True},
    "hub": {"hf_hub_url": "llamafactory/alpaca_en", "ms_hub_url": "llamafactory/alpaca_en"},
    "both": {"hf_hub_url": "llamafactory/alpaca_en", "file_name": "plain.json"},
    "script": {"script_url": "belle_multiturn"},
    "typo": {"file_name": "plain.json", "formating": "sharegpt"},
    "form": {"file_name": "plain.json", "formatting": ["alpaca"]},
    "images": {"file_name": "plain.json", "columns": {"images": "images"}},
    "column": {"file_name": "plain.json", "columns": {"promt": "q"}},
    "folder": {"file_name": "plain.json", "folder": "python"},
    "split": {"file_name": "plain.json", "split": "test"},
    "few": {"file_name": "plain.json", "num_samples": 0},
    "text": {"file_name": "plain.json", "ranking": "false"},
    "empty": {"file_name": ""},
    "list": [],
    "none": {"formatting": "alpaca"},
}


@pytest.fixture
def directory(tmp_path) -> Path:
    directory = tmp_path / "data"
    (directory / "sub").mkdir(parents=True)
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    contents = {
        "dataset_info.json": ENTRIES,
        "plain.json": [{"instruction": "Say", "input": "it", "output": "it"}] * 3,
        "talk.json": [{"messages": talk, "functions": "[]"}] * 4,
        "pairs.json": [{"instruction": "2+2?", "input": "?", "chosen": "4", "rejected": "5"}],
    }
    for name, content in contents.items():
        (directory / name).write_text(json.dumps(content))
    mapped = json.dumps({"q": "Hi", "a": "Hello", "past": None, "input": "not read"})
    (directory / "sub" / "mapped.jsonl").write_text(f"{mapped}\n" * 5)
    return directory


@pytest.fixture
def flags(directory, bpe, tmp_path):
    given = ["--dataset-dir", str(directory), "--handler-name", "LlamaFactoryInstructionHandler"]
    given += ["--tokenizer-name-or-path", str(bpe), "--prompt-type", "default", "--workers", "1"]
    return [*given, "--output-prefix", str(tmp_path / "out")]


def test_datasets_are_found_by_their_names(directory):
    plain, mapped, talk, openai = datasets(
        ["plain", "dataset/mapped", "talk", "openai"], str(directory), pairwise=False
    )
    assert plain.input == (str(directory / "plain.json"),)
    assert plain.columns.prompt == "instruction"
    assert (mapped.columns.prompt, mapped.columns.history) == ("q", "past")
    assert mapped.columns.query is None, "columns leaves it out, so it is not read"
    assert mapped.max_samples == 2
    assert mapped.limited(1).max_samples == 1
    assert mapped.limited(None).max_samples == 2
    assert plain.limited(None).max_samples is None
    assert talk.handler == "SharegptStyleInstructionHandler"
    assert (talk.columns.messages, talk.columns.tags.user_tag) == ("messages", "user")
    assert talk.columns.tags.observation_tag == "observation"
    assert openai.handler == "OpenAIInstructionHandler"
    (both,) = datasets(["both"], str(directory), pairwise=False)
    assert both.input == plain.input


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("plane", "--input plane: no such dataset in .*dataset_info.json; did you mean plain"),
        ("hub", "hf_hub_url .*alpaca_en.*: nothing is downloaded and no script is run"),
        ("script", "script_url .*belle_multiturn"),
        ("typo", "unknown key 'formating'; did you mean formatting"),
        ("form", "formatting .*: not alpaca, sharegpt, openai"),
        ("images", "columns has images, which is not read: text only"),
        ("column", "columns has no 'promt'; did you mean prompt"),
        ("folder", "folder is of datasets on a hub"),
        ("split", "split .*: files hold the split train only"),
        ("few", "num_samples 0: must be at least 1"),
        ("text", 'ranking "false": must be true or false'),
        ("empty", 'file_name "": must name a file or a directory'),
        ("list", "not an object but"),
        ("none", "no file_name; it has formatting"),
        ("pairs", "ranking is true: that is for ml-data preference"),
    ],
    ids=lambda value: value if value.isalpha() else "",
)
def test_an_entry_that_cannot_be_read_is_named(directory, name, match):
    with pytest.raises(UsageError, match=match):
        datasets([name], str(directory), pairwise=False)


def test_a_directory_without_a_whole_dataset_info_is_named(directory):
    with pytest.raises(UsageError, match="--dataset-dir: missing"):
        datasets(["plain"], None, pairwise=False)
    with pytest.raises(UsageError, match=r"--dataset-dir: cannot read .*No such file"):
        datasets(["plain"], str(directory / "sub"), pairwise=False)
    (directory / "dataset_info.json").write_text("{")
    with pytest.raises(UsageError, match=r"dataset_info.json: not JSON"):
        datasets(["plain"], str(directory), pairwise=False)
    (directory / "dataset_info.json").write_text("[" * 100_000)
    with pytest.raises(UsageError, match=r"dataset_info.json: not JSON \(maximum recursion"):
        datasets(["plain"], str(directory), pairwise=False)
    (directory / "dataset_info.json").write_text("[]")
    with pytest.raises(UsageError, match="not an object of datasets by name"):
        datasets(["plain"], str(directory), pairwise=False)


def test_datasets_of_different_forms_make_one_dataset(flags, tmp_path):
    names = ["--input", "plain, mapped,talk,openai"]
    assert instruct([*flags, *names], "ml-data instruct") == 0
    info = read_sample_info(tmp_path / "out")
    assert info.samples == 3 + 2 + 4 + 4
    assert len(info.handlers) == 4


def test_preferences_have_instruction_and_input_like_the_rest(flags, tmp_path):
    assert prefer([*flags, "--input", "pairs"], "ml-data preference") == 0
    assert read_sample_info(tmp_path / "out").samples == 1


def test_a_directory_that_is_not_read_is_refused(directory, flags):
    given = [*flags, "--handler-name", "AlpacaStyleInstructionHandler"]
    message = f"^--dataset-dir {directory}: is read with --handler-name LlamaFactoryInstr"
    with pytest.raises(UsageError, match=message):
        instruct([*given, "--input", str(directory / "plain.json")], "ml-data instruct")


def test_names_of_columns_are_not_given_twice(flags):
    with pytest.raises(UsageError, match=r"--map-keys: dataset_info.json names the columns"):
        instruct([*flags, "--input", "plain", "--map-keys", "{}"], "ml-data instruct")
