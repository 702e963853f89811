"""`bitwright train`."""

import json
import os
from typing import Annotated

import typer

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


def train(
    model: Model,
    out: Out,
    scheme: Annotated[str, typer.Option(help="W4A16, W4A8KV4, W8A8-FP8, ...")] = "W4A16",
    learn: Annotated[
        str, typer.Option("--train", help="What learns: scales (codes stay) or all.")
    ] = "scales",
    init: Annotated[
        str, typer.Option(help="How the start is quantized: rtn, gptq, awq+gptq, best.")
    ] = "gptq",
    step_sizes: Annotated[
        str | None,
        typer.Option(
            help="Scales under --train all: minmax (after rtn), learned (otherwise), lsq."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 300,
    data: Annotated[
        str, typer.Option(help="Training text: self, a file, pydoc, or a hub dataset id.")
    ] = "self",
    samples: Annotated[int, typer.Option(min=2, help="Windows of that text.")] = 512,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 512,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens per step.")] = 1024,
    lr: Annotated[
        float | None,
        typer.Option(min=0, help="Of log scales (2e-3) or of weights (1e-2 codes)."),
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="Learn from this model instead.")] = None,
    teacher_top: Annotated[
        int, typer.Option(min=0, help="Keep so many teacher probabilities on disk; 0: live.")
    ] = 0,
    group_size: GroupSize = "auto",
    asymmetric: Asymmetric = False,
    kv_cache: Cache = None,
    format: Format = "compressed-tensors",
    calibration: Annotated[
        str | None, typer.Option(help="Text the start is calibrated on; default: as --data.")
    ] = None,
    calibration_samples: Annotated[int, typer.Option(min=1, help="Windows of it.")] = 64,
    check_every: Annotated[
        int, typer.Option(min=1, help="Steps between held-out checks and saved states.")
    ] = 50,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, a third more time.")
    ] = False,
    device: Where = Device.AUTO,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    resume: Resume = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Quantize MODEL and train the loss back (LLM-QAT); an ordinary checkpoint into OUT."""
    from bitwright.api_train import train as run
    from bitwright.commands import record

    is_first = os.environ.get("RANK", "0") == "0"  # torchrun: the first process speaks for all
    quiet = quiet or as_json or not is_first
    with _progress(quiet) as advance:
        report, outcome = run(
            model, out,
            scheme=scheme, learn=learn, init=init, step_sizes=step_sizes, steps=steps, data=data,
            samples=samples, sequence_length=sequence_length, batch_tokens=batch_tokens, lr=lr,
            teacher=teacher, teacher_top=teacher_top, check_every=check_every,
            gradient_checkpointing=gradient_checkpointing, device=device.value, seed=seed,
            overwrite=overwrite, resume=resume, progress=advance, group_size=group_size,
            asymmetric=asymmetric, kv_cache=kv_cache, format=format,
            calibration=calibration, calibration_samples=calibration_samples,
        )  # fmt: skip
    if not is_first:
        return
    record.write_json(record.run_file(out), record.describe(report, record.command_line()))
    result = {
        "output": out,
        "scheme": report.plan.scheme.name,
        "bits_per_weight": report.plan.bits_per_weight,
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
        "seconds": report.seconds,
        "peak_rss_bytes": report.peak_rss_bytes,
        "training": report.training,
    }
    if as_json:
        print(json.dumps(result))
    elif not quiet:
        screen.print(
            f"{out}: {report.plan.scheme.name}, divergence on held-out windows "
            f"{outcome.before:.4f} -> {outcome.best:.4f} at step {outcome.best_step}, "
            f"{report.bytes_before / 1e6:.1f} -> {report.bytes_after / 1e6:.1f} MB, "
            f"{report.seconds:.0f} s, peak {report.peak_rss_bytes / 1e6:.0f} MB"
        )
