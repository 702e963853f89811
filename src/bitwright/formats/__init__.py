"""On-disk formats as pure pairs: no modules, no files."""

from bitwright.errors import UnknownName
from bitwright.formats.awq import Awq
from bitwright.formats.compressed_tensors import CompressedTensors
from bitwright.formats.gguf import Gguf
from bitwright.formats.gptq import Gptq
from bitwright.schemes.protocols import Format

FORMATS: dict[str, Format] = {fmt.name: fmt for fmt in (CompressedTensors(), Gptq(), Awq(), Gguf())}


def get_format(name: str) -> Format:
    """The format called ``name``. Raises UnknownName, which lists the known ones."""
    if name not in FORMATS:
        raise UnknownName(f"unknown format {name!r}; known: {', '.join(FORMATS)}")
    return FORMATS[name]
