"""`bitwright quantize`."""

import json
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from bitwright.commands.screen import (
    Asymmetric,
    Cache,
    Device,
    Format,
    GroupSize,
    Json,
    Model,
    Out,
    Overwrite,
    Quiet,
    Resume,
    Seed,
    Where,
    screen,
)
from bitwright.commands.screen import progress as _progress
from bitwright.commands.verify import print_verdict, require_runtime, verdict_of
from bitwright.errors import BadRequest


class EngineName(StrEnum):
    """Who computes: this process, or a Ray cluster."""

    LOCAL = "local"
    RAY = "ray"


def quantize(
    model: Model,
    out: Out,
    scheme: Annotated[str, typer.Option(help="W4A16, W8A8-FP8, W8A8-INT8, NVFP4, ...")] = "W4A16",
    method: Annotated[str, typer.Option(help="How codes are chosen.")] = "rtn",
    group_size: GroupSize = "auto",
    asymmetric: Asymmetric = False,
    activations: Annotated[
        str | None, typer.Option(help="Scales of low-bit activations: dynamic or static.")
    ] = None,
    granularity: Annotated[
        str | None, typer.Option(help="Scales of 8-bit weights: tensor, channel or block.")
    ] = None,
    kv_cache: Cache = None,
    kv_scales: Annotated[
        str | None, typer.Option(help="Scales of such a cache: per tensor, head or token.")
    ] = None,
    input_range: Annotated[
        str, typer.Option(help="Static scales cover: absmax, percentile, mse, moving-average.")
    ] = "absmax",
    format: Format = "compressed-tensors",
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
    search: Annotated[
        str, typer.Option(help="Scale search: mse, absmax; auto is mse but for data-free FP8.")
    ] = "auto",
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
    true_inputs: Annotated[
        float, typer.Option(help="Fit to the original model's inputs (GPTAQ): 0 is off, try 0.5.")
    ] = 0.0,
    independent: Annotated[
        bool, typer.Option("--independent", help="Calibrate blocks on the original's inputs.")
    ] = False,
    seed: Seed = 0,
    target_bits: Annotated[
        float | None, typer.Option(min=2, help="Mixed precision: mean bits per weight.")
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(min=0, help="Mixed precision: estimated nats per token.")
    ] = None,
    choices: Annotated[
        str | None, typer.Option(help="Bit widths to mix, such as 3,4,8; 16 leaves alone.")
    ] = None,
    device: Where = Device.AUTO,
    engine: Annotated[
        EngineName, typer.Option(help="local, or ray: workers on this machine or a cluster's.")
    ] = EngineName.LOCAL,
    address: Annotated[
        str, typer.Option(help="Of the Ray cluster: auto, HOST:PORT; local starts one here.")
    ] = "local",
    cpus_per_task: Annotated[int, typer.Option(min=1, help="Cores of a Ray worker.")] = 1,
    memory: Annotated[
        str | None, typer.Option(help="Refuse beforehand what may need more, such as 8GiB.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, print, stop.")] = False,
    overwrite: Overwrite = False,
    resume: Resume = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Quantize MODEL into the folder OUT; times, memory and versions into OUT.run.json."""
    from bitwright import api
    from bitwright.api_allocate import mixed_precision
    from bitwright.cluster import on_ray
    from bitwright.commands import record
    from bitwright.pipeline.writer import require_absent
    from bitwright.runtime.store import is_url, require_nothing_at, write_text

    quiet = quiet or as_json
    if engine is EngineName.LOCAL and address != "local":
        raise BadRequest("--address is of a Ray cluster: add --engine ray")
    if is_url(out) and verify_in is not None:
        raise BadRequest("--verify loads OUT from a folder: write to one, or verify it later")
    chosen = None
    if engine is EngineName.RAY:
        chosen = on_ray(
            address=address,
            device="cuda" if device is Device.CUDA else "cpu",
            cpus=cpus_per_task,
            url=model if is_url(model) else None,
            trust_remote_code=trust_remote_code,
        )
    if verify_in is not None:
        require_runtime(verify_in)
    prepared = api.prepare(
        model,
        scheme=scheme,
        method=method,
        group_size=group_size,
        asymmetric=asymmetric,
        activations=activations,
        granularity=granularity,
        kv_cache=kv_cache,
        kv_scales=kv_scales,
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
        true_inputs=true_inputs,
        independent=independent,
        memory=memory,
        device="cpu" if engine is EngineName.RAY else device.value,  # its workers choose
        trust_remote_code=trust_remote_code,
    )
    if target_bits is not None or max_kl is not None:
        if not dry_run:  # before a minute of estimating, not after
            if is_url(out):
                require_nothing_at(out, overwrite=overwrite)
            else:
                require_absent(Path(out).expanduser(), overwrite=overwrite)
        with _progress(quiet) as advance:
            prepared, _ = mixed_precision(
                prepared, target_bits=target_bits, max_kl=max_kl, choices=_widths(choices),
                runtime=runtime, progress=advance,
            )  # fmt: skip
    elif choices is not None:
        raise BadRequest("--choices is for --target-bits or --max-kl: give one of them")
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
        done = api.execute(
            prepared, out, overwrite=overwrite, resume=resume, progress=advance, engine=chosen
        )
    said = record.describe(done, record.command_line())
    if is_url(out):
        write_text(f"{out.rstrip('/')}.run.json", json.dumps(said, indent=1) + "\n")
    else:
        record.write_json(record.run_file(out), said)
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
        verdict = verdict_of(out, verify_in, python, model)
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
            print_verdict(verdict)
        if not verdict.passed:
            raise typer.Exit(1)


def _widths(choices: str | None) -> list[int] | None:
    try:
        return None if choices is None else [int(word) for word in choices.split(",")]
    except ValueError:
        raise BadRequest(f"--choices {choices!r}: give bit widths such as 3,4,8") from None


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
