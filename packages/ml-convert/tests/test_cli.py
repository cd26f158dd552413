"""The command: its flags, its messages, its exit codes, and how fast it answers."""

import contextlib
import os
import pty
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from ml_convert.cli import main


def words(hf, tmp_path, *more, save_format="mcore"):
    paths = ["--load-dir", hf.path, "--save-dir", tmp_path / "out", "--save-format", save_format]
    return [str(word) for word in (*paths, *more)]


def test_a_conversion_prints_one_line(tmp_path, make_hf, capsys):
    flags = ("--target-tensor-parallel-size", 2, "--num-layer-list", "1,3")
    flags += ("--target-pipeline-parallel-size", 2)
    assert main(words(make_hf(), tmp_path, *flags)) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"wrote {tmp_path}/out/release: 0.0 million parameters in 4 files (")
    assert "KiB of padding) from" in out
    assert out.endswith("verified bit by bit\n")
    assert len(out.splitlines()) == 1


def test_a_dry_run_prints_the_plan(tmp_path, make_hf, capsys):
    flags = ("--dry-run", "--target-tensor-parallel-size", 2)
    assert main(words(make_hf(), tmp_path, *flags)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines if " tensors " in line] == [
        f"{tmp_path}/out/mp_rank_00/model_optim_rng.pt",
        f"{tmp_path}/out/mp_rank_01/model_optim_rng.pt",
    ]
    second = lines[len(lines) // 2 :]
    for expected in (
        "8.0 KiB  model.embedding.word_embeddings.weight bfloat16[128, 32] = nothing; rows 0:128",
        "model.decoder.layers.0.self_attention.linear_qkv.weight bfloat16[32, 32] = "
        "model.layers.0.self_attn.q_proj.weight[16:32, 0:32] in 2 parts (model.safetensors) + "
        "model.layers.0.self_attn.k_proj.weight[8:16, 0:32] in 2 parts (model.safetensors) + ",
        "model.decoder.layers.3.mlp.linear_fc2.weight bfloat16[32, 24] = "
        "model.layers.3.mlp.down_proj.weight[0:32, 24:48] (model.safetensors)",
        "; repeats model.decoder.final_layernorm.weight (mp_rank_00/model_optim_rng.pt)",
    ):
        assert any(expected in line for line in second), expected
    assert lines[-1].startswith("would write ")
    assert "that are free" in lines[-1]
    assert not (tmp_path / "out").exists()


def test_flags_may_come_from_a_file(tmp_path, make_hf, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(f"load-dir: {make_hf().path}\nsave-format: hf\nmax-shard-size: 10KB\n")
    assert main(["--config", str(config), "--save-dir", str(tmp_path / "out")]) == 0
    assert "files (" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--target-tensor-parallel-size", 3), "--target-tensor-parallel-size 3: must divide"),
        (("--target-tensor-paralel-size", 3), "did you mean --target-tensor-parallel-size?"),
        (("--params-dtype", "fp8"), "--params-dtype"),
        (("--num-layer-list", "1,3"), "--num-layer-list 1,3: needs at least 2 pipeline stages"),
        (("--load-dir", "nowhere"), "--load-dir nowhere: no such directory"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(tmp_path, make_hf, capsys, more, message):
    assert main(words(make_hf(), tmp_path, *more)) == 2
    err = capsys.readouterr().err
    assert err.startswith("ml-convert: ")
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_failed_verification_is_one_line_and_exit_code_1(tmp_path, make_hf, capsys):
    hf = make_hf()
    assert main(words(hf, tmp_path, save_format="hf")) == 0
    path = tmp_path / "out" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    capsys.readouterr()
    assert main(words(hf, tmp_path, "--verify-only", save_format="hf")) == 1
    err = capsys.readouterr().err
    assert err.startswith("ml-convert: ")
    assert "differs from" in err
    assert len(err.splitlines()) == 1


def test_a_directory_that_cannot_be_written_is_one_line_and_exit_code_1(tmp_path, make_hf, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("x")
    flags = words(make_hf(), tmp_path, "--save-dir", blocked / "out")
    assert main(flags) == 1
    assert capsys.readouterr().err.startswith("ml-convert: Not a directory")


ONLY = """
import sys

class Absent:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] not in {*sys.stdlib_module_names, *PRESENT}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

PRESENT = sys.argv.pop(1).split()
sys.meta_path.insert(0, Absent)
from ml_convert.cli import main
sys.exit(main())
"""


def test_what_the_small_installation_installs_is_enough(tmp_path, make_hf):
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (line,) = (line for line in readme.splitlines() if line.startswith("pip install numpy "))
    modules = {"pyyaml": "yaml", "zlib-ng": "zlib_ng"}
    present = [modules.get(package, package) for package in line.split()[2:]]
    present += ["ml_convert", "ml_models", "ml_parallel", "markdown_it", "mdurl", "pygments"]
    command = [sys.executable, "-c", ONLY, " ".join(present), *words(make_hf(), tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("wrote "), done.stderr


def test_help_answers_quickly_and_imports_nothing_heavy():
    code = (
        "import sys; from ml_convert.cli import main; code = main(['--help']);"
        "print(sorted({'torch', 'megatron', 'transformers', 'rich'} "
        "& set(sys.modules)), code, file=sys.stderr)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stderr.split()[-1] == "0"
    assert not {"torch", "megatron", "transformers", "rich"} & set(done.stderr.split("'"))
    # of the processor: the machine may be busy with other tests
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.8


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are listed by Linux")
@pytest.mark.parametrize("given", [None, "2"])
def test_numpy_starts_threads_only_if_told_to(tmp_path, make_hf, given):
    code = (
        "import os, sys; from ml_convert.cli import main; code = main(sys.argv[1:]);"
        "threads = len(os.listdir('/proc/self/task'));"
        "print(code, 'numpy' in sys.modules, threads, os.environ.get('OPENBLAS_NUM_THREADS'))"
    )
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    environment |= {} if given is None else {"OPENBLAS_NUM_THREADS": given}
    command = [sys.executable, "-c", code, *words(make_hf(), tmp_path, "--dry-run")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    *_, code, has_numpy, threads, variable = done.stdout.split()
    assert (code, has_numpy, variable) == ("0", "True", str(given))
    assert given or threads == "1"


def test_importing_the_package_loads_nothing():
    code = "import sys, ml_convert; print(sorted(m for m in sys.modules if m.startswith('ml_')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "['ml_convert']\n"


def test_the_module_runs_as_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "ml_convert", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("ml-convert ")


def test_a_progress_bar_is_shown_on_a_terminal(tmp_path, make_hf):
    ours, theirs = pty.openpty()
    words_ = [sys.executable, "-m", "ml_convert", *words(make_hf(), tmp_path)]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    run = subprocess.Popen(words_, stdout=subprocess.PIPE, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # the terminal ends with an error when nobody writes to it
        while content := os.read(ours, 1 << 16):
            shown += content
    os.close(ours)
    out, _ = run.communicate(timeout=30)
    assert run.returncode == 0
    assert all(what in shown for what in (b"converting", b"verifying", b"hashing"))
    assert out.startswith(b"wrote ")


def test_the_api_of_the_package_is_complete():
    import ml_convert

    for name in ml_convert.__all__:
        assert getattr(ml_convert, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        _ = ml_convert.missing
    assert Path(ml_convert.__file__).name == "__init__.py"
