from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tokenizers
from sample_files import ALPACA, runner, samples, write

from ml_data.instruction.sample_info import read_sample_info
from ml_models.flags import UsageError


@pytest.fixture(scope="module")
def backend(bpe):
    return tokenizers.Tokenizer.from_file(str(bpe / "tokenizer.json"))


@pytest.fixture
def instruct(bpe, tmp_path):
    return runner(bpe, tmp_path)


# Records that cannot be used, and those that are not wanted.


def test_a_record_that_cannot_be_used_ends_the_run_and_leaves_nothing(instruct, tmp_path):
    records = [{"instruction": "Hi", "output": "Hello"}] * 2 + [{"instruction": "Hi"}]
    there = "the columns are 'instruction'; choose with --map-keys"
    match = rf"records.jsonl:3: no column 'output'; {there} \(--on-error skip"
    with pytest.raises(UsageError, match=match):
        instruct(records)
    assert [path.name for path in tmp_path.iterdir()] == ["records.jsonl"]


def test_every_record_is_accounted_for(instruct, tmp_path, caplog):
    """Written, skipped by reason, failed: they sum up to the lines of the file."""
    good = [{"instruction": "Hi", "output": "Hello"}] * 5
    odd = [{"instruction": "Hi", "output": ""}, {"instruction": "", "output": "b"}]
    path = write(tmp_path / "records.jsonl", [*good, *odd, {"instruction": "a " * 300}])
    with path.open("ab") as file:
        file.write(b'{"instruction": "a\n\xff\n[1]\n')
        file.write(json.dumps({"instruction": "a " * 300, "output": "b"}).encode())
    with caplog.at_level("INFO"):
        prefix = instruct(path, "--on-error", "skip", "--seq-length", "100")
    lines = caplog.text
    assert "12 records read: 5 written; " in lines
    assert "1 skipped: an empty answer" in lines
    assert "1 skipped: an empty question" in lines
    assert "1 skipped: a question that leaves no room for an answer in 100 tokens" in lines
    assert "4 failed" in lines
    assert "records.jsonl:8: no column 'output'" in lines
    assert "records.jsonl:10: " in lines
    info = read_sample_info(prefix)
    assert info.records == info.samples + sum(info.skipped.values()) + info.failed == 12


def test_long_samples_are_cut_or_left_out_and_counted(instruct, caplog):
    """One of a short and a long turn, one of one long turn, one that fits."""
    long = "word " * 60
    records = [
        {"instruction": "Hi", "output": long, "history": [["a", "b"]]},
        {"instruction": "Hi", "output": long},
        {"instruction": "Hi", "output": "Hello"},
    ]
    with caplog.at_level("INFO"):
        cut = instruct(records, "--seq-length", "40")
        skipped = instruct(records, "--seq-length", "40", "--on-too-long", "skip", name="skip")
    assert len(samples(cut)) == 3
    assert max(len(ids) for ids, _ in samples(cut)) == 40
    assert "2 samples of them cut to 40 tokens" in caplog.text
    assert read_sample_info(cut).cut == 2
    assert len(samples(skipped)) == 1
    assert "3 records read: 1 written; 2 skipped: more than 40 tokens" in caplog.text


def test_samples_left_out_of_records_that_give_others_are_counted(instruct, caplog):
    turn = {"Human": "Hi", "MOSS": "Hello"}
    long = {"Human": "word " * 200, "MOSS": "Hello"}
    record = {"chat": {"turn_1": turn, "turn_2": turn, "turn_3": long}}
    flags = ["--seq-length", "300", "--on-too-long", "skip"]
    with caplog.at_level("INFO"):
        prefix = instruct([record], *flags, handler="MOSSInstructionHandler", prompt=None)
    assert len(samples(prefix)) == 2
    assert "1 samples of records that gave others left out: more than 300 tokens" in caplog.text


def test_where_nothing_can_be_written_the_account_says_why(instruct):
    with pytest.raises(UsageError, match="not one sample: 2 records read: 0 written; 2 skipped: a"):
        instruct([{"instruction": "Hi", "output": ""}] * 2)
    with pytest.raises(UsageError, match=r"0 written; 1 failed; [^ ]*records.jsonl:1: no column"):
        instruct([{"instruction": "Hi"}], "--on-error", "skip")


# Several datasets.


