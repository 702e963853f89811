"""`bitwright rotate`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from bitwright.commands.screen import Json, Model, Quiet, progress, screen
from bitwright.errors import BadRequest


def rotate(
    model: Model,
    out: Annotated[str, typer.Argument(help="Folder to write.")],
    online: Annotated[
        bool, typer.Option(help="Also rotate while running, before down projections.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the random signs.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write MODEL in a rotated basis: the same function, fewer outliers. Quantize OUT then."""
    with progress(quiet or as_json) as advance:
        rotate_model(model, out, online=online, seed=seed, overwrite=overwrite, progress=advance)
    if as_json:
        print(json.dumps({"output": out, "online": online, "seed": seed}))
    elif not quiet:
        screen.print(f"{out}: rotated; quantize it as any model")


def rotate_model(
    model: str | Path,
    output: str | Path,
    *,
    online: bool = False,
    seed: int = 0,
    overwrite: bool = False,
    progress: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> None:
    """Write an equivalent, rotated checkpoint (see docs/rotations.md) into ``output``.

    With ``online``, runtimes must apply the transforms that config.json then lists; without, any
    runtime computes the same function. Raises BadRequest, BadCheckpoint or UnsupportedModel.
    """
    from bitwright.pipeline.rotation import rotate_checkpoint
    from bitwright.pipeline.topology import discover
    from bitwright.runtime.load import format_of
    from bitwright.runtime.source import resolve

    source, target = resolve(model), Path(output).expanduser()
    if format_of(source) is not None:
        raise BadRequest(f"{source.folder} is quantized: rotate the original, then quantize it")
    if target.exists() and not overwrite:
        raise BadRequest(f"{target} exists: choose another output or add --overwrite")
    if target.resolve() == source.folder.resolve():
        raise BadRequest("the output is the model itself: choose another folder")
    rotate_checkpoint(
        source, discover(source), target, seed=seed, online=online, overwrite=overwrite,
        progress=progress,
    )  # fmt: skip
