"""`bitwright verify`, and the same check at the end of `bitwright quantize`."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from bitwright.commands.screen import Json, Model
from bitwright.errors import UnknownName

if TYPE_CHECKING:
    from bitwright.evaluation.verify import Verdict


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
    verdict = verdict_of(model, runtime, python, reference, text)
    if as_json:
        print(json.dumps(asdict(verdict)))
    else:
        print_verdict(verdict)
    if not verdict.passed:
        raise typer.Exit(1)


def verdict_of(
    model: str, runtime: str, python: str | None, reference: str | None, text: str = "pydoc"
) -> "Verdict":
    """What a real runtime says of a checkpoint."""
    from bitwright.evaluation.verify import verify as run

    return run(model, runtime=runtime, python=python, reference=reference, text=text)


def require_runtime(runtime: str) -> None:
    """Raises UnknownName, which lists the known ones."""
    from bitwright.evaluation.verify import RUNTIMES

    if runtime not in RUNTIMES:
        raise UnknownName(f"unknown runtime {runtime!r}; known: {', '.join(RUNTIMES)}")


def print_verdict(verdict: "Verdict") -> None:
    """One line per check, and the result."""
    for check in verdict.checks:
        state = "pass" if check.passed else "FAIL"
        print(f"{state}  {check.name}" + (f": {check.detail}" if check.detail else ""))
    print("PASS" if verdict.passed else "FAIL")
