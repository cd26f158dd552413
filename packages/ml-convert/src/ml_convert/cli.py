"""The command `ml-convert`. Whatever takes time to import is imported when it runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ml_models.commands import UsageError, run_command

if TYPE_CHECKING:
    from ml_convert.conversion import Progress
    from ml_convert.report import Report
    from ml_convert.request import Request

PROG = "ml-convert"
DESCRIPTION = """Convert model weights between Hugging Face, Megatron-Legacy and Megatron-Core, for
any tensor-, pipeline- and expert-parallel layout. Needs neither the model nor torch, and little
memory. Command lines of ModelLink's convert_ckpt.py are understood, too."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    return run_command(PROG, lambda: _run(words))


def _run(argv: Sequence[str]) -> int:
    import logging

    from ml_convert.request import Request
    from ml_models import flags

    request = flags.parse(Request, _in_our_words(argv), prog=PROG, description=DESCRIPTION)
    _import_numpy()
    from ml_convert.conversion import convert
    from ml_convert.errors import VerificationError

    logging.basicConfig(level=logging.WARNING, format=f"{PROG}: %(message)s", stream=sys.stderr)
    try:
        with _progress_bar() as progress:
            report = convert(request, progress=progress)
    except VerificationError as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 1
    _print(report, request)
    return 0


def _import_numpy() -> None:
    """Import NumPy, but not the threads that its OpenBLAS starts for all cores, waiting in a loop.

    Work is on threads of our own. Another OpenBLAS, such as that of torch, may still start some.
    """
    import os
    from importlib import import_module

    variable = "OPENBLAS_NUM_THREADS"
    if variable in os.environ:
        return
    os.environ[variable] = "1"
    try:
        import_module("numpy")
    finally:
        del os.environ[variable]


def _in_our_words(argv: Sequence[str]) -> Sequence[str]:
    """Translate a command line of ModelLink, and say what it is in ours."""
    from ml_convert import modellink

    try:
        found = modellink.translate(argv)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if found is None:
        return argv
    print(f"{PROG}: this is now written {found}", file=sys.stderr)
    found.check_origin()
    if found.dropped:
        names = ", ".join(found.dropped)
        print(f"{PROG}: {names}: not needed, the checkpoint says it", file=sys.stderr)
    return found.words


@contextmanager
def _progress_bar() -> Iterator[Progress | None]:
    """Show how far the work is, on a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Bars("{task.description}", *columns, console=Console(stderr=True)) as bars:
        tasks = {}

        def progress(what: str, nbytes: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.advance(tasks[what], nbytes)

        yield progress


def _print(report: Report, request: Request) -> None:
    if request.dry_run:
        _print_plan(report)
    done = "would write" if request.dry_run else "compared" if request.verify_only else "wrote"
    padding = f", {_size(report.padding)} of padding" if report.padding else ""
    verified = ", verified bit by bit" if report.verified else ""
    resumed = f", files done before: {report.resumed}" if report.resumed else ""
    others = " in the others" if report.resumed else ""
    rounded = f", {report.rounded:,} elements rounded{others}" if report.rounded else ""
    logits = f"; {report.logits}" if report.logits else ""
    free = f" of {_size(report.free)} that are free" if report.free is not None else ""
    print(
        f"{done} {report.path}: {report.parameters / 1e6:,.1f} million parameters in "
        f"{len(report.files)} file{'s' * (len(report.files) != 1)} "
        f"({_size(report.size)}{free}{padding}) from {report.source}, "
        f"{report.seconds:.1f} s{resumed}{rounded}{verified}{logits}"
    )


def _print_plan(report: Report) -> None:
    """List every file, and under it every tensor with what it is made of."""
    for file in report.files:
        print(f"{_size(file.size):>10}  {file.tensors:5} tensors  {report.path / file.name}")
        for entry in report.plan:
            if entry.file == file.name:
                print(f"{_size(entry.nbytes):>10}  {entry}")


def _size(nbytes: int) -> str:
    size, unit = float(nbytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
