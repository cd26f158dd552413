"""What the READMEs say is true: their commands and examples run, their tables are current.

| in a README | here |
|---|---|
| a `bash` or `sh` block, one that begins with a program, after `$ ` in a `console` block | run |
| the same after `<!-- test: parse -->` | flags are checked only: it needs a cluster, or long |
| a `console` block after `<!-- test: output -->` | and what it prints, apart from numbers |
| anything after `<!-- test: fresh -->` | run without the files that blocks before it have made |
| `ml-convert ... --flag` | the flags must exist |
| `pip`, `hatch` | must be what CI runs, or name a script or package of this repository |
| a `python` block | run; what follows `print(...)  #` must be printed; `parse`: compiled |
| a `yaml` block | must be flags of `ml-train pretrain` |
| `<!-- generated: NAME -->` to `<!-- end -->` | what the code says; UPDATE_README=1 rewrites it |
| links to files | must exist |

Each README has a directory of its own, with what `make_world` puts there, and a process of its own,
forked where torch and megatron-core are imported already.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import logging
import multiprocessing
import os
import re
import shlex
import shutil
import sys
import tomllib
import traceback
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
READMES = [ROOT / "README.md", *sorted(ROOT.glob("packages/*/README.md"))]
CHINESE = ROOT / "README.zh-CN.md"
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["envs"]["default"][
    "scripts"
]
CONFIGS = {
    "ml-convert": "ml_convert.request:Request",
    "ml-data inspect": "ml_data.inspection:InspectConfig",
    "ml-data instruct": "ml_data.instruct:InstructConfig",
    "ml-data merge": "ml_data.merge:MergeConfig",
    "ml-data preference": "ml_data.preference:PreferenceConfig",
    "ml-data preprocess": "ml_data.preprocess:PreprocessConfig",
    "ml-data pretrain": "ml_data.pretrain:PretrainConfig",
    "ml-eval generate": "ml_eval.config:GenerateConfig",
    "ml-train pretrain": "ml_train.config:PretrainConfig",
    "ml-train report": "ml_train.report:ReportConfig",
}
PROGRAMS = {name.partition(" ")[0] for name in CONFIGS}
MODELS = ("Llama-2-7b-hf", "TinyLlama-1.1B", "llama-3-8b", "llama-3-70b", "model")
"""Names that READMEs give to Hugging Face directories."""
CONVERSATIONS = {
    "alpaca": [
        {"instruction": "Name a prime.", "input": "", "output": "Seven."},
        {"instruction": "Add the numbers.", "input": "2 and 3", "output": "5"},
        {"instruction": "Name a colour.", "input": "", "output": ""},
    ],
    "chats": [
        {
            "messages": [
                {"role": "user", "content": "Name a prime."},
                {"role": "assistant", "content": "Seven."},
                {"role": "user", "content": "And one below?"},
                {"role": "assistant", "content": "Five."},
            ]
        }
    ],
    "pairs": [
        {"instruction": "Name a prime.", "input": "", "chosen": "Seven.", "rejected": "Nine."},
        {"instruction": "Name a colour.", "input": "", "chosen": "Red.", "rejected": "Seven."},
    ],
}
"""Files that READMEs name, by name without .jsonl."""
TEMPLATE = {
    "user": ["Q: {{content}}\nA:"],
    "assistant": [" {{content}}", {"special": "eos"}],
    "separator": ["\n"],
}
"""The template that the README of ml-data shows."""
STARTS = {*PROGRAMS, "pip", "python", "torchrun"}
SHELL_LINES = {"source .venv/bin/activate"}


# What a README holds


class Block(NamedTuple):
    """A fenced block."""

    language: str
    text: str
    marker: str
    """What `<!-- test: ... -->` right before it says."""

    def commands(self) -> Iterator[list[str]]:
        """Yield the words of each command."""
        first = (self.text.split() or [""])[0]
        shell = ("bash", "console", "sh") if first not in STARTS else ("bash", "console", "sh", "")
        if self.language not in shell:
            return
        joined = self.text.replace("\\\n", " ")
        for line in joined.splitlines():
            if self.language == "console":
                if not line.startswith("$ "):
                    continue  # output
                line = line[2:]
            words = shlex.split(line, comments=True)
            while "&&" in words:
                end = words.index("&&")
                yield words[:end]
                words = words[end + 1 :]
            if words:
                yield words


_FENCE = re.compile(
    r"(?:<!-- test: (?P<marker>\w+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)


def blocks(path: Path) -> list[Block]:
    found = _FENCE.finditer(path.read_text(encoding="utf-8"))
    return [Block(match["language"], match["text"], match["marker"] or "") for match in found]


# Running it


class WrongError(Exception):
    """Something a README says is not so."""


def run_blocks(found: list[Block], make_world: Callable[[], Path]) -> None:
    """Do everything that a README says, in order; called in a process of its own."""
    os.chdir(make_world())
    names: dict[str, Any] = {"__name__": "readme"}
    for block in found:
        if block.marker == "fresh":
            os.chdir(make_world())
        if block.language == "python":
            run_python(block, names)
        elif block.language == "yaml":
            Path("block.yaml").write_text(block.text)
            flags = ["--config", "llama-tiny.yaml", "--config", "block.yaml", "--data-path", "x"]
            parse_only(["ml-train", "pretrain", *flags])
        outputs = [
            check_command(words, parse=block.marker == "parse") for words in block.commands()
        ]
        if block.marker == "output":
            check_output(block, outputs)


def run_python(block: Block, names: dict[str, Any]) -> None:
    code = compile(block.text, "<README>", "exec")
    if block.marker == "parse":
        return
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(code, names)
    lines = shown.getvalue().splitlines()
    for expected in re.findall(r"^\s*print\(.*\)  # (.+)$", block.text, re.M):
        if expected not in lines:
            raise WrongError(f"python block: printed {lines}, not {expected!r}")


def check_output(block: Block, outputs: list[str]) -> None:
    """Compare what commands print with what the README shows, apart from numbers and spaces."""
    shown = re.split(r"^\$ (?:.*\\\n)*.*\n", block.text, flags=re.M)[1:]
    for expected, output in zip(shown, outputs, strict=True):
        if without_numbers(expected) != without_numbers(output):
            raise WrongError(f"prints\n{output}\nnot\n{expected}")


def without_numbers(output: str) -> str:
    """Return an output without what depends on texts, time and place."""
    output = re.sub(r"[0-9a-f]{64}", "HASH", output)
    output = re.sub(r"#+", "#", re.sub(r"[\d,.]*\d", "0", output))
    return "\n".join(" ".join(line.split()) for line in output.strip().splitlines())


def check_command(words: list[str], *, parse: bool) -> str:
    """Check a command; return what it printed if it was run."""
    if " ".join(words) in SHELL_LINES or words[:2] == ["kill", "-TERM"]:
        return ""
    if words[:3] == ["python", "-m", "pip"] or words[0] == "pip":
        check_pip(words[words.index("pip") + 1 :])
    elif words[:3] == ["python", "-m", "hatch"]:
        check_hatch(words[3:])
    elif words[0] == "torchrun":
        check_torchrun(words[1:])
    elif words[0] == "python" and words[1].startswith("tools/"):
        if not Path(words[1]).is_file():
            raise WrongError(f"{shlex.join(words)}: {words[1]} does not exist")
    else:
        return check_program(words, parse=parse)
    return ""


def check_program(words: list[str], *, parse: bool) -> str:
    """Run a command of ours, or read its flags only; of a sketch with `...`, those it shows."""
    if words[0] not in PROGRAMS:
        raise WrongError(f"{shlex.join(words)}: {words[0]} is no program this test knows")
    if "..." in words:
        command = "-".join(words[: words.index("...")])
        known = (ROOT / "tests" / "flags" / f"{command}.txt").read_text().split()
        missing = {word for word in words if word.startswith("--")} - set(known)
        if missing:
            raise WrongError(f"{shlex.join(words)}: there is no {missing}")
    elif parse:
        parse_only(words)
    else:
        return run_program(words)
    return ""


def check_torchrun(words: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    given = get_args_parser().parse_args(words)
    if not given.module:
        raise WrongError(f"torchrun {shlex.join(words)}: no -m MODULE")
    program = given.training_script.replace("_", "-")
    parse_only([program, *given.training_script_args], ranks=int(given.nproc_per_node))


def check_pip(words: list[str]) -> None:
    if words == ["install", "hatch"]:
        return
    line = f"pip {shlex.join(words)}"
    projects = {
        path.parent.name: tomllib.loads(path.read_text())["project"]
        for path in ROOT.glob("packages/*/pyproject.toml")
    }
    requirements = [text for project in projects.values() for text in project["dependencies"]]
    known = {re.split(r"[<>=~\[]", text)[0] for text in requirements}
    known |= {"--find-links", "dist", "--no-deps", "--no-index"}
    for word in words[1:]:
        name, _, extra = word.rstrip("]").partition("[")
        if name in projects and "--find-links dist" not in line:
            raise WrongError(f"{line}: {name} without `--find-links dist`")
        if extra and extra not in projects[name].get("optional-dependencies", {}):
            raise WrongError(f"{line}: {name} has no extra {extra}")
        if name not in known | projects.keys():
            raise WrongError(f"{line}: there is no package {name}")


def check_hatch(words: list[str]) -> None:
    if words == ["build", "--all"]:
        return
    if words[0] != "run" or words[1] not in SCRIPTS:
        raise WrongError(f"hatch {shlex.join(words)}: not a script of pyproject.toml")
    arguments = [word for word in words[2:] if not word.startswith("-")]
    missing = [word for word in arguments if "/" in word and not (ROOT / word).exists()]
    if missing:
        raise WrongError(f"hatch {shlex.join(words)}: {missing[0]} does not exist")


def parse_only(words: list[str], ranks: int | None = None) -> None:
    """Check the flags of a command as the command does."""
    from ml_models.flags import parse
    from ml_train.config import check_world

    name = words[0] if words[0] in CONFIGS else " ".join(words[:2])
    if name not in CONFIGS:
        raise WrongError(f"{shlex.join(words)}: there is no command {name}")
    module, _, kind = CONFIGS[name].partition(":")
    config = parse(getattr(import_module(module), kind), words[name.count(" ") + 1 :], prog=name)
    if name == "ml-train pretrain":
        check_world(config, ranks or config.launch.world_size)


def run_program(words: list[str]) -> str:
    """Run one of our programs in a forked process; return what it printed."""
    main = import_module(f"{words[0].replace('-', '_')}.cli").main
    code, output = forked(main, words[1:])
    if code != 0:
        raise WrongError(f"{shlex.join(words)}: exit code {code}\n{output[-2000:]}")
    return output


def forked(function: Callable[..., int | None], *args: Any) -> tuple[int | None, str]:
    """Call a function in a forked process; returns its exit code and what it wrote."""
    log = Path(f"log-{os.getpid()}.txt")
    process = multiprocessing.get_context("fork").Process(target=_child, args=(log, function, args))
    process.start()
    process.join()
    return process.exitcode, log.read_text(encoding="utf-8", errors="replace")


def _child(log: Path, function: Callable[..., int | None], args: tuple[Any, ...]) -> None:
    with log.open("wb") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    warnings.resetwarnings()
    logging.root.handlers.clear()  # pytest's: a program sets up its own
    try:
        code = function(*args) or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the fork carries pytest's exit handlers


# A directory to run it in


@pytest.fixture(scope="session")
def make_world(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Return a function that makes a directory with the files READMEs mention."""
    template = tmp_path_factory.mktemp("world")
    _write_texts(template)
    _write_model(template / "llama")
    _write_adapter(template / "adapter")

    def make() -> Path:
        directory = tmp_path_factory.mktemp("readme") / "world"
        shutil.copytree(template, directory)
        for name in MODELS:
            (directory / name).symlink_to("llama")
        (directory / "tokenizer").mkdir()
        for path in directory.glob("llama/tokenizer*"):
            shutil.copy(path, directory / "tokenizer")
        for name in ("examples", "tools"):
            (directory / name).symlink_to(ROOT / name)
        shutil.copy(ROOT / "examples" / "llama-tiny.yaml", directory)
        return directory

    return make


