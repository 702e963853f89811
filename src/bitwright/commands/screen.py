"""What the commands share: standard options, the screen, the progress bar."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

screen = Console(stderr=True)

Model = Annotated[str, typer.Argument(help="Hugging Face folder or its URL, hub id, or GGUF file.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no tables.")]

# of quantize and train
Out = Annotated[str, typer.Argument(help="Folder to write.")]
GroupSize = Annotated[str, typer.Option(help="auto, a number, or -1 per channel.")]
Asymmetric = Annotated[bool, typer.Option("--asymmetric", help="Use zero points.")]
Cache = Annotated[str | None, typer.Option(help="Keys and values as none, fp8, int8 or int4.")]
Format = Annotated[str, typer.Option(help="On-disk format.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on where the same run was stopped, if it was.")
]


class Device(StrEnum):
    """Where to compute."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


Where = Annotated[Device, typer.Option(help="Where to compute.")]


@contextmanager
def progress(quiet: bool) -> Iterator[Any]:
    """A bar on stderr; yields what to call with (done, total, note)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    hidden = quiet or not screen.is_interactive  # elsewhere it would leave a blank line
    with Progress(*columns, console=screen, disable=hidden, transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda done, total, note: bar.update(
            task, completed=done, total=total, description=note
        )
