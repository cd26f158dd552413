"""The pickles inside of `torch.save` files, read without executing them and written without torch.

A pickle is a program: it names functions and asks for them to be called. `load` resolves the few
names that describe tensors, and gives every other name a stand-in that keeps what it is called with
and does nothing. So it reads checkpoints whose classes are not installed, or exist no more, and a
malicious file has no effect. `dump` writes plain values and tensors as `torch.save` does.

Names that were given a stand-in are reported, each once. Within `refusing_unknown_names()` they are
an error instead.
"""

from __future__ import annotations

import argparse
import io
import logging
import math
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from ml_convert.errors import ConversionError
from ml_convert.pickle_sizes import check_sizes
from ml_convert.tensor import DTYPES, Dtype

logger = logging.getLogger(__name__)

_refuses = ContextVar("_refuses", default=False)


class TensorPickle(NamedTuple):
    """A tensor as a pickle describes it: a part of a storage, whose bytes lie elsewhere."""

    dtype: Dtype
    shape: tuple[int, ...]
    storage: str
    """Key of the storage."""
    offset: int = 0
    """First element within the storage."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class Opaque:
    """Stands in for an object of a class that is not resolved; keeps its content, does nothing."""

    name = "unknown"

    def __new__(cls, *args: Any, **kwargs: Any) -> Opaque:
        """Keep the arguments that the class would have been called with."""
        made = super().__new__(cls)
        made.content = [args, kwargs]
        return made

    content: list[Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    def __call__(self, *args: Any, **kwargs: Any) -> Opaque:
        """Be the result of calling the object."""
        return type(self)(self, *args, **kwargs)

    def __setstate__(self, state: Any) -> None:
        self.content.append(state)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.content.append((key, value))

    def append(self, item: Any) -> None:
        """Keep what would have been appended."""
        self.content.append(item)

    def extend(self, items: Any) -> None:
        """Keep what would have been appended."""
        self.content.extend(items)

    def __repr__(self) -> str:
        return f"<{self.name}, not loaded>"


@contextmanager
def refusing_unknown_names() -> Iterator[None]:
    """Let `load` raise where it would give a name a stand-in."""
    token = _refuses.set(True)
    try:
        yield
    finally:
        _refuses.reset(token)


Known = Mapping[tuple[str, str], Any]
"""What names stand for, by module and name: each a `Function`, or a class that is harmless to call
and has a `__setstate__`, without which a pickle could change the class itself."""


def load(content: bytes, where: str, *, known: Known | None = None) -> Any:
    """Read a pickle of a `torch.save` file, with a TensorPickle for each tensor.

    Args:
        content: The pickle.
        where: Its file, for messages.
        known: Names to resolve besides those that describe tensors.

    Raises:
        ConversionError: It is damaged, or holds tensors that are not contiguous.
    """
    try:
        check_sizes(content)
        unpickler = _InertUnpickler(io.BytesIO(content), known or {})
        value = unpickler.load()
        if unpickler.unknown:
            _report(", ".join(sorted(unpickler.unknown)), where)
        return value
    except ConversionError as error:
        raise ConversionError(f"{where}: {error}") from None
    except Exception as error:  # a damaged pickle can fail in any way
        raise ConversionError(f"{where}: its pickle is damaged ({error!r})") from None


class Function:
    """A function that pickles may call; unlike Python's own kind, they cannot change it."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        """Take the function, which must be harmless whatever it is called with."""
        self._function = function

    def __call__(self, *args: Any) -> Any:
        """Call it."""
        return self._function(*args)

    def __setstate__(self, _state: Any) -> None:
        raise ConversionError("it changes a function")


class _Namespace(argparse.Namespace):
    """What is read for `argparse.Namespace`, which a pickle could change for the whole process."""

    def __setstate__(self, state: Any) -> None:
        vars(self).update(state)


class _Storage(NamedTuple):
    dtype: Dtype
    key: str
    numel: int


_reported: ContextVar[str] = ContextVar("_reported", default="")


