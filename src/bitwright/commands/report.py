"""`bitwright report`: one page about one checkpoint."""

from pathlib import Path
from typing import Annotated, Any

import typer

from bitwright.commands.screen import Model, Quiet, progress, screen


def make_report(
    model: str | Path,
    output: str | Path,
    *,
    reference: str | Path | None = None,
    text: str | None = None,
    windows: int = 40,
    sequence_length: int = 1024,
    command: str = "",
    progress: Any = lambda done, total, note: None,
) -> Path:
    """Write a self-contained HTML page about a quantized checkpoint; returns its path.

    With ``text`` (or ``reference``, then Python's manual) perplexity is measured, with
    ``reference`` also divergence, changed tokens and outliers. Raises BadRequest, BadCheckpoint.
    """
    from bitwright.api import load_tokenizer
    from bitwright.commands.measure import candidate_of, checkpoint_of
    from bitwright.commands.record import versions
    from bitwright.errors import BadRequest
    from bitwright.evaluation.report.page import render, write
    from bitwright.pipeline.texts import evaluation_windows, first_tokens
    from bitwright.runtime.load import format_of, load_model

    target = Path(output).expanduser()
    if not target.parent.is_dir():
        raise BadRequest(f"{target.parent} is not a folder: choose another output")
    checkpoint = checkpoint_of(model)
    if format_of(checkpoint) is None:
        raise BadRequest(f"{checkpoint.folder} is not quantized: there is nothing to report")
    original = checkpoint_of(reference) if reference is not None else None
    chosen = None
    if text is not None or original is not None:
        needed = windows * sequence_length
        ids = first_tokens(load_tokenizer(checkpoint), text or "pydoc", needed)
        chosen = evaluation_windows(ids, windows, sequence_length)
    candidate = candidate_of(
        checkpoint.folder.name,
        checkpoint,
        chosen,
        original=original,
        reference=load_model(original) if original is not None else None,
        progress=progress,
    )
    plan = candidate.report.get("plan", {})
    name = f"{plan.get('scheme', 'quantized')} by {plan.get('method', 'an unknown method')}"
    candidate.name = name
    known = None
    if original is not None:
        known = {
            "bytes": original.nbytes,
            "perplexity": candidate.row["reference_perplexity"],
        }
    facts = [
        ("this page", command),
        ("the checkpoint", str(candidate.run.get("command", "not recorded"))),
        ("quantized on", str(candidate.run.get("date", "not recorded"))),
        ("fingerprint", str(candidate.report.get("fingerprint", "not recorded"))),
    ]
    if chosen is not None:
        measured = f"{text or 'pydoc'}: {chosen.shape[0]} windows of {chosen.shape[1]} tokens"
        facts.append(("measured on", measured))
    facts += [(f"version: {key}", value) for key, value in versions().items()]
    made = candidate.run.get("versions", {})
    facts += [(f"quantized with: {key}", value) for key, value in made.items()]
    page = render(
        f"{checkpoint.folder.name}: {name}",
        [candidate],
        reference=known,
        facts=[(key, value) for key, value in facts if value],
    )
    try:
        write(target, page)
    except OSError as error:
        raise BadRequest(f"cannot write {target}: {error.strerror or error}") from error
    return target


def report(
    model: Model,
    output: Annotated[str, typer.Option("--output", "-o", help="HTML file to write.")],
    reference: Annotated[str | None, typer.Option(help="The original, for divergence.")] = None,
    text: Annotated[str | None, typer.Option(help="A .txt or .jsonl file, or pydoc.")] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows to score.")] = 40,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 1024,
    quiet: Quiet = False,
) -> None:
    """Write one HTML page about a quantized checkpoint: where it hurts, and what it cost."""
    from bitwright.commands.record import command_line

    with progress(quiet) as advance:
        made = make_report(
            model,
            output,
            reference=reference,
            text=text,
            windows=windows,
            sequence_length=sequence_length,
            command=command_line(),
            progress=advance,
        )
    if not quiet:
        screen.print(f"{made}: {made.stat().st_size / 1e3:.0f} KB")
