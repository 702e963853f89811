"""Writing a Hugging Face folder that appears all at once."""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from bitwright.errors import BadRequest, NoSpace
from bitwright.pipeline.checkpoint import INDEX, SINGLE, opened
from bitwright.pipeline.stacks import name_in_file

COMPANIONS = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template*", "generation_config.json", "*.model", "preprocessor_config.json",
    "processor_config.json", "LICENSE*",
)  # fmt: skip
_FINAL = re.compile(r"model(?:-(\d{5})-of-\d{5})?\.safetensors")


def require_absent(target: Path, *, overwrite: bool) -> None:
    """Raises BadRequest if there is something at ``target`` that may not be replaced."""
    if target.exists() and not overwrite:
        raise BadRequest(f"{target} exists: choose another output or add --overwrite")


class CheckpointWriter:
    """Writes shards into a hidden folder next to ``target``; `commit` renames it into place.

    Whatever happens before `commit` returns, ``target`` is absent or what it was before. With
    ``resume`` what an earlier writer left is kept, and `keep` says which shards count.
    """

    def __init__(self, target: Path, *, overwrite: bool, resume: bool = False) -> None:
        require_absent(target, overwrite=overwrite)
        self.target = target
        self.folder = target.parent / f".{target.name}.partial"
        self.scratch = target.parent / f".{target.name}.work"
        self._index: dict[str, str] = {}
        self._bytes = 0
        self._shards: list[str] = []
        with disk(self.folder):
            target.parent.mkdir(parents=True, exist_ok=True)
            for folder in (self.folder, self.scratch):
                if folder.exists() and not resume:
                    shutil.rmtree(folder)
                folder.mkdir(exist_ok=True)

    def keep(self, shards: int) -> None:
        """Go on after the first ``shards`` shards that an earlier writer wrote."""
        with disk(self.folder):
            for path in sorted(self.folder.iterdir()):  # an earlier commit may have renamed some
                if (match := _FINAL.fullmatch(path.name)) is not None:
                    number = int(match[1] or 1) - 1
                    path.rename(self.folder / _part(number))
            wanted = [_part(number) for number in range(shards)]
            for path in self.folder.iterdir():
                if path.name not in wanted:
                    path.unlink()
            for file in wanted:
                with opened(self.folder / file) as handle:
                    for name in handle.keys():  # noqa: SIM118
                        self._index[name] = file
                        part = handle.get_tensor(name)
                        self._bytes += part.nbytes
                self._shards.append(file)

    def write_shard(self, tensors: Mapping[str, Tensor]) -> None:
        """Write one shard holding ``tensors``."""
        if not tensors:
            return
        file = _part(len(self._shards))
        with disk(self.folder):
            data = {name_in_file(name): tensor.contiguous() for name, tensor in tensors.items()}
            save_file(data, self.folder / file, metadata={"format": "pt"})
            _sync(self.folder / file)
        self._shards.append(file)
        for name, tensor in tensors.items():
            self._index[name_in_file(name)] = file
            self._bytes += tensor.nbytes

    def write_json(self, name: str, value: object) -> None:
        """Write one JSON file, keys in the order given."""
        with disk(self.folder):
            (self.folder / name).write_text(
                json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )

    def copy_companions(self, source: Path) -> None:
        """Copy tokenizer, chat template and generation config, as they are."""
        with disk(self.folder):
            for pattern in COMPANIONS:
                for path in sorted(source.glob(pattern)):
                    if path.is_file():
                        shutil.copyfile(path, self.folder / path.name)

    def commit(self) -> None:
        """Name the shards, write the index, flush to disk, and rename the folder into place."""
        with disk(self.folder):
            count = len(self._shards)
            names = {
                file: f"model-{i + 1:05d}-of-{count:05d}.safetensors" if count > 1 else SINGLE
                for i, file in enumerate(self._shards)
            }
            for old, new in names.items():
                (self.folder / old).rename(self.folder / new)
            if count > 1:
                weight_map = {name: names[file] for name, file in sorted(self._index.items())}
                index = {"metadata": {"total_size": self._bytes}, "weight_map": weight_map}
                self.write_json(INDEX, index)
            for path in self.folder.iterdir():
                path.chmod(0o644)
                _sync(path)
            _sync(self.folder)
            old_folder = self.target.parent / f".{self.target.name}.replaced"
            shutil.rmtree(old_folder, ignore_errors=True)
            if self.target.exists():
                self.target.rename(old_folder)
            self.folder.rename(self.target)
            _sync(self.target.parent)
            shutil.rmtree(old_folder, ignore_errors=True)
            shutil.rmtree(self.scratch, ignore_errors=True)

    def discard(self) -> None:
        """Remove everything written so far."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(self.scratch, ignore_errors=True)


def _part(number: int) -> str:
    return f"part-{number:05d}.safetensors"


def require_space(target: Path, needed: int) -> None:
    """Raises NoSpace if the disk of ``target`` has fewer than ``needed`` bytes free."""
    folder = target.parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise NoSpace(
            f"the output needs {needed / 1e6:.0f} MB and {folder} has {free / 1e6:.0f} MB free: "
            "free some space or write elsewhere"
        )


def folder_bytes(folder: Path) -> int:
    """Size of the safetensors files of a folder, in bytes."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def disk(folder: Path) -> Iterator[None]:
    """Errors of writing under ``folder`` as NoSpace or BadRequest."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = "No space" in str(error)
        full = full or (isinstance(error, OSError) and error.errno == errno.ENOSPC)
        if full:
            raise NoSpace(
                f"the disk of {folder.parent} is full: free some space and add --resume, or "
                "write elsewhere"
            ) from error
        raise BadRequest(f"cannot write {folder}: {error}") from error