def _report(names: str, where: str) -> None:
    """Say what was not loaded, once for all ranks of a training."""
    if names != _reported.get():
        _reported.set(names)
        logger.warning("%s: holds objects that were not loaded: %s", where, names)


class _InertUnpickler(pickle.Unpickler):
    """Resolves names to data of this module only."""

    def __init__(self, content: io.BytesIO, known: Known) -> None:
        super().__init__(content)
        self._known = {**_KNOWN, **known}
        self.unknown: dict[str, None] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._known:
            return self._known[module, name]
        if module == "torch" and name in DTYPES:
            return name
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if _refuses.get():
            raise ConversionError(
                f"its pickle names {module}.{name}, which is not known to be harmless; leave out "
                "--strict-pickle to read the file without it (nothing is ever executed)"
            )
        self.unknown[f"{module}.{name}"] = None
        return type("Opaque", (Opaque,), {"name": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        kind, storage_type, key, _location, numel = pid
        if kind != "storage":
            raise ConversionError(f"unknown persistent id {kind!r}")
        if not isinstance(storage_type, Dtype):
            raise ConversionError(f"tensors of type {storage_type!r} are not supported")
        return _Storage(storage_type, str(key), int(numel))


@Function
def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, *_ignored: Any
) -> TensorPickle:
    found = TensorPickle(storage.dtype, tuple(map(int, shape)), storage.key, int(offset))
    if found.numel and not _is_contiguous(found.shape, tuple(stride)):
        raise ConversionError(f"a tensor of shape {found.shape} is not contiguous")
    if min(found.offset, *found.shape, 0) < 0 or found.offset + found.numel > storage.numel:
        raise ConversionError(f"a tensor of shape {found.shape} reaches beyond its storage")
    return found


@Function
def _rebuild_parameter(data: Any, *_ignored: Any) -> Any:
    return data


@Function
def _rebuild_from_type(function: Any, _type: Any, arguments: Any, _state: Any) -> Any:
    known = function in (_rebuild_tensor, _rebuild_parameter)
    return function(*arguments) if known else Opaque(function, arguments)


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    dense = zip(shape, stride, _contiguous(shape), strict=True)
    return all(found == needed for size, found, needed in dense if size != 1)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


_KNOWN: Mapping[tuple[str, str], Any] = {
    ("argparse", "Namespace"): _Namespace,
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
}
_STORAGES = {dtype.torch_storage: dtype for dtype in DTYPES.values()}


class Global(NamedTuple):
    """A name to write, whose object the reader imports."""

    module: str
    name: str


class Instance(NamedTuple):
    """An object to write, made by the reader."""

    cls: Global
    state: Any
    """What it holds: a dict of its attributes, or what its `__setstate__` takes."""


class Items(NamedTuple):
    """A list to write that is never whole here."""

    items: Iterable[Any]


class Call(NamedTuple):
    """An object to write, that the reader gets by a call."""

    function: Global
    arguments: tuple[Any, ...]


class Pairs(NamedTuple):
    """A dict to write, whose keys cannot be those of a dict here, or which is never whole here."""

    items: Iterable[tuple[Any, Any]]


def dump(value: Any) -> bytes:
    """Write a pickle of protocol 2 that `torch.load` reads, also with `weights_only=True`.

    Args:
        value: Any nesting of dict, list, tuple, argparse.Namespace, None, bool, int, float, str and
            TensorPickle, Pairs and Items; also Global, Instance and Call, which `weights_only` does
            not read.
    """
    out = _Pickle(b"\x80\x02")
    _emit(out, value)
    return bytes(out + b".")


class _Pickle(bytearray):
    """A pickle that grows, and what was written before and needs no second time."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self._places: dict[str | Global, int] = {}

    def remember(self, value: str | Global) -> None:
        """Write a word or a name, of which there are few: once, and then where it is."""
        place = self._places.get(value)
        if place is not None:
            self += struct.pack("<cI", b"j", place)
            return
        place = self._places[value] = len(self._places)
        if isinstance(value, str):
            _emit_str(self, value)
        else:
            self += f"c{value.module}\n{value.name}\n".encode()
        self += struct.pack("<cI", b"r", place)


def _emit(out: _Pickle, value: Any) -> None:
    emit = _EMIT.get(type(value))
    if emit is None:
        raise TypeError(f"values of type {type(value).__name__} cannot be written")
    emit(out, value)


def _emit_bool(out: _Pickle, value: bool) -> None:
    out += b"\x88" if value else b"\x89"


def _emit_int(out: _Pickle, value: int) -> None:
    if -(1 << 31) <= value < 1 << 31:
        out += b"J" + struct.pack("<i", value)
    else:
        content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        out += b"\x8a" + struct.pack("<B", len(content)) + content


def _emit_float(out: _Pickle, value: float) -> None:
    out += b"G" + struct.pack(">d", value)


def _emit_str(out: _Pickle, value: str) -> None:
    content = value.encode()
    out += b"X" + struct.pack("<I", len(content)) + content


def _emit_tuple(out: _Pickle, value: tuple[Any, ...]) -> None:
    out += b"("
    for item in value:
        _emit(out, item)
    out += b"t"


def _emit_list(out: _Pickle, value: list[Any]) -> None:
    _emit_items(out, Items(value))


def _emit_items(out: _Pickle, value: Items) -> None:
    out += b"]("
    for item in value.items:
        _emit(out, item)
    out += b"e"


def _emit_dict(out: _Pickle, value: dict[Any, Any]) -> None:
    _emit_pairs(out, Pairs(value.items()))


def _emit_pairs(out: _Pickle, value: Pairs) -> None:
    out += b"}("
    for key, item in value.items:
        _emit(out, key)
        _emit(out, item)
    out += b"u"


def _emit_namespace(out: _Pickle, value: argparse.Namespace) -> None:
    out += b"cargparse\nNamespace\n)\x81"
    _emit_dict(out, vars(value))
    out += b"b"


def _emit_tensor(out: _Pickle, value: TensorPickle) -> None:
    """A call of torch._utils._rebuild_tensor_v2, whose storage is a persistent id."""
    out.remember(Global("torch._utils", "_rebuild_tensor_v2"))
    out += b"(("
    out.remember("storage")
    out.remember(Global("torch", value.dtype.torch_storage))
    _emit_str(out, value.storage)
    out.remember("cpu")
    _emit_int(out, value.numel)
    out += b"tQ"
    _emit_int(out, value.offset)
    _emit_tuple(out, value.shape)
    _emit_tuple(out, _contiguous(value.shape))
    _emit_bool(out, False)
    out.remember(Global("collections", "OrderedDict"))
    out += b")RtR"


def _emit_global(out: _Pickle, value: Global) -> None:
    out.remember(value)


def _emit_instance(out: _Pickle, value: Instance) -> None:
    out.remember(value.cls)
    out += b")\x81"
    if isinstance(value.state, dict):
        out += b"}("
        for name, item in value.state.items():
            out.remember(name)
            _emit(out, item)
        out += b"u"
    else:
        _emit(out, value.state)
    out += b"b"


def _emit_call(out: _Pickle, value: Call) -> None:
    out.remember(value.function)
    _emit_tuple(out, value.arguments)
    out += b"R"


_EMIT: Mapping[type, Callable[[_Pickle, Any], None]] = {
    type(None): lambda out, _value: out.extend(b"N"),
    bool: _emit_bool,
    int: _emit_int,
    float: _emit_float,
    str: _emit_str,
    tuple: _emit_tuple,
    list: _emit_list,
    dict: _emit_dict,
    argparse.Namespace: _emit_namespace,
    TensorPickle: _emit_tensor,
    Global: _emit_global,
    Instance: _emit_instance,
    Call: _emit_call,
    Pairs: _emit_pairs,
    Items: _emit_items,
}