def _write_texts(directory: Path) -> None:
    from pydoc_data.topics import topics

    lines = [json.dumps({"text": text}) + "\n" for text in topics.values()]
    (directory / "corpus").mkdir()
    for path in (directory / "corpus.jsonl", directory / "corpus" / "part.jsonl"):
        path.write_text("".join(lines))
    (directory / "questions.txt").write_text("Why?\nHow?\n")
    for name, records in CONVERSATIONS.items():
        lines = [json.dumps(record) + "\n" for record in records]
        (directory / f"{name}.jsonl").write_text("".join(lines))
    (directory / "template.json").write_text(json.dumps(TEMPLATE))


def _write_model(directory: Path) -> None:
    """Write a random Llama as transformers does, with a tokenizer of the texts."""
    from pydoc_data.topics import topics

    import tokenizers
    import torch
    import transformers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=509, special_tokens=["</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(list(topics.values())[:8], trainer)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=509,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=256,
        eos_token_id=0,
        bos_token_id=None,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def _write_adapter(directory: Path) -> None:
    """Write a random adapter for that model, as PEFT does."""
    import torch
    from safetensors.torch import save_file

    tensors = {}
    for layer in range(4):
        for name, rows in (("q_proj", 64), ("v_proj", 32)):
            module = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(4, 64)
            tensors[f"{module}.lora_B.weight"] = torch.randn(rows, 4)
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(config))


