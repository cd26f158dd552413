"""Load torch_npu on a machine without an NPU: stand-ins for Ascend's CANN libraries.

The installed wheel names every C function it wants: those its libraries are linked against, and
those it looks up while running, whose names are among its strings. `cann.c` answers the few whose
answer matters; a function that returns 0 (success) is generated for each of the others. They are
compiled with gcc once per wheel, in seconds, and kept inside the environment.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

ANSWERS = Path(__file__).with_name("cann.c")
LIBRARIES = ("ascendcl", "hccl", "acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel")
"""What torch_npu's libraries need, the one with all functions first."""

# The runtime, compiler and profiler, and the collectives; not the kernels (aclnn...), which nothing
# calls here.
_NAME = rb"(?:acl(?:rt|sys|prof|mdl|op)?[A-Z]|Hccl[A-Z]|Msprof[A-Z]|rt[A-Z])\w+"


def load() -> None:
    """Import torch_npu with the stand-ins in place of CANN.

    Raises:
        OSError: A stand-in does not load; the message names it.
    """
    # With torch_npu installed, torch would import it by itself, too early.
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    folder = build()
    for name in LIBRARIES:
        ctypes.CDLL(str(folder / f"lib{name}.so"), mode=ctypes.RTLD_GLOBAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("torch_npu")


def build() -> Path:
    """Return the folder of the stand-ins, compiled if they are not there yet."""
    key = hashlib.sha256(ANSWERS.read_bytes() + Path(__file__).read_bytes())
    key.update(version("torch_npu").encode())
    folder = Path(sys.prefix) / "cann-stubs" / key.hexdigest()[:16]
    if not folder.is_dir():
        folder.parent.mkdir(exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=folder.parent))
        _compile(draft)
        try:
            draft.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(draft)
    return folder


def wanted_names() -> list[str]:
    """List the C functions of CANN that the installed wheel links against or looks up."""
    spec = importlib.util.find_spec("torch_npu")
    assert spec is not None
    assert spec.origin is not None
    names: set[bytes] = set()
    for library in sorted((Path(spec.origin).parent / "lib").glob("*.so")):
        # Symbol tables and string constants alike end each name with a zero byte.
        names.update(re.findall(rb"(?<=\0)" + _NAME + rb"(?=\0)", library.read_bytes()))
    return sorted(map(bytes.decode, names))


def _compile(folder: Path) -> None:
    answers = ANSWERS.read_text()
    rest = (name for name in wanted_names() if not re.search(rf"\b{name}\(", answers))
    source = folder / "stubs.c"
    source.write_text(answers + "".join(f"int {name}(void) {{ return 0; }}\n" for name in rest))
    for name in LIBRARIES:
        # torch_npu looks a function up in the library that CANN has it in. All are in the first;
        # the others find them there because they are linked against it.
        first = name == LIBRARIES[0]
        linked = [] if first else ["-Wl,--no-as-needed", f"-L{folder}", f"-l{LIBRARIES[0]}"]
        subprocess.run(
            [
                *("gcc", "-shared", "-fPIC", "-O1", f"-Wl,-soname,lib{name}.so"),
                *("-o", folder / f"lib{name}.so"),
                *([source] if first else ["-Wl,-rpath,$ORIGIN", *linked]),
            ],
            check=True,
        )
