"""Which runtime loads which scheme in which format; the facts are in runtimes.toml."""

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from typing import Any

from bitwright.errors import BadRequest, BadShape, UnknownName
from bitwright.numerics.groups import PER_TENSOR
from bitwright.schemes.scheme import BLOCK, Scheme


@cache
def _facts() -> dict[str, Any]:
    text = files("bitwright.schemes").joinpath("runtimes.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


@cache
def _table() -> dict[str, dict[str, Any]]:
    return {name: entry for name, entry in _facts().items() if isinstance(entry, dict)}


def fused(names: Iterable[str]) -> list[list[str]]:
    """``names`` of layers in the groups that runtimes merge into one matrix, in their order there.

    >>> fused(["a.k_proj", "a.o_proj", "a.q_proj", "b.k_proj"])
    [['a.q_proj', 'a.k_proj'], ['a.o_proj'], ['b.k_proj']]
    """
    sets: list[list[str]] = _facts()["fused"]
    groups: dict[tuple[str, int, str], dict[int, str]] = {}
    for name in names:
        owner, _, leaf = name.rpartition(".")
        kind = next((i for i, leaves in enumerate(sets) if leaf in leaves), -1)
        place = sets[kind].index(leaf) if kind >= 0 else 0
        groups.setdefault((owner, kind, "" if kind >= 0 else leaf), {})[place] = name
    return [[group[place] for place in sorted(group)] for group in groups.values()]


def known_runtimes() -> list[str]:
    """The names `require_loadable` takes."""
    return list(_table())


def spelling(scheme: Scheme) -> str:
    """A scheme's name without its cache, and what the name leaves open.

    >>> from bitwright.schemes.scheme import parse_scheme
    >>> spelling(parse_scheme("W8A8-FP8-KV8-FP8").with_activations("static"))
    'W8A8-FP8 static'
    """
    words = [replace(scheme, kv_cache=None).name]
    if scheme.weight.group == PER_TENSOR:
        words.append("tensor")
    elif scheme.weight.group == (BLOCK, BLOCK):
        words.append("block")
    if scheme.weight.asymmetric and not scheme.weight.super_blocks:
        words.append("asymmetric")
    if scheme.input is not None and scheme.input.mode == "static":
        words.append("static")
    return " ".join(words)


def require_loadable(
    runtime: str,
    fmt: str,
    scheme: Scheme,
    shapes: Mapping[str, tuple[int, int]],
    left_alone: Iterable[str] = (),
) -> None:
    """Raises BadRequest or BadShape, saying what the runtime does load, if it cannot load this.

    ``shapes``: the quantized layers' (O, I); ``left_alone``: names of those that are not. Raises
    UnknownName for an unknown runtime.
    """
    table = _table()
    if runtime not in table:
        raise UnknownName(f"unknown runtime {runtime!r}; known: {', '.join(table)}")
    entry = table[runtime]
    formats = {key: value for key, value in entry.items()
               if isinstance(value, list) and key not in ("caches", "groups")}  # fmt: skip
    asked = spelling(scheme)
    if fmt not in formats:
        raise BadRequest(f"{runtime} does not load the format {fmt}: use --format "
                         f"{' or '.join(formats)}")  # fmt: skip
    if not any(fnmatchcase(asked, pattern) for pattern in formats[fmt]):
        raise BadRequest(f"{runtime} does not load {asked} from {fmt}; it does load "
                         f"{', '.join(formats[fmt])}")  # fmt: skip
    if scheme.kv_cache is not None:
        cache_name = scheme.name.rpartition("-KV")[2]
        if not any(fnmatchcase(f"KV{cache_name}", pattern) for pattern in entry["caches"]):
            raise BadRequest(f"{runtime} does not load a KV{cache_name} cache; it does load "
                             f"{', '.join(entry['caches']) or 'none in low bits'}")  # fmt: skip
    groups = entry.get("groups")
    if groups is not None and scheme.weight.group[1] not in groups:
        raise BadRequest(f"{runtime} does not load group size {scheme.weight.group[1]}; it does "
                         f"load {', '.join(map(str, groups))} (-1: per channel)")  # fmt: skip
    step = entry.get("widths", 1)
    of_rows, of_columns = entry.get("rows", step), entry.get("columns", step)
    for name, (rows, cols) in shapes.items():
        if rows % of_rows or cols % of_columns:
            needed = f"{step}" if of_rows == of_columns else f"{of_rows} x {of_columns}"
            raise BadShape(f"{name}: {runtime} needs widths in multiples of {needed}, not {rows} x "
                           f"{cols}: add it to --ignore")  # fmt: skip
    if entry.get("merges"):
        _require_whole(runtime, scheme, shapes, left_alone, entry.get("block_rows", 1))


def _require_whole(
    runtime: str,
    scheme: Scheme,
    shapes: Mapping[str, tuple[int, int]],
    left_alone: Iterable[str],
    block_rows: int,
) -> None:
    """Matrices that are merged are quantized together, and meet where a block ends."""
    blocks = scheme.weight.group == (BLOCK, BLOCK)
    for group in fused([*shapes, *left_alone]):
        inside = [name for name in group if name in shapes]
        if inside and len(inside) < len(group):
            left = next(name for name in group if name not in shapes)
            raise BadRequest(f"{left}: {runtime} merges it with {inside[0]}: --ignore both or none")
        for name in inside[:-1] if blocks else []:
            if shapes[name][0] % block_rows:
                raise BadShape(
                    f"{name}: {runtime} merges it with {group[-1]}, so that its {shapes[name][0]} "
                    f"rows have to be a multiple of {block_rows}: add both to --ignore"
                )