# Tests


@pytest.fixture(scope="session")
def _engine() -> None:
    """Import once what the commands import, so that their processes begin with it."""
    from ml_parallel import platform

    platform.import_engine()
    for module in ("transformers", "ml_train.loop", "ml_eval.engine"):
        import_module(module)


def run_readme(readme: Path, make_world: Callable[[], Path]) -> str:
    """Return what is wrong with the blocks of a README, "" if nothing is."""
    import torch

    torch.set_num_threads(1)
    code, output = forked(run_blocks, blocks(readme), make_world)
    return "" if code == 0 else output


@pytest.mark.slow
@pytest.mark.usefixtures("_engine")
@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_what_a_readme_says_works(
    readme: Path,
    make_world: Callable[[], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    wrong = run_readme(readme, make_world)
    if wrong:
        pytest.fail(wrong, pytrace=False)


def test_both_languages_show_the_same() -> None:
    english, chinese = blocks(ROOT / "README.md"), blocks(CHINESE)
    assert [list(block.commands()) for block in chinese] == [
        list(block.commands()) for block in english
    ]
    codes = [
        [ast.dump(ast.parse(block.text)) for block in found if block.language == "python"]
        for found in (english, chinese)
    ]
    assert codes[0] == codes[1]
    assert [block.marker for block in chinese] == [block.marker for block in english]


@pytest.mark.parametrize(
    "readme", [*READMES, CHINESE], ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_links_lead_to_files(readme: Path) -> None:
    text = readme.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)|<img src=\"(?!https?:)([^\"]+)", text)
    missing = [
        link for pair in links for link in pair if link and not (readme.parent / link).exists()
    ]
    assert missing == []


def operators_table() -> str:
    from ml_kernels.dispatch import DEVICES, IMPLEMENTATIONS, operators

    rows = [f"| function | {' | '.join(d.upper() for d in DEVICES)} |", "|---|---|---|---|"]
    for operator in operators():
        targets = [IMPLEMENTATIONS.get((operator, device), "") for device in DEVICES]
        kinds = ["torch" if t.startswith("ml_kernels.fused:") or not t else "own" for t in targets]
        rows.append(f"| `{operator}` | {' | '.join(kinds)} |")
    return "\n".join(rows) + "\n"


def patches_table() -> str:
    from ml_parallel.platform import active_patches

    everywhere = {patch.target for patch in active_patches("cuda")}
    rows = ["| name | where | why |", "|---|---|---|"]
    for patch in active_patches("cpu"):
        where = "everywhere" if patch.target in everywhere else "CPU"
        rows.append(f"| `{patch.target}` | {where} | {patch.reason} |")
    return "\n".join(rows) + "\n"


def families_table() -> str:
    from ml_models import registry

    rows = ["| family | also | `model_type` | published sizes |", "|---|---|---|---|"]
    for family in map(registry.family, registry.names()):
        types = ", ".join(f"`{kind}`" for kind in family.model_types)
        sizes = ", ".join(size.name for size in family.sizes)
        rows.append(f"| {family.name} | {', '.join(family.aliases)} | {types} | {sizes} |")
    return "\n".join(rows) + "\n"


def templates_table() -> str:
    from ml_data.templates import load_template, names

    rows = ["| template | |", "|---|---|"]
    rows += [f"| `{name}` | {load_template(name).about} |" for name in names()]
    return "\n".join(rows) + "\n"


def matrix_table() -> str:
    from conversion_matrix import table

    return table()


@pytest.mark.parametrize(
    ("package", "name", "make"),
    [
        ("ml-kernels", "operators", operators_table),
        ("ml-parallel", "patches", patches_table),
        ("ml-models", "families", families_table),
        ("ml-data", "templates", templates_table),
        pytest.param("ml-convert", "matrix", matrix_table, marks=pytest.mark.slow),
    ],
)
def test_generated_tables_are_current(package: str, name: str, make: Callable[[], str]) -> None:
    readme = ROOT / "packages" / package / "README.md"
    before, start, rest = readme.read_text().partition(f"<!-- generated: {name} -->\n")
    table, end, after = rest.partition("<!-- end -->")
    assert start, f"{readme} has no generated table {name}"
    assert end, f"{readme} has no generated table {name}"
    if os.environ.get("UPDATE_README"):
        readme.write_text(f"{before}{start}{make()}{end}{after}")
        return
    assert table == make(), "run with UPDATE_README=1 to rewrite it"


@pytest.mark.slow
@pytest.mark.usefixtures("_engine")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```bash\nml-data inspect --data-pth x\n```\n", "did you mean --data-path"),
        ("```bash\nml-data inspect --data-path nowhere\n```\n", "nowhere"),
        (
            "<!-- test: output -->\n```console\n$ ml-data --version\nml-data one\n```\n",
            "not\nml-data one",
        ),
        ("```bash\nml-convrt --load-dir x\n```\n", "ml-convrt is no program"),
        ("<!-- test: parse -->\n```console\n$ ml-train pretrain --lrr 1\n```\n", "--lrr"),
        ("```bash\npip install ml-models\n```\n", "ml-models without `--find-links dist`"),
        ("```bash\npip install --find-links dist ml-model\n```\n", "no package ml-model"),
        ("```bash\nml-convert ... --dry-rn\n```\n", "there is no {'--dry-rn'}"),
        ("```bash\npython -m hatch run tets\n```\n", "not a script of pyproject.toml"),
        ("```python\nimport ml_kernels.nothing\n```\n", "No module named"),
        ("```python\nprint(1 + 1)  # 3\n```\n", "not '3'"),
        ("```yaml\nlearning_rat: 3\n```\n", "unknown flag --learning-rat"),
    ],
)
def test_planted_mistakes_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "examples" / "llama-tiny.yaml", tmp_path)
    (tmp_path / "README.md").write_text(text)
    assert message in run_readme(tmp_path / "README.md", lambda: tmp_path)
