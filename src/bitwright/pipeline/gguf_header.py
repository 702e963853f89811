"""The header of a GGUF file, checked whole before another reader sees the file.

GGUF (version 2 or 3, little endian) is: magic, version, number of tensors, number of values; the
values (key, type, value); per tensor its name, dimensions (fastest first), type and offset; data.
Every length in it is a claim. A reader that believes them can be made to loop for hours or to
fill the memory, so each claim is compared with the size of the file, and the sizes a model is
built from with the shapes of its tensors.
"""

import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitwright.errors import BadCheckpoint

LONGEST_ARRAY = 1 << 21  # elements; the largest vocabularies and merge lists have a quarter
ALIGNMENT = 32
STRING, ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
            12: "d"}  # fmt: skip
_NOT_SIZES = re.compile(r"context_length|sliding_window|rope\.scaling")


@dataclass(frozen=True)
class GgufTensor:
    """Dimensions, fastest first, the name of the GGML type, and where the data are."""

    shape: tuple[int, ...]
    kind: str
    start: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """``values``: scalars and strings as they are, of arrays their length."""

    values: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @property
    def quantized_kinds(self) -> list[str]:
        """The types of fewer than 16 bits among the tensors."""
        kinds = {tensor.kind for tensor in self.tensors.values()}
        return sorted(kinds - {"F64", "F32", "F16", "BF16"})


def read_header(file: Path) -> GgufHeader:
    """Read and check a header. Raises BadCheckpoint, saying what is wrong."""
    try:
        with file.open("rb") as handle:
            if handle.read(4) != b"GGUF":
                raise BadCheckpoint(f"{file} is not a GGUF file")
            with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
                header = _parse(_Reader(data))
        _require_sizes(header)
    except _Bad as error:
        raise BadCheckpoint(f"{file} cannot be read as a GGUF model: {error}") from None
    except OSError as error:
        raise BadCheckpoint(f"cannot read {file}: {error.strerror or error}") from error
    return header


class _Bad(Exception):
    """What is wrong with the header, in words."""


