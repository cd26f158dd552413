"""The `.metadata` of a torch.distributed checkpoint: which tensor lies in which file, and where.

It is a pickle of the dataclasses of torch.distributed.checkpoint. A tensor of the whole model is
there in chunks, each with its offset in the tensor; each chunk is a part of a .distcp file. Here it
is read without importing what it names, and written without torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from ml_convert import pickles
from ml_convert.errors import ConversionError
from ml_convert.files import is_file_name
from ml_convert.pickles import Call, Global, Instance, Items, Pairs
from ml_convert.table import Table
from ml_convert.tensor import DTYPES, Dtype

METADATA = ".metadata"

_LONGEST = 1 << 30
_MODULE = "torch.distributed.checkpoint.metadata"
_STORAGE_INFO = Global("torch.distributed.checkpoint.filesystem", "_StorageInfo")
_VERSION = "1.0.0"  # of torch's format; older ones have none


class Chunk(NamedTuple):
    """A part of a tensor, and where its bytes are."""

    offsets: tuple[int, ...]
    """Its first index along each axis of the tensor."""
    shape: tuple[int, ...]
    file: str
    """Name of the file beside `.metadata`."""
    start: int
    """Where in the file."""
    length: int
    """Bytes there, which are a file of torch.save of their own."""


def chunk_table(chunks: Iterable[Chunk] = ()) -> Table[Chunk]:
    """Return a list of chunks that takes little memory."""
    return Table(Chunk, chunks, numbers=("start", "length"))


class Tensor(NamedTuple):
    """A tensor of the whole model."""

    dtype: Dtype
    shape: tuple[int, ...]
    chunks: Sequence[Chunk]


class Bytes(NamedTuple):
    """An object that is no tensor, pickled in a part of a file."""

    key: str
    file: str
    start: int
    length: int


def bytes_table(objects: Iterable[Bytes] = ()) -> Table[Bytes]:
    """Return a list of objects that takes little memory."""
    return Table(Bytes, objects, numbers=("start", "length"))


@dataclass(frozen=True)
class Metadata:
    """What a checkpoint holds."""

    tensors: Mapping[str, Tensor]
    objects: Sequence[Bytes]


# Reading


class _Record:
    """Stands in for a dataclass: keeps its attributes."""

    def __new__(cls, *_: Any) -> _Record:
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        """Do nothing with arguments."""

    def __setstate__(self, state: Any) -> None:
        content = state if isinstance(state, dict) else {"state": state}
        self.__dict__ = {str(name): value for name, value in content.items()}

    def get(self, name: str) -> Any:
        """Return an attribute, or None."""
        return self.__dict__.get(name)


class _Metadata(_Record):
    """All of it."""


class _Tensor(_Record):
    """A tensor."""


class _Small:
    """Stands in for a dataclass of which there are many: keeps these attributes only."""

    __slots__: tuple[str, ...] = ()

    def __new__(cls, *_: Any) -> Self:
        made = super().__new__(cls)
        for name in cls.__slots__:
            setattr(made, name, None)
        return made

    def __init__(self, *_: Any) -> None:
        """Do nothing with arguments."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            for name in self.__slots__:
                setattr(self, name, state.get(name))
            state.clear()  # the unpickler keeps it to the end

    def get(self, name: str) -> Any:
        """Return an attribute."""
        return getattr(self, name)


class _Index(_Small):
    """What a part of a file holds."""

    __slots__ = ("fqn", "offset")

    fqn: Any
    offset: Any

    @classmethod
    def of(cls, fqn: str, offset: tuple[int, ...] | None) -> _Index:
        """Make one to look for."""
        made = cls()
        made.fqn, made.offset = fqn, offset
        return made

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, _Index) and (self.fqn, self.offset) == (other.fqn, other.offset)
        return bool(same)

    def __hash__(self) -> int:
        return hash((self.fqn, self.offset))


class _Info(_Small):
    """A part of a file."""

    __slots__ = ("length", "offset", "relative_path", "transform_descriptors")


class _Bytes(_Small):
    """An object."""