def datasets_of(tmp_path, *sizes):
    """Files whose records say which dataset and which record they are."""
    return [
        write(
            tmp_path / f"set{number}.jsonl",
            [{"instruction": f"{number}", "output": f"{record}"} for record in range(size)],
        )
        for number, size in enumerate(sizes)
    ]


def sequence(prefix, backend):
    texts = [backend.decode(ids) for ids, _ in samples(prefix)]
    return [tuple(text.replace("Human: ", "").split("\nAssistant: ")) for text in texts]


def test_datasets_follow_each_other_or_take_turns(instruct, backend, tmp_path):
    paths = datasets_of(tmp_path, 2, 3)
    assert sequence(instruct(paths), backend) == [
        ("0", "0"), ("0", "1"), ("1", "0"), ("1", "1"), ("1", "2"),
    ]  # fmt: skip
    under = instruct(paths, "--mix-strategy", "interleave_under", name="under")
    assert sequence(under, backend) == [("0", "0"), ("1", "0"), ("0", "1"), ("1", "1")]
    info = read_sample_info(under)
    assert info.skipped == {"after the end of --mix-strategy interleave_under": 1}
    assert (info.records, info.samples) == (5, 4)
    over = instruct(paths, "--mix-strategy", "interleave_over", name="over")
    assert sequence(over, backend)[4:] == [("0", "0"), ("1", "2")]


def test_probabilities_and_seed_decide_the_order(instruct, backend, tmp_path):
    paths = datasets_of(tmp_path, 40, 400)
    flags = ["--mix-strategy", "interleave_over", "--interleave-probs", "0.25,0.75"]
    found = sequence(instruct(paths, *flags, "--seed", "7"), backend)
    draws = np.random.default_rng(7).choice(2, size=1000, p=[0.25, 0.75])[: len(found)]
    assert [int(dataset) for dataset, _ in found] == draws.tolist()
    again = instruct(paths, *flags, "--seed", "7", "--workers", "2", name="again")
    assert sequence(again, backend) == found
    other = instruct(paths, *flags, "--seed", "8", name="other")
    assert sequence(other, backend) != found


def test_only_the_first_records_of_each_dataset_are_taken(instruct, backend, tmp_path, caplog):
    paths = datasets_of(tmp_path, 5, 1)
    broken = write(tmp_path / "set2.jsonl", [{"instruction": "2", "output": "0"}] * 2)
    broken.write_text(broken.read_text() + "not json, but never read\n")
    with caplog.at_level("INFO"):
        prefix = instruct([*paths, broken], "--max-samples", "2")
    assert [pair[0] for pair in sequence(prefix, backend)] == ["0", "0", "1", "2", "2"]
    assert "5 records read: 5 written" in caplog.text


# Flags.


@pytest.mark.parametrize(
    ("flags", "prompt", "match"),
    [
        ([], None, "missing --prompt-type, or --hf-chat-template"),
        (["--hf-chat-template"], "default", "only one of them"),
        (["--pack"], "default", "--pack: needs --seq-length"),
        (["--interleave-probs", "1"], "default", "needs --mix-strategy"),
        (
            ["--mix-strategy", "interleave_over", "--interleave-probs", "0.5,0.5"],
            "default",
            "2 values for 1 datasets",
        ),
        (["--seq-length", "1"], "default", "--seq-length 1: must be at least 2"),
        (["--max-samples", "0"], "default", "--max-samples 0: must be at least 1"),
        (["--workers", "0"], "default", "--workers 0: must be at least 1"),
        (["--seed", "-1"], "default", "--seed -1: must be at least 0"),
        (["--handler-name", "MOSSMultiTurnHandler"], "default", "takes no template"),
        (["--handler-name", "GeneralPretrainHandler"], "default", "is for ml-data pretrain"),
        (["--map-keys", '{"a": "b"}'], "default", "--map-keys: no key 'a'"),
        ([], "defualt", "did you mean default"),
        (["--input", "nowhere.jsonl"], "default", "nowhere.jsonl: no such file"),
        (["--output-prefix", "out/"], "default", "must end in a file name"),
        (["--output-prefix", "out/.."], "default", "must end in a file name"),
    ],
    ids=[
        "template", "two-templates", "pack", "concat", "probs", "length", "samples", "workers",
        "seed", "own", "handler", "keys", "name", "input", "prefix", "parent",
    ],
)  # fmt: skip
def test_wrong_flags_are_named_before_anything_is_read(instruct, flags, prompt, match):
    with pytest.raises(UsageError, match=match):
        instruct([{"instruction": "Hi", "output": "Hello"}], *flags, prompt=prompt)


