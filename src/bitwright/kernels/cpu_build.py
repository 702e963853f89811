"""The compiled CPU kernel: built once with the system's C++ compiler, kept in the user's cache."""

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
_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_ARGUMENTS = (
    _POINTER, _LONG, _LONG, _LONG, _POINTER, _POINTER, _INT, _POINTER, _POINTER, _POINTER, _FLOAT,
    _POINTER, _INT, _LONG, _LONG, _INT,
)  # fmt: skip


@cache
def why_not_compiled() -> str:
    """Why the compiled kernel cannot run on this machine; "" if it can."""
    if not torch.cpu._is_avx512_bf16_supported():
        return "the processor has no AVX-512 BF16"
    try:
        library()
    except (OSError, subprocess.SubprocessError) as error:
        return f"the kernel could not be built: {' '.join(str(error).split())[:200]}"
    return ""


@cache
def library() -> Any:
    """The C function, built at first use. Raises OSError or SubprocessError if that fails."""
    source = files("bitwright.kernels").joinpath("cpu_w4a16.cpp").read_bytes()
    digest = hashlib.sha256(source + " ".join(FLAGS).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitwright"
    target = folder / f"cpu_w4a16-{digest}.so"
    if not target.exists():
        build(source, target)
    function = ctypes.CDLL(str(target)).w4a16
    function.argtypes, function.restype = _ARGUMENTS, None
    return function


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