class _Reader:
    """A position in the file that cannot leave it."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 4

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def skip(self, count: int) -> int:
        """Move on; returns where it was."""
        if count > self.left:
            raise _Bad(f"it ends at byte {len(self.data)}, but should go on for {count} more")
        self.at += count
        return self.at - count

    def scalar(self, code: str) -> Any:
        size = struct.calcsize("<" + code)
        return struct.unpack_from("<" + code, self.data, self.skip(size))[0]

    def text(self) -> str:
        size = self.scalar("Q")
        start = self.skip(size)
        try:
            return self.data[start : start + size].decode("utf-8")
        except UnicodeDecodeError:
            raise _Bad(f"the text at byte {start} is not UTF-8") from None

    def value(self, kind: int) -> Any:
        """A scalar, a string, or the length of an array whose members were passed over."""
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.scalar(_scalar(kind))
        member, count = self.scalar("I"), self.scalar("Q")
        if count > LONGEST_ARRAY:
            raise _Bad(f"an array of {count} values; at most {LONGEST_ARRAY} are read")
        if member == STRING:
            for _ in range(count):
                self.text()
        else:
            self.skip(count * struct.calcsize("<" + _scalar(member)))
        return count


def _scalar(kind: int) -> str:
    if kind not in _SCALARS:
        raise _Bad(f"a value of type {kind}, which is unknown here")
    return _SCALARS[kind]


def _parse(reader: _Reader) -> GgufHeader:
    version = reader.scalar("I")
    if version not in (2, 3):
        raise _Bad(f"version {version}; known: 2, 3")
    tensor_count, value_count = reader.scalar("Q"), reader.scalar("Q")
    if 24 * tensor_count + 13 * value_count > reader.left:
        raise _Bad(f"{tensor_count} tensors and {value_count} values do not fit into it")
    values: dict[str, Any] = {}
    for _ in range(value_count):
        key = reader.text()
        if key in values:
            raise _Bad(f"the key {key[:60]!r} stands in it twice")
        values[key] = reader.value(reader.scalar("I"))
    align = values.get("general.alignment", ALIGNMENT)
    if not isinstance(align, int) or not 0 < align <= 1 << 20 or align & (align - 1):
        raise _Bad(f"general.alignment {align!r} is no power of two")
    found = {}
    for _ in range(tensor_count):
        name = reader.text()
        if name in found:
            raise _Bad(f"the tensor {name[:60]!r} stands in it twice")
        sides = reader.scalar("I")
        if not 1 <= sides <= 4:
            raise _Bad(f"tensor {name[:60]!r} has {sides} dimensions")
        shape = tuple(reader.scalar("Q") for _ in range(sides))
        found[name] = (shape, reader.scalar("I"), reader.scalar("Q"))
    base = -(-reader.at // align) * align
    tensors = {
        name: _tensor(name, *facts, base, align, len(reader.data)) for name, facts in found.items()
    }
    end, before = 0, ""
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        if tensor.start < end:
            raise _Bad(f"the tensors {before!r} and {name[:60]!r} overlap")
        end, before = tensor.start + tensor.nbytes, name[:60]
    return GgufHeader(values, tensors)


def _tensor(
    name: str, shape: tuple[int, ...], kind: int, offset: int, base: int, align: int, size: int
) -> GgufTensor:
    import gguf

    known = {int(one): one for one in gguf.GGMLQuantizationType}
    if kind not in known:
        raise _Bad(f"tensor {name[:60]!r} has type {kind}, which is unknown here")
    block, block_bytes = gguf.GGML_QUANT_SIZES[known[kind]]
    count = 1
    for side in shape:
        count *= side
    if shape[0] % block or count < 1:
        raise _Bad(f"tensor {name[:60]!r} of {list(shape)} has no whole blocks of {block}")
    nbytes = count // block * block_bytes
    if offset % align or base + offset + nbytes > size:
        raise _Bad(f"tensor {name[:60]!r} lies at {offset} for {nbytes} bytes, outside the file")
    return GgufTensor(shape, known[kind].name, base + offset, nbytes)


def _require_sizes(header: GgufHeader) -> None:
    """The sizes a model would be built from are those of the tensors."""
    values, tensors = header.values, header.tensors
    arch = values.get("general.architecture")
    if not isinstance(arch, str) or "token_embd.weight" not in tensors:
        raise _Bad("it names no architecture or holds no token embeddings")
    embedding = tensors["token_embd.weight"].shape
    numbers = {match[1] for name in tensors if (match := re.match(r"blk\.(\d+)\.", name))}
    heads, key = (values.get(f"{arch}.attention.{name}") for name in ("head_count", "key_length"))
    expected: dict[str, tuple[Any, int]] = {
        "block_count": (values.get(f"{arch}.block_count"), len(numbers)),
        "embedding_length": (values.get(f"{arch}.embedding_length"), embedding[0]),
        "vocab_size": (values.get(f"{arch}.vocab_size", embedding[-1]), embedding[-1]),
    }
    if (gate := tensors.get("blk.0.ffn_gate.weight")) is not None:
        width = values.get(f"{arch}.feed_forward_length")
        expected["feed_forward_length"] = (width, gate.shape[-1])
    query = tensors.get("blk.0.attn_q.weight")
    if query is not None and isinstance(key, int) and isinstance(heads, int):
        expected["attention.head_count"] = (heads * key, query.shape[-1])
    for what, (said, stored) in expected.items():
        if said != stored:
            raise _Bad(f"{arch}.{what} says {said}, but its tensors have {stored}")
    largest = max(len(tensors), *(side for one in tensors.values() for side in one.shape))
    for name, value in values.items():
        is_size = name.startswith(f"{arch}.") and not _NOT_SIZES.search(name)
        if is_size and isinstance(value, int) and value > largest:
            raise _Bad(f"{name} says {value}, which is more than any of its tensors has")
