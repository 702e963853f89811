"""Checkpoints behind a URL (s3://, gs://, file://, memory:// ...), through fsspec.

Reading: files are copied into the user's cache, each appearing there at once, in a folder named by
the URL and by what the store says of its files, so that a changed model is another folder. Writing:
a finished folder is uploaded with config.json last, without which no reader takes it for a model.
"""

import hashlib
import os
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from bitwright.errors import BadCheckpoint, BadRequest, BitwrightError
from bitwright.pipeline.gguf_import import cache_folder
from bitwright.pipeline.writer import disk

LAST = "config.json"


def is_url(name: object) -> bool:
    """Whether ``name`` is a URL and not a path."""
    return "://" in str(name)


def stage(url: str, shards: Collection[str] | None = None) -> Path:
    """The folder in the cache that holds the model at ``url``.

    ``shards``: the .safetensors files wanted; None for all. All other files always are. Raises
    BadCheckpoint for what cannot be read, NoSpace for a full disk.
    """
    with _store(url, BadCheckpoint) as (system, path):
        found = {
            entry["name"].rpartition("/")[2]: entry
            for entry in system.ls(path, detail=True, refresh=True)
            if entry["type"] == "file"
        }
        said = "\n".join(
            [url, *(f"{name} {sorted(found[name].items())}" for name in sorted(found))]
        )
        key = hashlib.sha256(said.encode()).hexdigest()[:16]
        folder = cache_folder() / "staged" / f"{path.rstrip('/').rpartition('/')[2]}-{key}"
        if LAST not in found:
            raise BadCheckpoint(f"{url} has no {LAST}: it is not a Hugging Face checkpoint folder")
        with disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
        for name, entry in found.items():
            wanted = shards is None or not name.endswith(".safetensors") or name in shards
            if wanted and not (folder / name).exists():
                _download(system, entry["name"], folder / name)
    return folder


def require_nothing_at(url: str, *, overwrite: bool) -> None:
    """Raises BadRequest if there is something at ``url`` or the store cannot be reached."""
    with _store(url, BadRequest) as (system, path):
        if system.exists(path) and not overwrite:
            raise BadRequest(f"{url} exists: choose another output or add --overwrite")


def upload(folder: Path, url: str) -> None:
    """Put the files of ``folder`` (or one file) at ``url``, replacing what is there.

    An old config.json is removed first and the new one written last: a reader finds the old
    model, none, or the new one, never a mixture. Stores cannot replace a folder in one step.
    """
    with _store(url, BadRequest, f"; what was to be written is in {folder}") as (system, path):
        if folder.is_file():
            system.put_file(str(folder), path)
            return
        system.makedirs(path, exist_ok=True)
        if system.exists(f"{path}/{LAST}"):
            system.rm(f"{path}/{LAST}")
        names = sorted(file.name for file in folder.iterdir())
        for entry in system.ls(path, detail=True, refresh=True):
            if entry["type"] == "file" and entry["name"].rpartition("/")[2] not in names:
                system.rm(entry["name"])
        for name in sorted(names, key=lambda name: name == LAST):
            system.put_file(str(folder / name), f"{path}/{name}")


def write_text(url: str, text: str) -> None:
    """One small file."""
    with _store(url, BadRequest) as (system, path):
        system.pipe_file(path, text.encode())


def _download(system: Any, path: str, file: Path) -> None:
    with disk(file.parent):
        handle, partial = tempfile.mkstemp(dir=file.parent, prefix=".partial-")
        os.close(handle)
    try:
        system.get_file(path, partial)
        os.replace(partial, file)
    finally:
        Path(partial).unlink(missing_ok=True)


@contextmanager
def _store(url: str, kind: type[BitwrightError], after: str = "") -> Iterator[tuple[Any, str]]:
    """(filesystem, path in it); its errors, of whatever type, as one line of type ``kind``."""
    try:
        system, path = fsspec.core.url_to_fs(url)
        yield system, path
    except BitwrightError:
        raise
    except FileNotFoundError as error:
        raise kind(f"{url} does not exist{after}") from error
    except Exception as error:  # every store raises errors of its own
        raise kind(f"{url}: {type(error).__name__}: {error}{after}") from error