def test_probabilities_must_be_positive_and_sum_to_1(instruct, tmp_path):
    for given in ("0.5,0.6", "0,1", "-1,2"):
        with pytest.raises(UsageError, match="must all be above 0 and sum to 1"):
            instruct(
                datasets_of(tmp_path, 1, 1),
                "--mix-strategy=interleave_over",
                f"--interleave-probs={given}",
            )


def test_a_tokenizer_without_an_end_of_text_cannot_append_one(bpe, tmp_path, instruct):
    directory = tmp_path / "without_eos"
    directory.mkdir()
    (directory / "tokenizer.json").write_bytes((bpe / "tokenizer.json").read_bytes())
    flags = ["--append-eod", "--tokenizer-name-or-path", str(directory)]
    flags += ["--handler-name", "GeneralInstructionHandler"]
    with pytest.raises(UsageError, match=r"--append-eod: tokenizer .* has no end-of-text token"):
        instruct([{"instruction": "Hi", "input": "", "output": "Hello"}], *flags, prompt=None)


def test_tables_with_nulls_are_read_like_records_without_the_column(instruct, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    records = [
        {"instruction": "Hi", "input": None, "output": "Hello", "history": None},
        {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]]},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "records.parquet")
    table = samples(instruct(tmp_path / "records.parquet"))
    assert table == samples(instruct(records, name="lines"))


# The process.


def test_importing_the_command_imports_no_heavy_library():
    heavy = "{'torch', 'transformers', 'megatron', 'tokenizers', 'pyarrow', 'sentencepiece'}"
    program = f"import sys, ml_data.instruct, ml_data.preference; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout.strip() == b"set()"


@pytest.fixture
def long_job(bpe, texts, tmp_path):
    """A run of many seconds, as a process whose output directory has an older result."""
    record = json.dumps({"instruction": "Explain.", "output": texts[0]}) + "\n"
    (tmp_path / "long.jsonl").write_text(record * 1500)
    out = tmp_path / "out"
    out.mkdir()
    (out / "x_packed.json").write_text("old")
    program = "import sys; from ml_data.cli import main; sys.exit(main(sys.argv[1:]))"
    argv = ["instruct", "--input", str(tmp_path / "long.jsonl"), "--output-prefix", str(out / "x")]
    argv += ["--handler-name", ALPACA, "--prompt-type", "default", "--workers", "2"]
    argv += ["--tokenizer-name-or-path", str(bpe)]
    job = subprocess.Popen(
        [sys.executable, "-c", program, *argv], stderr=subprocess.PIPE, start_new_session=True
    )
    until = time.monotonic() + 60
    while not any(path.stat().st_size for path in out.glob(".*input_ids*.partial")):
        assert job.poll() is None
        assert time.monotonic() < until
        time.sleep(0.01)
    yield job, out
    job.kill()
    job.communicate()


@pytest.mark.parametrize("strategy", ["concat", "interleave_over"])
def test_a_full_disk_is_one_line_and_leaves_nothing(bpe, tmp_path, strategy):
    """No file may grow beyond 20,000 bytes: neither the results, nor what is mixed."""
    paths = datasets_of(tmp_path, 2000, 2000)
    out = tmp_path / "out"
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); "
        "from ml_data.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    argv = ["instruct", "--input", *map(str, paths), "--output-prefix", str(out / "x")]
    argv += ["--handler-name", ALPACA, "--prompt-type", "default", "--mix-strategy", strategy]
    argv += ["--tokenizer-name-or-path", str(bpe), "--workers", "1"]
    job = subprocess.run([sys.executable, "-c", program, *argv], capture_output=True, text=True)
    assert job.returncode != 0
    (line,) = job.stderr.splitlines()
    assert "File too large" in line
    assert str(out) in line
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_the_old_result(long_job, number, code):
    job, out = long_job
    os.killpg(job.pid, number)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == code, errors
    assert b"Traceback" not in errors
    assert [path.name for path in out.iterdir()] == ["x_packed.json"]
    assert (out / "x_packed.json").read_text() == "old"