class _Chunk(_Small):
    """A part of a tensor."""

    __slots__ = ("offsets", "sizes")


@pickles.Function
def _size(values: Iterable[Any] = ()) -> tuple[int, ...]:
    return tuple(int(value) for value in values)


_STRATEGY = "megatron.core.dist_checkpointing.strategies.torch"
_KNOWN: Mapping[tuple[str, str], Callable[..., Any]] = {
    (_MODULE, "Metadata"): _Metadata,
    (_STRATEGY, "MCoreMetadata"): _Metadata,
    (_MODULE, "TensorStorageMetadata"): _Tensor,
    (_MODULE, "BytesStorageMetadata"): _Bytes,
    (_MODULE, "MetadataIndex"): _Index,
    _STORAGE_INFO: _Info,
    (_MODULE, "ChunkStorageMetadata"): _Chunk,
    (_MODULE, "TensorProperties"): _Record,
    (_MODULE, "StorageMeta"): _Record,
    (_MODULE, "_MEM_FORMAT_ENCODING"): _Record,
    (_STRATEGY, "MCoreSavePlan"): _Record,
    ("torch.serialization", "_get_layout"): _Record,
    ("torch", "Size"): _size,
    ("pathlib", "PosixPath"): _Record,
    ("pathlib", "Path"): _Record,
}


