"""The command line. Every error raised on purpose is one line on stderr and exit code 2."""

import json
import sys
from dataclasses import asdict
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from bitwright.commands import compare, plan, quantize, report, rotate, train, verify
from bitwright.commands.screen import Json, Model, Quiet, screen
from bitwright.commands.screen import progress as _progress
from bitwright.errors import BitwrightError

INTERRUPTED = 130

app = typer.Typer(
    help="Quantize large language models and prove the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


app.command()(quantize.quantize)


@app.command()
def convert(
    model: Model,
    out: Annotated[str, typer.Argument(help="Folder to write.")],
    format: Annotated[str, typer.Option(help="compressed-tensors, gptq or awq.")],
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Round again what cannot be kept, at a loss.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write a quantized MODEL in another format, codes and scales unchanged."""
    from bitwright.api_convert import convert as run

    with _progress(quiet or as_json) as advance:
        done = run(
            model, out, format=format, requantize=requantize, overwrite=overwrite, progress=advance
        )
    if as_json:
        print(json.dumps(asdict(done)))
    elif not quiet:
        for name, reason in done.requantized.items():
            screen.print(f"[yellow]requantized[/] {name}: {reason}")
        kept = done.layers - len(done.requantized)
        screen.print(
            f"{out}: {done.source_format} -> {done.format}, codes of {kept} of {done.layers} "
            f"layers kept, {done.bytes_before / 1e6:.1f} -> {done.bytes_after / 1e6:.1f} MB"
        )


@app.command()
def evaluate(
    model: Model,
    reference: Annotated[str | None, typer.Option(help="The original, for divergence.")] = None,
    text: Annotated[
        str | None, typer.Option(help="A .txt or .jsonl file, or pydoc (the default).")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows to score.")] = 40,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 1024,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Tasks of lm-eval, or YAML files, separated by commas; without --text "
            "and --reference nothing else is measured."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents per task.")] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="Examples per prompt.")] = None,
    kv_rounding: Annotated[
        str, typer.Option(help="Keys of a quantized cache: nearest, or feedback (for queries).")
    ] = "nearest",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure perplexity, divergence from a reference, and benchmark tasks."""
    from bitwright.commands.tasks import run_tasks

    found: dict[str, Any] = {}
    if tasks is not None:
        found["tasks"] = run_tasks(model, tasks.split(","), limit=limit, shots=shots)
    if tasks is None or text is not None or reference is not None:
        found |= _measure(
            model, reference, text or "pydoc", windows, sequence_length, kv_rounding,
            quiet or as_json,
        )  # fmt: skip
    if as_json:
        print(json.dumps(found))
        return
    table = Table("measure", "value")
    for key, value in found.items():
        if key == "tasks":
            for task, metrics in value.items():
                for metric, number in metrics.items():
                    table.add_row(f"{task} {metric}", f"{number:.4f}")
        elif isinstance(value, tuple):
            table.add_row(key, " to ".join(f"{limit:.4f}" for limit in value))
        elif value is not None:
            table.add_row(key, f"{value:.4f}" if isinstance(value, float) else str(value))
    Console().print(table)


def _measure(
    model: str,
    reference: str | None,
    text: str,
    windows: int,
    sequence_length: int,
    kv_rounding: str,
    quiet: bool,
) -> dict[str, Any]:
    from bitwright import api

    with _progress(quiet) as advance:
        result = api.evaluate(
            model,
            reference=reference,
            text=text,
            windows=windows,
            sequence_length=sequence_length,
            kv_rounding=kv_rounding,
            progress=lambda done, total: advance(done, total, "windows"),
        )
    return asdict(result)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    kv_rounding: Annotated[
        str, typer.Option(help="Keys of a quantized cache: nearest, or feedback (for queries).")
    ] = "nearest",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Answer one prompt, greedily."""
    from bitwright import api

    answer = api.generate(
        model, prompt, max_new_tokens=max_new_tokens, kv_rounding=kv_rounding, device=device
    )
    print(answer)


@app.command()
def inspect(model: Model, as_json: Json = False) -> None:
    """List every tensor's scheme, shape and bits, and what was left alone."""
    from bitwright import api

    found = api.inspect(model)
    if as_json:
        print(json.dumps(found))
        return
    table = Table("tensor", "scheme", "shape", "bits", "KB", title=f"{model} ({found['format']})")
    for row in found["tensors"]:
        scheme = str(row["scheme"])
        if "group_size" in row:
            scheme += f" g{row['group_size']}" + (" asym" if row["asymmetric"] else "")
        shape = "x".join(map(str, row["shape"]))
        table.add_row(row["name"], scheme, shape, f"{row['bits']:.2f}", f"{row['bytes'] / 1e3:.1f}")
    out = Console()
    out.print(table)
    for name, reason in found["left_alone"].items():
        out.print(f"left alone: {name} ({reason})")
    out.print(f"total {found['bytes'] / 1e6:.1f} MB")


app.command()(verify.verify)
app.command()(plan.plan)
app.command()(report.report)
app.command()(rotate.rotate)
app.command()(compare.compare)
app.command()(train.train)


_UsageError: Any = typer.BadParameter.__bases__[0]  # typer carries its own copy of click


def main() -> None:
    """Entry point of the ``bitwright`` command."""
    arguments = sys.argv[1:] or ["--help"]
    try:
        code = app(arguments, prog_name="bitwright", standalone_mode=False)
    except BitwrightError as error:
        _refuse(str(error))
    except _UsageError as error:
        command = error.ctx.command_path if error.ctx else "bitwright"
        _refuse(f"{error.format_message().rstrip('.')} (see {command} --help)")
    except typer.Abort:
        code = INTERRUPTED
    if code == INTERRUPTED:
        print("bitwright: stopped; no output was changed", file=sys.stderr)
    sys.exit(code or 0)


def _refuse(reason: str) -> NoReturn:
    print(f"bitwright: {' '.join(reason.split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
