"""The command line. Every error raised on purpose is one line on stderr and exit code 2."""

import json
import sys
from dataclasses import asdict
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from bitwright.commands import compare, plan, report, rotate
from bitwright.commands.screen import Json, Model, Quiet, screen
from bitwright.commands.screen import progress as _progress
from bitwright.errors import BadRequest, BitwrightError, UnknownName

if TYPE_CHECKING:
    from bitwright.evaluation.verify import Verdict

app = typer.Typer(
    help="Quantize large language models and prove the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Device(StrEnum):
    """Where to compute."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


@app.command()
def quantize(
    model: Model,
    out: Annotated[str, typer.Argument(help="Folder to write.")],
    scheme: Annotated[str, typer.Option(help="W4A16, W8A8-FP8, W8A8-INT8, NVFP4, ...")] = "W4A16",
    method: Annotated[str, typer.Option(help="How codes are chosen.")] = "rtn",
    group_size: Annotated[str, typer.Option(help="auto, a number, or -1 per channel.")] = "auto",
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="Use zero points.")] = False,
    activations: Annotated[
        str | None, typer.Option(help="Scales of low-bit activations: dynamic or static.")
    ] = None,
    granularity: Annotated[
        str | None, typer.Option(help="Scales of 8-bit weights: tensor, channel or block.")
    ] = None,
    kv_cache: Annotated[
        str | None, typer.Option(help="Keys and values as none, fp8, int8 or int4.")
    ] = None,
    input_range: Annotated[
        str, typer.Option(help="Static scales cover: absmax, percentile, mse, moving-average.")
    ] = "absmax",
    format: Annotated[str, typer.Option(help="On-disk format.")] = "compressed-tensors",
    runtime: Annotated[
        str | None, typer.Option("--for", help="Refuse what this runtime cannot load.")
    ] = None,
    verify_in: Annotated[
        str | None, typer.Option("--verify", help="Check OUT in a runtime at the end, see verify.")
    ] = None,
    python: Annotated[
        str | None, typer.Option(help="The interpreter that has the runtime to verify in.")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="A .txt or .jsonl file, pydoc, self, or a hub dataset id.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration samples.")] = 128,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens per sample.")] = 2048,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Regex of layers to leave in 16 bits; repeatable.")
    ] = None,
    search: Annotated[str, typer.Option(help="Scale search: mse or absmax.")] = "mse",
    effort: Annotated[
        str, typer.Option(help="Budget of methods that tune: fast, balanced or best.")
    ] = "balanced",
    damp: Annotated[float, typer.Option(min=0, help="GPTQ's damping fraction.")] = 0.01,
    order: Annotated[str, typer.Option(help="GPTQ's column order: activation, natural.")] = (
        "activation"
    ),
    smoothing: Annotated[
        float | None, typer.Option(min=0, max=1, help="SmoothQuant's strength; default: searched.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    device: Annotated[Device, typer.Option(help="Where to compute.")] = Device.AUTO,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, print, stop.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Quantize MODEL into the folder OUT; times, memory and versions into OUT.run.json."""
    from bitwright import api
    from bitwright.commands import record

    quiet = quiet or as_json
    _require_device(device)
    if verify_in is not None:
        _require_runtime(verify_in)
    prepared = api.prepare(
        model,
        scheme=scheme,
        method=method,
        group_size=group_size,
        asymmetric=asymmetric,
        activations=activations,
        granularity=granularity,
        kv_cache=kv_cache,
        input_range=input_range,
        format=format,
        runtime=runtime,
        calibration=calibration,
        samples=samples,
        sequence_length=sequence_length,
        ignore=ignore or (),
        seed=seed,
        search=search,
        effort=effort,
        damp=damp,
        order=order,
        smoothing=smoothing,
        trust_remote_code=trust_remote_code,
    )
    if not quiet:
        for note in prepared.plan.notes:
            screen.print(f"[yellow]note[/] {note}")
    if dry_run:
        plan = prepared.plan.to_json() | {
            "bits_per_weight": prepared.plan.bits_per_weight,
            "predicted": asdict(prepared.prediction),
        }
        if as_json:
            print(json.dumps(plan))
        else:
            _print_plan(prepared)
        return
    with _progress(quiet) as advance:
        done = api.execute(prepared, out, overwrite=overwrite, progress=advance)
    record.write_json(record.run_file(out), record.describe(done, record.command_line()))
    layers = [
        {key: value for key, value in asdict(row).items() if value not in ("", None)}
        for row in done.layers
    ]
    result = {
        "output": out,
        "scheme": done.plan.scheme.name,
        "method": done.plan.method,
        "bits_per_weight": done.plan.bits_per_weight,
        "bytes_before": done.bytes_before,
        "bytes_after": done.bytes_after,
        "seconds": done.seconds,
        "peak_rss_bytes": done.peak_rss_bytes,
        "layers": layers,
    }
    verdict = None
    if verify_in is not None:
        verdict = _verify(out, verify_in, python, model)
        result["verdict"] = asdict(verdict)
    if as_json:
        print(json.dumps(result))
    elif not quiet:
        for row in done.layers:
            if row.fallback:
                screen.print(f"[yellow]fallback[/] {row.name}: {row.fallback}")
        screen.print(
            f"{out}: {done.plan.scheme.name} by {done.plan.method}, "
            f"{done.plan.bits_per_weight:.3f} bits per weight, "
            f"{done.bytes_before / 1e6:.1f} -> {done.bytes_after / 1e6:.1f} MB, "
            f"{done.seconds:.1f} s, peak {done.peak_rss_bytes / 1e6:.0f} MB"
        )
    if verdict is not None:
        if not quiet:
            _print_verdict(verdict)
        if not verdict.passed:
            raise typer.Exit(1)


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
            model, reference, text or "pydoc", windows, sequence_length, quiet or as_json
        )
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
    model: str, reference: str | None, text: str, windows: int, sequence_length: int, quiet: bool
) -> dict[str, Any]:
    from bitwright import api

    with _progress(quiet) as advance:
        result = api.evaluate(
            model,
            reference=reference,
            text=text,
            windows=windows,
            sequence_length=sequence_length,
            progress=lambda done, total: advance(done, total, "windows"),
        )
    return asdict(result)


