"""Reading a Hugging Face folder tensor by tensor."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bitwright.errors import BadCheckpoint, BadTensor
from bitwright.pipeline.stacks import from_mxfp4, name_in_file, name_inside, split_stacks

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is and what it is, from the headers alone."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int = 0  # of the data, from the start of the file
    stacked: bool = False  # a piece of a larger tensor
    transposed: bool = False  # stored column by column

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        count = 1
        for side in self.shape:
            count *= side
        return count * self.dtype.itemsize


@dataclass(frozen=True)
class Checkpoint:
    """A folder of safetensors: header facts of every tensor, data read only when asked.

    ``computed``: tensors that are made when they are read instead, such as dequantized weights.
    """

    folder: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    computed: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(info.nbytes for info in self.tensors.values())

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, read into memory of their own: what was asked for and no more.

        Raises BadTensor for a floating-point tensor that is not finite, BadCheckpoint for a file
        that is shorter than its header says.
        """
        out: dict[str, Tensor] = {}
        by_file: dict[str, list[str]] = {}
        for name in names:
            if name in self.computed:
                out[name] = self.computed[name]()
            else:
                by_file.setdefault(self.tensors[name].file, []).append(name)
        for file, wanted in by_file.items():
            path = self.folder / file
            with _reading(path), path.open("rb", buffering=0) as handle:
                for name in sorted(wanted, key=lambda name: self.tensors[name].offset):
                    out[name] = _read_tensor(handle, self.tensors[name], path)
                    check_finite(out[name], name)
        return out

    def view(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors as views of mapped files, whose pages the system may drop again.

        They must not be written to. Raises BadTensor for one that is not finite.
        """
        out: dict[str, Tensor] = {}
        for name in names:
            if name in self.computed or self.tensors[name].stacked:
                out |= self.read([name])
                continue
            with opened(self.folder / self.tensors[name].file) as handle:
                out[name] = handle.get_tensor(name_in_file(name))
            check_finite(out[name], name)
        return out


def _read_tensor(handle: IO[bytes], info: TensorInfo, path: Path) -> Tensor:
    tensor = torch.empty(info.shape[::-1] if info.transposed else info.shape, dtype=info.dtype)
    rest = memory_of(tensor)
    handle.seek(info.offset)
    while len(rest):  # one call reads 2 GiB at most
        done = handle.readinto(rest)  # type: ignore[attr-defined]
        if not done:
            raise BadCheckpoint(f"{path} is not a complete safetensors file: download it again")
        rest = rest[done:]
    return tensor.T.contiguous() if info.transposed else tensor


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, to be read from or written to."""
    flat: Any = tensor.detach().view(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def check_finite(tensor: Tensor, name: str) -> None:
    """Raises BadTensor if ``tensor`` holds NaN or infinity."""
    if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return
    parts = torch.split(tensor.view(-1), 1 << 22)
    # A sum is finite unless a member is not (or it overflows, which the second look settles).
    # In parts, since it is taken of a float32 copy.
    sums = [part.sum(dtype=torch.float32) for part in parts]
    if not bool(torch.isfinite(torch.stack(sums)).all()):
        bad = sum([int((~torch.isfinite(part)).sum()) for part in parts])
        if bad:
            raise BadTensor(
                f"tensor {name} holds {bad} NaN or infinite values: the checkpoint is damaged; "
                "download or convert it again"
            )


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the headers of a checkpoint folder. Raises BadCheckpoint with what is wrong."""
    if not folder.exists():
        raise BadCheckpoint(f"{folder} does not exist: give a Hugging Face folder or a GGUF file")
    if not folder.is_dir():
        raise BadCheckpoint(f"{folder} is not a folder with config.json and safetensors files")
    config = _read_json(folder / "config.json")
    shards = _shards(folder)
    tensors: dict[str, TensorInfo] = {}
    for shard, expected in shards.items():
        with opened(folder / shard) as handle:
            present = list(handle.keys())
            offsets = _offsets(folder / shard)
            if missing := expected - set(present):
                raise BadCheckpoint(f"{folder / shard} lacks tensor {min(missing)!r} of its index")
            for name in present if not expected else sorted(expected):
                part = handle.get_slice(name)
                kind = part.get_dtype()
                if kind not in _DTYPES:
                    raise BadTensor(f"tensor {name} has dtype {kind}, which bitwright cannot read")
                start = offsets[name]
                info = TensorInfo(shard, tuple(part.get_shape()), _DTYPES[kind], start)
                tensors[name_inside(name)] = info
    return _with_experts(Checkpoint(folder, config, tensors))


def _with_experts(checkpoint: Checkpoint) -> Checkpoint:
    """Stacks of experts as a matrix each, those in MXFP4 dequantized when they are read."""
    config = checkpoint.config
    how = config.get("quantization_config")
    method = how.get("quant_method") if isinstance(how, dict) else None
    pieces = split_stacks(checkpoint.tensors) if method in (None, "mxfp4") else {}
    if len(pieces) <= len(checkpoint.tensors):
        return checkpoint
    stored = replace(checkpoint, tensors=pieces)
    tensors, computed = dict(pieces), {}
    for blocks in [name for name in pieces if name.endswith(".blocks") and pieces[name].stacked]:
        stem = blocks.removesuffix(".blocks")
        rows, groups, half = tensors.pop(blocks).shape
        tensors.pop(f"{stem}.scales")
        weight = f"{stem}.weight"
        tensors[weight] = TensorInfo("", (rows, groups * half * 2), torch.bfloat16)
        computed[weight] = partial(_mxfp4_weight, stored, stem)
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    return Checkpoint(checkpoint.folder, config, tensors, computed)


def _mxfp4_weight(stored: Checkpoint, stem: str) -> Tensor:
    parts = stored.read([f"{stem}.blocks", f"{stem}.scales"])
    return from_mxfp4(parts[f"{stem}.blocks"], parts[f"{stem}.scales"])


def _shards(folder: Path) -> dict[str, set[str]]:
    """Shard file -> the tensors its index expects in it (empty: no index, all of them)."""
    if (folder / INDEX).exists():
        weight_map = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise BadCheckpoint(f"{folder / INDEX} has no weight_map")
        shards: dict[str, set[str]] = {}
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise BadCheckpoint(f"{INDEX} places {name!r} in {file!r}, outside the folder")
            shards.setdefault(file, set()).add(name)
        for file in shards:
            if not os.path.isfile(folder / file):  # also where no file can have such a name
                raise BadCheckpoint(f"shard {folder / file} is missing: download it again")
        return shards
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if SINGLE in files:
        files = [SINGLE]
    if files:
        return {file: set() for file in files}
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise BadCheckpoint(
            f"{folder} holds pickle weights (.bin), which can run code when loaded and are "
            "refused: convert them to safetensors first"
        )
    raise BadCheckpoint(f"{folder} holds no .safetensors file")


def _offsets(path: Path) -> dict[str, int]:
    """Where each tensor's data starts in a file whose header safetensors has accepted."""
    with _reading(path), path.open("rb") as handle:
        size = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(size))
    return {
        name: 8 + size + entry["data_offsets"][0]
        for name, entry in header.items()
        if name != "__metadata__"
    }


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file, mapped. Raises BadCheckpoint for one that is not complete."""
    with _reading(path), safe_open(path, framework="pt", device="cpu") as handle:
        yield handle


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise BadCheckpoint(
            f"{path} is not a complete safetensors file ({error}): download it again"
        ) from error
    except OSError as error:
        raise BadCheckpoint(f"cannot read {path}: {error.strerror or error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadCheckpoint(
            f"{path.parent} has no {path.name}: it is not a Hugging Face checkpoint folder"
        ) from None
    except (ValueError, OSError, RecursionError) as error:
        raise BadCheckpoint(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadCheckpoint(f"{path} is not a JSON object")
    return value
