"""On-disk formats as pure pairs: no modules, no files."""

from bitwright.errors import UnknownName
from bitwright.formats.awq import Awq
from bitwright.formats.compressed_tensors import CompressedTensors
from bitwright.formats.fp8 import Fp8
from bitwright.formats.gguf import Gguf
from bitwright.formats.gptq import Gptq
from bitwright.formats.modelopt import ModelOpt
from bitwright.schemes.protocols import Format

_ALL: tuple[Format, ...] = (CompressedTensors(), Gptq(), Awq(), Fp8(), ModelOpt(), Gguf())
FORMATS: dict[str, Format] = {fmt.name: fmt for fmt in _ALL}


def get_format(name: str) -> Format:
    """The format called ``name``. Raises UnknownName, which lists the known ones."""
    if name not in FORMATS:
        raise UnknownName(f"unknown format {name!r}; known: {', '.join(FORMATS)}")
    return FORMATS[name]