@app.command()
def verify(
    model: Model,
    runtime: Annotated[str, typer.Option(help="vllm, transformers or llama.cpp.")],
    python: Annotated[
        str | None, typer.Option(help="The interpreter that has the runtime; default: this one.")
    ] = None,
    reference: Annotated[str | None, typer.Option(help="The original, for more checks.")] = None,
    text: Annotated[str, typer.Option(help="A .txt or .jsonl file, or pydoc.")] = "pydoc",
    as_json: Json = False,
) -> None:
    """Check that a real runtime computes what MODEL says; exit code 1 if it does not."""
    verdict = _verify(model, runtime, python, reference, text)
    if as_json:
        print(json.dumps(asdict(verdict)))
    else:
        _print_verdict(verdict)
    if not verdict.passed:
        raise typer.Exit(1)


def _verify(
    model: str, runtime: str, python: str | None, reference: str | None, text: str = "pydoc"
) -> "Verdict":
    from bitwright.evaluation.verify import verify as run

    return run(model, runtime=runtime, python=python, reference=reference, text=text)


def _require_runtime(runtime: str) -> None:
    from bitwright.evaluation.verify import RUNTIMES

    if runtime not in RUNTIMES:
        raise UnknownName(f"unknown runtime {runtime!r}; known: {', '.join(RUNTIMES)}")


def _print_verdict(verdict: "Verdict") -> None:
    for check in verdict.checks:
        state = "pass" if check.passed else "FAIL"
        print(f"{state}  {check.name}" + (f": {check.detail}" if check.detail else ""))
    print("PASS" if verdict.passed else "FAIL")


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
) -> None:
    """Answer one prompt, greedily."""
    from bitwright import api

    print(api.generate(model, prompt, max_new_tokens=max_new_tokens))


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


app.command()(plan.plan)
app.command()(report.report)
app.command()(rotate.rotate)
app.command()(compare.compare)


def main() -> None:
    """Entry point of the ``bitwright`` command."""
    try:
        app()
    except BitwrightError as error:
        message = " ".join(str(error).split())
        print(f"bitwright: {message}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == 130:  # how typer ends on an interrupt
            print("bitwright: stopped; nothing was written", file=sys.stderr)
        raise


def _require_device(device: Device) -> None:
    if device is Device.CUDA:
        raise BadRequest("--device cuda: this version computes on the CPU only; use auto or cpu")


def _print_plan(prepared: Any) -> None:
    plan, prediction = prepared.plan, prepared.prediction
    table = Table("layer", "shape", "scheme", "bits")
    for layer in plan.layers:
        shape = "x".join(map(str, layer.shape))
        if layer.scheme is None:
            table.add_row(layer.name, shape, f"left alone: {layer.ignored}", "16")
        else:
            bits = layer.scheme.weight.bits_per_value(layer.shape)
            table.add_row(layer.name, shape, layer.scheme.name, f"{bits:.3f}")
    out = Console()
    out.print(table)
    out.print(
        f"{plan.scheme.name} by {plan.method}: {plan.bits_per_weight:.3f} bits per weight; about "
        f"{prediction.memory_bytes / 1e6:.0f} MB memory, {prediction.disk_bytes / 1e6:.0f} MB "
        f"disk, {prediction.seconds:.0f} s"
    )


if __name__ == "__main__":
    main()
