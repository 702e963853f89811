"""A checkpoint, quantized or not, as one GGUF file for llama.cpp."""

import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitwright.errors import BadRequest
from bitwright.formats.gguf import BLOCK_SHAPES, BLOCKS
from bitwright.pipeline.checkpoint import Checkpoint, open_checkpoint
from bitwright.pipeline.report import Report
from bitwright.pipeline.writer import CheckpointWriter
from bitwright.runtime.gguf_metadata import Architecture, add_metadata, architecture, vocabulary
from bitwright.runtime.load import stored_config
from bitwright.runtime.source import GGUF_FILE, load_tokenizer
from bitwright.schemes.protocols import Format

ROPE = "rope_freqs.weight"
_FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32,
    "Q4_K": 14, "Q5_K": 16, "Q6_K": 18,
}  # fmt: skip
_PLAIN = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Blocks:
    """How one quantized layer is stored: its GGUF type and (out_features, in_features)."""

    kind: str
    shape: tuple[int, int]


@dataclass(frozen=True)
class Entry:
    """One tensor of the file; ``heads``: of how many heads its rows are to be reordered, or 0."""

    name: str
    source: str
    kind: str
    shape: tuple[int, ...]
    heads: int

    @property
    def is_blocks(self) -> bool:
        """Whether it comes from a quantized layer, whose name is then ``source``."""
        return self.kind in BLOCK_SHAPES


def export_gguf(
    source: Checkpoint,
    layers: Mapping[str, Blocks],
    read_blocks: Callable[[str], Tensor],
    target: Path,
    *,
    overwrite: bool,
    report: Mapping[str, Any],
    progress: Callable[[int, int, str], None],
) -> int:
    """Write ``target/model.gguf`` and the report, all at once; returns the file's size.

    ``layers``: the quantized ones; ``read_blocks`` gives their bytes, uint8 (O, row bytes).
    Other matrices keep their 16 or 32 bits, vectors become float32. Raises BadRequest for
    tensors, architectures and tokenizers that llama.cpp has no place for.
    """
    import gguf

    arch = architecture(source)
    words = vocabulary(source, load_tokenizer(source), arch.vocabulary)
    entries = _entries(source, arch, layers)
    kinds = Counter(entry.kind for entry in entries if len(entry.shape) == 2)
    folder = CheckpointWriter(target, overwrite=overwrite)
    try:
        with _quiet():
            writer = gguf.GGUFWriter(folder.folder / GGUF_FILE, arch.name)
            kind = _FILE_TYPES[kinds.most_common(1)[0][0]]
            add_metadata(writer, arch, words, target.name, kind)
            for entry in entries:
                _announce(writer, entry)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for index, entry in enumerate(entries):
                progress(index, len(entries), f"writing {entry.name}")
                writer.write_tensor_data(_value(source, arch, entry, read_blocks))
            writer.close()
        folder.write_json("quantization_report.json", report)
        folder.commit()
    except BaseException:
        folder.discard()
        raise
    return (target / GGUF_FILE).stat().st_size


def export_folder(
    folder: Path, target: Path, *, overwrite: bool, progress: Callable[[int, int, str], None]
) -> int:
    """`export_gguf` of a folder that a run in the gguf format wrote; the folder is removed."""
    try:
        source = open_checkpoint(folder)
        layers = {}
        for name, kind in stored_config(source)["types"].items():
            rows, size = source.tensors[f"{name}{BLOCKS}"].shape
            weights, length = BLOCK_SHAPES[kind]
            layers[name] = Blocks(kind, (rows, size // length * weights))
        return export_gguf(
            source,
            layers,
            lambda name: source.read([f"{name}{BLOCKS}"])[f"{name}{BLOCKS}"],
            target,
            overwrite=overwrite,
            report=json.loads((folder / "quantization_report.json").read_text(encoding="utf-8")),
            progress=progress,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_checkpoint(
    fmt: Format,
    target: Path,
    write: Callable[[Path, bool], Report],
    *,
    overwrite: bool,
    progress: Callable[[int, int, str], None],
) -> Report:
    """Let ``write(folder, overwrite)`` write a checkpoint of ``fmt``; GGUF's becomes one file."""
    if fmt.name != "gguf":
        return write(target, overwrite)
    folder = target.parent / f".{target.name}.staged"
    report = write(folder, True)
    report.bytes_after = export_folder(folder, target, overwrite=overwrite, progress=progress)
    return report


def check_exportable(source: Checkpoint) -> None:
    """Raises what `export_gguf` would, before any work."""
    arch = architecture(source)
    vocabulary(source, load_tokenizer(source), arch.vocabulary)
    _entries(source, arch, {})


def _entries(source: Checkpoint, arch: Architecture, layers: Mapping[str, Blocks]) -> list[Entry]:
    """What becomes of every tensor, in the order of the checkpoint's names."""
    import gguf

    number = next(n for n, text in gguf.MODEL_ARCH_NAMES.items() if text == arch.name)
    names = gguf.get_tensor_name_map(number, arch.blocks)
    plain = {
        name: info
        for name, info in source.tensors.items()
        if name.rpartition(".")[0] not in layers or name.endswith(".bias")
    }
    if arch.tied:
        plain.pop("lm_head.weight", None)
    entries = []
    for tensor in sorted([*plain, *(f"{layer}.weight" for layer in layers)]):
        name = names.get_name(tensor, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise BadRequest(f"gguf: {arch.name} has no place for the tensor {tensor}")
        heads = 0
        if arch.permuted and ".self_attn.q_proj." in tensor:
            heads = arch.heads
        elif arch.permuted and ".self_attn.k_proj." in tensor:
            heads = arch.key_heads
        if tensor in plain:
            shape = plain[tensor].shape
            kind = "F32" if len(shape) == 1 else _PLAIN[plain[tensor].dtype]
            entries.append(Entry(name, tensor, kind, shape, heads))
        else:
            layer = tensor.removesuffix(".weight")
            entries.append(Entry(name, layer, layers[layer].kind, layers[layer].shape, heads))
    if arch.rope_divisors is not None:
        entries.append(Entry(ROPE, "", "F32", tuple(arch.rope_divisors.shape), 0))
    return entries


def _announce(writer: Any, entry: Entry) -> None:
    """Add an entry to the file's table of contents."""
    import gguf

    kind = gguf.GGMLQuantizationType[entry.kind]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    count = int(np.prod(entry.shape))
    writer.add_tensor_info(
        entry.name, entry.shape, np.dtype(np.int8), count // block * size, raw_dtype=kind
    )


def _value(
    source: Checkpoint, arch: Architecture, entry: Entry, read_blocks: Callable[[str], Tensor]
) -> Any:
    """The bytes of an entry, as an array that writes itself."""
    if entry.name == ROPE:
        assert arch.rope_divisors is not None
        return arch.rope_divisors.numpy()
    if entry.is_blocks:
        tensor = read_blocks(entry.source)
    else:
        tensor = source.read([entry.source])[entry.source]
        tensor = tensor.float() if entry.kind == "F32" else tensor
    if entry.heads:
        tensor = tensor[row_order(len(tensor), entry.heads)]
    return tensor.contiguous().view(torch.uint8).numpy()


def row_order(rows: int, heads: int) -> Tensor:
    """Where each row of q or k comes from: (first, second) half of a head, taken in turns.

    llama.cpp's "llama" rotates neighbouring rows, transformers row i and row i + head_dim / 2.
    """
    return torch.arange(rows).reshape(heads, 2, -1).transpose(1, 2).reshape(-1)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the gguf package's notes on byte order off the screen."""
    log = logging.getLogger("gguf")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
