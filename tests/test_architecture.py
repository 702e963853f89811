"""The house rules: who may import whom, how long a file may be, what maths may not touch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import bitwright

ROOT = Path(bitwright.__file__).parent
RANKS = {
    "numerics": 0, "schemes": 1, "methods": 2, "native": 2.5, "pipeline": 3, "formats": 4,
    "kernels": 5, "runtime": 6, "training": 7, "evaluation": 7, "planning": 7, "cluster": 7,
    "request": 8, "api": 8, "api_convert": 8, "api_allocate": 8, "api_train": 8, "cli": 8,
    "commands": 8,
}  # fmt: skip
LONGEST = 400
SHORTER = {"methods/gptq.py": 200}
MAY_READ_ENVIRONMENT = {"pipeline/gguf_import.py", "native.py"}  # the cache folder
MAY_CATCH_ALL = {
    "pipeline/gguf_import.py",  # tokenizers raises Exception itself
    "pipeline/run.py",  # BaseException: clean up, then raise again
    "pipeline/texts.py",  # the hub client raises many unrelated types
}

FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))


def _room(file: str) -> str:
    return file.split("/")[0].removesuffix(".py")


def _tree(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def imported(source: ast.Module) -> set[str]:
    """The rooms of bitwright that a file imports, wherever in the file, also only for types."""
    rooms = set()
    for node in ast.walk(source):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "bitwright" and len(parts) > 1:
                rooms.add(parts[1])
    return rooms


def upward(file: str, source: ast.Module) -> list[str]:
    """The imports of a file that break the order of ranks."""
    rank = RANKS[_room(file)]
    broken = []
    for room in sorted(imported(source) - {"errors", "__version__", _room(file)}):
        if room not in RANKS:
            broken.append(f"{file} imports {room}, which has no rank")
        elif RANKS[room] > rank or (RANKS[room] == rank and rank < 8):
            broken.append(f"{file} (rank {rank}) imports {room} (rank {RANKS[room]})")
    return broken


def test_every_file_has_a_room() -> None:
    assert len(FILES) > 30
    assert {_room(file) for file in FILES} - RANKS.keys() <= {"__init__", "errors"}


@pytest.mark.parametrize("file", [f for f in FILES if f not in ("__init__.py", "errors.py")])
def test_imports_point_downwards(file: str) -> None:
    assert upward(file, _tree(file)) == []


def test_errors_import_nothing() -> None:
    assert imported(_tree("errors.py")) == set()


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("numerics/x.py", "from bitwright.schemes.scheme import Spec"),
        ("methods/x.py", "import bitwright.pipeline.run"),
        ("pipeline/x.py", "def f():\n    from bitwright.formats import get_format"),
        ("pipeline/x.py", "from bitwright import api"),
        ("runtime/x.py", "from bitwright.training import ste"),
        ("formats/x.py", "from bitwright.unheard import of"),
    ],
)
def test_an_upward_import_would_be_seen(file: str, code: str) -> None:
    assert len(upward(file, ast.parse(code))) == 1


@pytest.mark.parametrize("file", FILES)
def test_files_stay_short(file: str) -> None:
    lines = len((ROOT / file).read_text(encoding="utf-8").splitlines())
    assert lines <= SHORTER.get(file, LONGEST)


def _forbidden(file: str, source: ast.Module) -> list[str]:
    found = []
    for node in ast.walk(source):
        if isinstance(node, ast.Name) and node.id in ("hasattr", "globals"):
            found.append(node.id)
        elif isinstance(node, (ast.Global, ast.Nonlocal)):
            found.append("global")
        elif isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv"):
            if file not in MAY_READ_ENVIRONMENT:
                found.append("environment")
        elif isinstance(node, ast.ExceptHandler) and file not in MAY_CATCH_ALL:
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            names = {kind.id for kind in kinds if isinstance(kind, ast.Name)}
            if node.type is None or names & {"Exception", "BaseException"}:
                found.append("catches everything")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
            found.append("print")
    return found


@pytest.mark.parametrize("file", [f for f in FILES if RANKS.get(_room(f), 9) <= 4])
def test_lower_ranks_do_not_probe_or_hide_state(file: str) -> None:
    assert _forbidden(file, _tree(file)) == []


@pytest.mark.parametrize(
    "code",
    [
        "hasattr(x, 'y')", "import os\nos.environ['A']", "def f():\n    global a\n    a = 1",
        "try:\n    f()\nexcept:\n    pass", "try:\n    f()\nexcept Exception:\n    pass",
        "try:\n    f()\nexcept (ValueError, BaseException):\n    pass", "print(1)",
    ],
)  # fmt: skip
def test_probing_would_be_seen(code: str) -> None:
    assert len(_forbidden("methods/x.py", ast.parse(code))) == 1


@pytest.mark.parametrize("file", [f for f in FILES if RANKS.get(_room(f), 9) <= 2])
def test_maths_has_no_files_modules_or_logs(file: str) -> None:
    names = {
        name
        for node in ast.walk(_tree(file))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [f"{node.module}.{alias.name}" for alias in node.names]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    banned = ("torch.nn.Module", "os", "pathlib", "logging", "safetensors", "transformers", "io")
    assert [n for n in names if n in banned or n.split(".")[0] in banned] == []


def test_importing_bitwright_imports_nothing_heavy() -> None:
    code = (
        "import sys, bitwright\n"
        "heavy = {'torch', 'transformers', 'numba', 'numpy', 'compressed_tensors'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_command_line_starts_without_torch() -> None:
    code = "import sys, bitwright.cli\nprint('torch' in sys.modules)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_public_names_exist() -> None:
    for name in bitwright.__all__:
        assert callable(getattr(bitwright, name))
