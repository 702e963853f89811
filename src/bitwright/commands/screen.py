"""What the commands share: standard options, the screen, the progress bar."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

screen = Console(stderr=True)

Model = Annotated[str, typer.Argument(help="Hugging Face folder, hub id, or GGUF file.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no tables.")]


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
