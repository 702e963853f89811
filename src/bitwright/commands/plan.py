"""`bitwright plan`."""

import json
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from bitwright.commands.screen import Json


def plan(
    model: Annotated[str, typer.Argument(help="Folder, config.json or hub id; no weights needed.")],
    gpu: Annotated[
        str, typer.Option(help="Devices separated by commas: A100-80GB, H100, L4, CPU, ..., HERE.")
    ] = "A100-80GB",
    gpus: Annotated[int | None, typer.Option(help="How many there are; default: enough.")] = None,
    context: Annotated[int, typer.Option(help="Tokens per sequence.")] = 8192,
    concurrency: Annotated[int, typer.Option(help="Sequences at a time.")] = 32,
    priority: Annotated[
        str, typer.Option(help="quality, throughput, cost or latency.")
    ] = "throughput",
    kv_bits: Annotated[int, typer.Option(help="Bits of the cache: 16, 8 or 4.")] = 16,
    cpu_memory: Annotated[float | None, typer.Option(help="Of this CPU, in GiB.")] = None,
    cpu_bandwidth: Annotated[float | None, typer.Option(help="Of this CPU, in GB/s.")] = None,
    cpu_teraops: Annotated[
        float | None, typer.Option(help="Of this CPU, 16-bit, 1e12 per second.")
    ] = None,
    measured: Annotated[
        str | None, typer.Option(help="JSON file of kernel efficiencies of your own.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print the terms of a step, in milliseconds.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say what each scheme needs and gives on each device, from config.json alone."""
    from bitwright.planning.plan import plan as make

    found = make(
        model,
        gpu=gpu,
        gpus=gpus,
        context=context,
        concurrency=concurrency,
        priority=priority,
        kv_bits=kv_bits,
        cpu_memory=cpu_memory,
        cpu_bandwidth=cpu_bandwidth,
        cpu_teraops=cpu_teraops,
        measured=measured,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        print(json.dumps(found))
    else:
        _show(found, explain)


def _show(found: dict[str, Any], explain: bool) -> None:
    details, out = found["details"], Console()
    count = found["parameters"]
    out.print(
        f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million", "parameters"
    )
    for note in details["model"]["notes"]:
        out.print(f"[yellow]note[/] {note}")
    size = f"{details['context']} tokens, {details['concurrency']} sequences"
    table = Table("cache", title=f"Keys and values: {size}", box=SIMPLE)
    for head in ("bytes/token", "GB/sequence", "GB for all"):
        table.add_column(head, justify="right")
    for bits, row in details["kv_cache"].items():
        sizes = (row["bytes_per_sequence"] / 1e9, row["bytes"] / 1e9)
        table.add_row(f"{bits} bits", f"{row['bytes_per_token']:,}", *(f"{x:.2f}" for x in sizes))
    out.print(table)
    for name, device in details["devices"].items():
        out.print(_table(found, name))
        if explain:
            out.print(_terms(found, name))
        for scheme, one in details["schemes"].items():
            if one[name]["fallback"]:
                out.print(f"* {scheme}: {name} does not execute it; {one[name]['fallback']}")
        advice = found["recommendation"][name]
        out.print(f"[bold]{name}: {advice['scheme']}[/] - {advice['reason']}")
        used = sorted({one[name]["kernel"] for one in details["schemes"].values()})
        out.print(
            f"Numbers: device {device['origin']}; {_origins(details['kernels'][name], used)}\n"
        )
    for method in ("rtn", "gptq"):
        cost = details["quantize_here"][method]
        out.print(
            f"Quantizing on 2 cores by {method}: {_duration(cost['seconds'])}, "
            f"{cost['ram_bytes'] / 1e9:.1f} GB RAM, {cost['disk_bytes'] / 1e9:.1f} GB disk"
        )


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def _table(found: dict[str, Any], name: str) -> Table:
    table = Table(title=name, box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("scheme", no_wrap=True)
    for head in ("bits", "GB", "GPUs", "batch", "tok/s", "alone", "prefill", "faster", "until"):
        table.add_column(head, justify="right", no_wrap=True)
    table.caption = (
        "tok/s: all sequences together; alone: one sequence; faster: alone, against 16 bits on as "
        "many GPUs; until: the batch up to which weights are waited for"
    )
    for row in found["schemes"]:
        one = found["details"]["schemes"][row["scheme"]][name]
        table.add_row(
            row["scheme"] + ("" if one["native"] else " *"),
            f"{row['bits_per_weight']:.2f}",
            f"{row['weight_bytes'] / 1e9:.1f}",
            str(one["devices"]),
            str(one["batch"]),
            f"{one['decode_tokens_per_second']:.0f}",
            f"{one['single_stream_tokens_per_second']:.0f}",
            f"{one['prefill_tokens_per_second']:.0f}",
            f"{one['speed_up']['single_stream']['times']:.2f}x",
            str(one["memory_bound_until_batch_weights_only"]),
        )
    return table


def _origins(kernels: dict[str, Any], used: list[str]) -> str:
    """Where the shares of the kernels used come from."""
    said = []
    for name in [*used, "attention"]:
        read, compute = (kernels[name][kind]["origin"] for kind in ("bandwidth", "compute"))
        both = read if read == compute else f"bandwidth {read}, compute {compute}"
        said.append(f"{name} {both}")
    return "; ".join(said)


def _terms(found: dict[str, Any], name: str) -> Table:
    """One sequence's step in milliseconds, on as many GPUs as 16 bits need."""
    table = Table(title=f"{name}: one token, milliseconds", box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("scheme", no_wrap=True)
    heads = ("read_weights", "multiply", "attention", "links", "launches", "seconds")
    for head in heads:
        table.add_column("sum" if head == "seconds" else head.replace("_", " "), justify="right")
    for scheme, one in found["details"]["schemes"].items():
        terms = one[name]["speed_up"]["single_stream"]["terms"]
        table.add_row(scheme, *(f"{terms[head] * 1e3:.2f}" for head in heads))
    return table