def read(directory: Path) -> Metadata:
    """Read what a checkpoint holds; executes nothing.

    Raises:
        ConversionError: `.metadata` is damaged, or names parts of files that are not there.
    """
    path = directory / METADATA
    if path.stat().st_size > _LONGEST:
        raise ConversionError(f"{path}: is larger than {_LONGEST} bytes")
    content = pickles.load(path.read_bytes(), str(path), known=_KNOWN)
    try:
        found = _decoded(content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConversionError(f"{path}: is no torch.distributed metadata ({error!r})") from None
    for key, tensor in found.tensors.items():
        _check_covered(path, key, tensor)
    _check_files(directory, found)
    return found


def _decoded(content: Any) -> Metadata:
    if not isinstance(content, _Metadata):
        raise TypeError(f"it holds {type(content).__name__}")
    places = content.get("storage_data") or {}
    tensors, objects = {}, bytes_table()
    for key, entry in content.get("state_dict_metadata").items():
        if not isinstance(key, str):
            raise TypeError(f"{key!r} is no name")
        if isinstance(entry, _Bytes):
            objects.append(Bytes(key, *_place(places[_Index.of(key, None)])))
        elif isinstance(entry, _Tensor):
            tensors[key] = _tensor(key, entry, places)
        else:
            raise TypeError(f"{key} is {entry!r}")
    return Metadata(tensors, objects)


def _tensor(key: str, entry: _Tensor, places: Mapping[Any, _Info]) -> Tensor:
    dtype = entry.get("properties").get("state")[0]
    if dtype not in DTYPES:
        raise ValueError(f"{key} has a dtype that is not supported: {dtype!r}")
    chunks = chunk_table()
    for chunk in entry.get("chunks"):
        offsets, sizes = _shape(chunk.get("offsets")), _shape(chunk.get("sizes"))
        chunks.append(Chunk(offsets, sizes, *_place(places[_Index.of(key, offsets)])))
    return Tensor(DTYPES[dtype], _shape(entry.get("size")), chunks)


def _shape(value: Any) -> tuple[int, ...]:
    if type(value) is not tuple or min(value, default=0) < 0:
        raise ValueError(f"{value!r} is no shape")
    return value


def _place(info: _Info) -> tuple[str, int, int]:
    file, start, length = (info.get(name) for name in ("relative_path", "offset", "length"))
    if type(start) is not int or type(length) is not int:
        raise ValueError(f"a part of {file!r} is at {start!r}")
    if info.get("transform_descriptors"):
        raise ValueError(f"parts of {file} are compressed, which is not supported")
    if not is_file_name(file):
        raise ValueError(f"{file!r} is no name of a file beside it")
    if min(start, length) < 0:
        raise ValueError(f"a part of {file} begins or ends before it")
    return file, start, length


def _check_covered(path: Path, key: str, tensor: Tensor) -> None:
    """Check that chunks lie within their tensor and are as large together as it is."""
    elements = 0
    for chunk in tensor.chunks:
        axes = zip(chunk.offsets, chunk.shape, tensor.shape, strict=False)
        fits = all(0 <= offset <= offset + size <= whole for offset, size, whole in axes)
        if not len(chunk.offsets) == len(chunk.shape) == len(tensor.shape) or not fits:
            raise ConversionError(
                f"{path}: {key} of shape {list(tensor.shape)} has a chunk of shape "
                f"{list(chunk.shape)} at {list(chunk.offsets)}"
            )
        elements += math.prod(chunk.shape)
    if elements != math.prod(tensor.shape):
        raise ConversionError(
            f"{path}: the chunks of {key} hold {elements} elements, its shape "
            f"{list(tensor.shape)} asks for {math.prod(tensor.shape)}"
        )


def _check_files(directory: Path, metadata: Metadata) -> None:
    sizes: dict[str, int] = {}
    for key, file, start, length in _parts(metadata):
        if file not in sizes:
            path = directory / file
            if not path.is_file():
                raise ConversionError(f"{path}: missing, though {METADATA} names it for {key}")
            sizes[file] = path.stat().st_size
        if start + length > sizes[file]:
            raise ConversionError(
                f"{directory / file}: torn, {METADATA} says that {key} ends at byte "
                f"{start + length}, but it has {sizes[file]}"
            )


def _parts(metadata: Metadata) -> Iterator[tuple[str, str, int, int]]:
    for key, tensor in metadata.tensors.items():
        for chunk in tensor.chunks:
            yield key, chunk.file, chunk.start, chunk.length
    yield from metadata.objects


# Writing


def dump(metadata: Metadata) -> bytes:
    """Write `.metadata` as torch.distributed.checkpoint reads it."""
    content = _instance(
        "Metadata",
        state_dict_metadata=Pairs(_entries(metadata)),
        planner_data=None,
        storage_data=Pairs(_places(metadata)),
        storage_meta=None,
        version=_VERSION,
    )
    return pickles.dump(content)


def _entries(metadata: Metadata) -> Iterator[tuple[str, Instance]]:
    for key, tensor in metadata.tensors.items():
        yield key, _tensor_entry(tensor)
    for key, *_ in metadata.objects:
        yield key, _instance("BytesStorageMetadata")


def _places(metadata: Metadata) -> Iterator[tuple[Instance, Instance]]:
    for key, tensor in metadata.tensors.items():
        for chunk in tensor.chunks:
            place = (chunk.file, chunk.start, chunk.length)
            yield _index(key, _torch_size(chunk.offsets)), _info(*place)
    for key, file, start, length in metadata.objects:
        yield _index(key, None), _info(file, start, length)


def _instance(name: str, **attributes: Any) -> Instance:
    return Instance(Global(_MODULE, name), attributes)


def _tensor_entry(tensor: Tensor) -> Instance:
    chunks = Items(
        _instance(
            "ChunkStorageMetadata",
            offsets=_torch_size(chunk.offsets),
            sizes=_torch_size(chunk.shape),
        )
        for chunk in tensor.chunks
    )
    dtype = Global("torch", tensor.dtype.name)
    strided = Call(Global("torch.serialization", "_get_layout"), ("torch.strided",))
    contiguous = Call(Global(_MODULE, "_MEM_FORMAT_ENCODING"), (0,))
    properties = (dtype, strided, False, contiguous, False)
    return _instance(
        "TensorStorageMetadata",
        properties=Instance(Global(_MODULE, "TensorProperties"), properties),
        size=_torch_size(tensor.shape),
        chunks=chunks,
    )


def _torch_size(shape: tuple[int, ...]) -> Call:
    return Call(Global("torch", "Size"), (shape,))


def _index(key: str, offset: Call | None) -> Instance:
    return _instance("MetadataIndex", fqn=key, index=None, offset=offset)


def _info(file: str, start: int, length: int) -> Instance:
    return Instance(_STORAGE_INFO, {"relative_path": file, "offset": start, "length": length})
