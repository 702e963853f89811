"""C++ functions for this processor: built at first use, kept in the cache of the user."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

FLAGS = (
    "-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-w", "-mavx512f", "-mavx512bw",
    "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mf16c", "-mfma",
)  # fmt: skip


@cache
def why_not(package: str, file: str) -> str:
    """Why ``file`` of ``package`` cannot be used on this machine; "" if it can."""
    if not torch.cpu._is_avx512_bf16_supported():
        return "the processor has no AVX-512 BF16"
    try:
        _library(package, file)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{file} could not be built: {' '.join(str(error).split())[:200]}"
    return ""


@cache
def function(package: str, file: str, name: str, arguments: tuple[Any, ...]) -> Any:
    """A C function that returns nothing; `why_not` must be empty.

    Raises OSError or SubprocessError if the file cannot be built.
    """
    found = getattr(_library(package, file), name)
    found.argtypes, found.restype = arguments, None
    return found


@cache
def _library(package: str, file: str) -> ctypes.CDLL:
    source = files(package).joinpath(file).read_bytes()
    digest = hashlib.sha256(source + " ".join(FLAGS).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitwright"
    target = folder / f"{Path(file).stem}-{digest}.so"
    if not target.exists():
        build(source, target)
    return ctypes.CDLL(str(target))


def build(source: bytes, target: Path) -> None:
    """Compile ``source`` to ``target``, in one step: two processes may build at once."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise FileNotFoundError("no C++ compiler (g++ or clang++) was found")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        code, out = Path(folder, "kernel.cpp"), Path(folder, "kernel.so")
        code.write_bytes(source)
        command = [compiler, *FLAGS, str(code), "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise OSError(f"{compiler} failed: {done.stderr[-200:]}")
        out.replace(target)
