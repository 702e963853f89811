"""`bitwright compare`: many schemes on one model, one table, one page.

``DIR/results.json`` has one row per scheme and is replaced after every one of them; what the page
draws lies in ``DIR/details``, the checkpoints in ``DIR/checkpoints``. Started again with the same
settings, finished rows are kept and the rest is done.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from bitwright.commands.screen import Json, Model, Quiet, progress, screen
from bitwright.errors import BadRequest, BitwrightError

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Entry:
    """One scheme by one method."""

    scheme: str
    method: str

    @property
    def name(self) -> str:
        """As written on the command line."""
        return f"{self.scheme}:{self.method}"

    @property
    def slug(self) -> str:
        """A name for files."""
        return self.name.replace(":", "-").replace("/", "-")


def parse_entries(schemes: str | Sequence[str]) -> list[Entry]:
    """Entries of "W4A16:gptq,W8A8-FP8"; the method is rtn where none is given.

    Raises BadRequest if there is none. Names are not checked: one that is not known becomes a
    row with its reason.
    """
    parts = schemes.split(",") if isinstance(schemes, str) else list(schemes)
    found = []
    for part in parts:
        scheme, _, method = part.strip().partition(":")
        if scheme:
            found.append(Entry(scheme.upper(), method.strip().lower() or "rtn"))
    if not found:
        raise BadRequest("--schemes names no scheme: give, for example, W4A16:gptq,W8A16")
    return list(dict.fromkeys(found))


def compare_schemes(
    model: str | Path,
    output: str | Path,
    schemes: str | Sequence[str],
    *,
    text: str = "pydoc",
    windows: int = 40,
    sequence_length: int = 1024,
    calibration: str = "pydoc",
    samples: int = 128,
    calibration_length: int = 2048,
    group_size: int | str = "auto",
    effort: str = "balanced",
    seed: int = 0,
    gpu: str = "HERE",
    overwrite: bool = False,
    command: str = "",
    progress: Progress = lambda done, total, note: None,
) -> dict[str, Any]:
    """Quantize by every scheme, measure all against the original, write results and page.

    Returns what results.json holds. The calibration text is read (or written, for "self") once,
    and the original's hidden states on the test text are computed once. A scheme that fails is a
    row with ``status`` "failed" and its ``reason``. Raises BadRequest, BadCheckpoint.
    """
    from bitwright.commands.comparison import Comparison

    settings = {
        "text": text, "windows": windows, "sequence_length": sequence_length,
        "calibration": calibration, "samples": samples, "calibration_length": calibration_length,
        "group_size": str(group_size), "effort": effort, "seed": seed, "gpu": gpu,
    }  # fmt: skip
    entries = parse_entries(schemes)
    calibrates = any(entry.method != "rtn" for entry in entries)
    folder = Path(output).expanduser()
    comparison = Comparison(model, folder, settings, command, overwrite, calibrates)
    for index, entry in enumerate(entries):
        if comparison.is_done(entry):
            continue
        said = f"{entry.name} ({index + 1} of {len(entries)})"

        def advance(done: int, total: int, note: str, said: str = said) -> None:
            progress(done, total, f"{said}: {note}")

        comparison.add(entry, advance)
    return comparison.finish(entries)


def compare(
    model: Model,
    schemes: Annotated[str, typer.Option(help="W4A16:gptq,W4A16:awq,W8A8-FP8,...")],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder for everything.")],
    text: Annotated[str, typer.Option(help="A .txt or .jsonl file, or pydoc.")] = "pydoc",
    windows: Annotated[int, typer.Option(min=1, help="Windows to score.")] = 40,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 1024,
    calibration: Annotated[
        str, typer.Option(help="A .txt or .jsonl file, pydoc, self, or a hub dataset id.")
    ] = "pydoc",
    samples: Annotated[int, typer.Option(min=1, help="Calibration samples.")] = 128,
    calibration_length: Annotated[int, typer.Option(min=2, help="Tokens per sample.")] = 2048,
    group_size: Annotated[str, typer.Option(help="auto, a number, or -1 per channel.")] = "auto",
    effort: Annotated[str, typer.Option(help="fast, balanced or best.")] = "balanced",
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    gpu: Annotated[str, typer.Option(help="Device of the predicted speed.")] = "HERE",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start afresh.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Quantize MODEL by several schemes and compare quality, size and speed."""
    import json

    from bitwright.commands.record import command_line

    with progress(quiet or as_json) as advance:
        found = compare_schemes(
            model,
            output,
            schemes,
            text=text,
            windows=windows,
            sequence_length=sequence_length,
            calibration=calibration,
            samples=samples,
            calibration_length=calibration_length,
            group_size=group_size,
            effort=effort,
            seed=seed,
            gpu=gpu,
            overwrite=overwrite,
            command=command_line(),
            progress=advance,
        )
    if as_json:
        print(json.dumps(found))
    elif not quiet:
        _show(found)
        screen.print(f"{output}/results.json, {output}/report.html")
    if all(row["status"] == "failed" for row in found["rows"]):
        raise BitwrightError("every scheme failed; results.json has the reasons")


def _show(found: dict[str, Any]) -> None:
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("scheme", no_wrap=True)
    heads = ("bits", "MB", "ppl", "change", "KL", "median", "99 %", "same", "s", "tok/s *", "here")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    original = found["reference"]
    speeds = [
        _n(original.get(f"tokens_per_second_{kind}"), 0) for kind in ("predicted", "measured")
    ]
    size = f"{original['bytes'] / 1e6:.1f}"
    table.add_row("16 bits", "16", size, _n(original["perplexity"], 3), *[""] * 6, *speeds)
    for row in found["rows"]:
        if row["status"] == "failed":
            continue
        table.add_row(
            row["name"],
            _n(row["bits_per_weight"], 3),
            _n(row["bytes"] / 1e6, 1),
            _n(row["perplexity"], 3),
            _n(100 * row["perplexity_change"], 2) + "%",
            _n(row["kl_mean"], 4),
            _n(row["kl_median"], 4),
            _n(row["kl_99"], 3),
            _n(100 * row["top1_agreement"], 1) + "%",
            _n(row["seconds"], 0),
            _n(row["tokens_per_second_predicted"], 0),
            _n(row["tokens_per_second_measured"], 0),
        )
    out = Console()
    if not out.is_terminal:
        out = Console(width=118)
    out.print(table)
    gpu = found["settings"]["gpu"]
    out.print(
        f"* predicted for one stream on {gpu}. here: measured on this machine with bitwright's "
        "kernels; - where none runs the codes as they are stored"
    )
    for row in found["rows"]:
        if row["status"] == "failed":
            out.print(f"[red]failed[/] {row['name']}: {row['reason']}")


def _n(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
