"""`bitwright.train`: quantize, train what was lost back, write an ordinary checkpoint."""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitwright.api import calibration_tokens, checked_target
from bitwright.errors import BadRequest, UnknownName
from bitwright.methods.compose import parse_method
from bitwright.pipeline.checkpoint import Checkpoint, open_checkpoint
from bitwright.pipeline.memory import peak_rss_bytes
from bitwright.pipeline.report import LayerReport, Report
from bitwright.pipeline.run import finish_checkpoint, quantize_checkpoint
from bitwright.pipeline.topology import match_names
from bitwright.pipeline.writer import CheckpointWriter, folder_bytes
from bitwright.request import Prepared, prepare
from bitwright.runtime.gguf_export import write_checkpoint
from bitwright.runtime.load import dense_view
from bitwright.runtime.source import resolve
from bitwright.schemes.plan import Calibration
from bitwright.schemes.quantized import QuantizedLinear
from bitwright.training.processes import start_processes
from bitwright.training.qat import Outcome, Recipe, restore_best, split_samples
from bitwright.training.qat import train as run_training
from bitwright.training.student import (
    STEP_SIZES,
    Learning,
    make_student,
    make_teacher,
    stored_values,
)

TRAIN = ("scales", "all")
INITS = ("rtn", "gptq", "awq+gptq", "best")
RATES = {
    "scales": {"scale": 2e-3, "zero": 2e-2, "plain": 2e-4},
    "all": {"scale": 2e-3, "zero": 2e-2, "plain": 2e-4, "code": 1e-2},
}
MAIN = {"scales": "scale", "all": "code"}  # what --lr means
Say = Callable[[int, int, str], None]


@dataclass(frozen=True, eq=False)
class _Setting:
    """One run: what was asked, checked."""

    prepared: Prepared
    target: Path
    recipe: Recipe
    data: Calibration
    request: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Where everything of this run that is not the output lies."""
        return self.target.parent / f".{self.target.name}.training"


def train(
    model: str | Path,
    output: str | Path,
    *,
    scheme: str = "W4A16",
    steps: int = 300,
    data: str = "self",
    samples: int = 512,
    sequence_length: int = 512,
    batch_tokens: int = 1024,
    lr: float | None = None,
    teacher: str | Path | None = None,
    teacher_top: int = 0,
    init: str = "gptq",
    calibration: str | None = None,
    calibration_samples: int = 64,
    learn: str = "scales",
    step_sizes: str | None = None,
    gradient_checkpointing: bool = False,
    device: str = "auto",
    check_every: int = 50,
    overwrite: bool = False,
    resume: bool = False,
    seed: int = 0,
    progress: Say = lambda done, total, note: None,
    **request: Any,
) -> tuple[Report, Outcome]:
    """Quantize ``model`` by the method ``init``, train, and write ``output``.

    ``learn``: "scales" (codes stay; scales, zero points, norms and biases learn) or "all" (the
    quantized weights too; embeddings stay as they are).
    ``step_sizes`` of "all": "minmax" (scales cover the largest weights, chosen anew every step;
    the default after rtn), "learned" (beside positions on the grid, the default after other
    inits) or "lsq" (as Esser et al. 2020 have it); "minmax" and "lsq" start from the original
    weights, not the start's codes. ``device``: "auto", "cpu" or "cuda". ``data``: "self", a text
    file, "pydoc" or a hub dataset; the start is calibrated on the first
    ``calibration_samples`` windows of ``calibration``, or else of the same. ``teacher``: another
    model of the same vocabulary, default the original; with ``teacher_top`` > 0 so many of its
    probabilities per token are kept on disk and it leaves memory. ``lr``: of scales (of their
    logarithms), or with "all" of weights (in codes). Further keywords are those of `prepare`.

    Under torchrun every process trains on its share of each step and keeps its part of weights,
    latents and moments (FSDP2); the first one writes.
    Raises BadRequest, BadCheckpoint, NoSpace, training.qat.Diverged.
    """
    began = time.perf_counter()
    if learn not in TRAIN or init not in INITS:
        raise UnknownName(f"--train is one of {', '.join(TRAIN)}, --init one of {', '.join(INITS)}")
    learning = _learning(learn, init, step_sizes, gradient_checkpointing)
    processes = start_processes(device)
    per_step = max(1, batch_tokens // sequence_length)
    if per_step % processes.count:
        raise BadRequest(
            f"a step of {per_step} sequences cannot be shared by {processes.count} processes: "
            f"give --batch-tokens a multiple of {processes.count * sequence_length}"
        )
    if learn == "all" and init == "rtn":
        request |= {"search": "absmax"}
    calibration = calibration or (None if init == "rtn" else data)
    prepared = prepare(
        model, scheme=scheme, method=init, seed=seed, calibration=calibration,
        samples=calibration_samples, sequence_length=sequence_length, **request,
    )  # fmt: skip
    target = checked_target(prepared.source, output, overwrite=overwrite)
    rates = RATES[learn]
    if lr is not None:
        rates = rates | {MAIN[learn]: lr}
    recipe = Recipe(
        steps=steps,
        sequences=per_step,
        learning_rates=rates,
        check_every=check_every,
        seed=seed,
    )
    asked = {
        "plan": prepared.plan.fingerprint,
        "model": [prepared.source.folder.name, prepared.source.nbytes],
        "recipe": asdict(recipe) | {"learning_rates": dict(recipe.learning_rates)},
        "data": [data, samples, sequence_length],
        "teacher": [str(teacher), teacher_top],
        "train": [learn, learning.step_sizes, processes.count],
    }
    setting = _Setting(prepared, target, recipe, Calibration(data, samples, sequence_length), asked)
    with processes.first():
        if processes.rank == 0:
            if not resume:
                shutil.rmtree(setting.folder, ignore_errors=True)
            _start(setting, resume, processes.device, progress)
        tokens, note = calibration_tokens(
            prepared.source, setting.data, seed, device=processes.device, progress=progress
        )
    first = open_checkpoint(setting.folder / "start")
    student, owners = make_student(
        first, prepared.fmt, prepared.source, prepared.topology, learning,
        prepared.plan.scheme.kv_cache, processes,
    )  # fmt: skip
    config: Any = prepared.topology.model.config
    targets = make_teacher(
        prepared.source if teacher is None else resolve(teacher), tokens,
        min(teacher_top, config.get_text_config().vocab_size), setting.folder / "teacher.bin",
        processes, progress,
    )  # fmt: skip
    outcome = run_training(
        student, tokens, targets, recipe, setting.folder,
        request=asked, resume=resume, say=progress,
    )  # fmt: skip
    restore_best(student, setting.folder)
    values = stored_values(student)
    report = Report(prepared.plan, bytes_before=prepared.source.nbytes)
    report.training = _summary(setting, outcome, len(tokens), note)
    if processes.rank == 0:
        names = match_names(student.model, dense_view(first, prepared.fmt, set(owners.values())))
        codes = {owners[p]: q for p, q in values.items() if isinstance(q, QuantizedLinear)}
        changed = {names[p]: v for p, v in values.items() if isinstance(v, Tensor)}
        write_checkpoint(
            prepared.fmt, target,
            lambda folder, replacing: _write(
                setting, first, codes, changed, report, folder, overwrite=replacing
            ),
            overwrite=overwrite, progress=progress,
        )  # fmt: skip
        shutil.rmtree(setting.folder, ignore_errors=True)
    processes.meet()
    report.seconds, report.peak_rss_bytes = time.perf_counter() - began, peak_rss_bytes()
    return report, outcome


def _learning(learn: str, init: str, step_sizes: str | None, recompute: bool) -> Learning:
    """What learns, checked."""
    chosen = step_sizes or ("minmax" if init == "rtn" and learn == "all" else "learned")
    if chosen not in STEP_SIZES:
        raise UnknownName(f"unknown step sizes {chosen!r}; known: {', '.join(STEP_SIZES)}")
    if learn == "scales" and chosen == "minmax":
        raise BadRequest("--step-sizes minmax leaves no scale to learn: use --train all")
    if learn == "scales" and chosen == "lsq":
        raise BadRequest("--step-sizes lsq learns weights as well: use --train all")
    if chosen != "learned" and parse_method(init).fold:
        raise BadRequest(
            f"--step-sizes {chosen} starts from the original weights, which --init {init} "
            "rescales: use --init rtn or gptq, or --step-sizes learned"
        )
    return Learning(learn == "all", chosen, recompute)


def _start(setting: _Setting, resume: bool, device: torch.device, progress: Say) -> None:
    """The quantized checkpoint that training starts from, unless it is there already."""
    prepared, folder = setting.prepared, setting.folder / "start"
    if folder.exists():
        stored = json.loads((folder / "quantization_report.json").read_text(encoding="utf-8"))
        if stored["fingerprint"] == prepared.plan.fingerprint:
            return
        raise BadRequest(
            f"--resume: {setting.folder} was begun with another plan: ask for the same as then, "
            "or start over without --resume"
        )
    tokens = None
    if prepared.plan.calibration is not None:
        tokens, _ = calibration_tokens(
            prepared.source, prepared.plan.calibration, prepared.plan.seed,
            device=device, progress=progress,
        )  # fmt: skip
    quantize_checkpoint(
        prepared.source, prepared.topology, folder, prepared.plan, prepared.fmt,
        tokens_NT=tokens, resume=resume, progress=progress,
    )  # fmt: skip


def _summary(setting: _Setting, outcome: Outcome, samples: int, note: str) -> dict[str, Any]:
    judges, pupils = split_samples(samples, setting.recipe)
    return {
        **setting.request,
        "held_out_before": outcome.before,
        "held_out_best": outcome.best,
        "best_step": outcome.best_step,
        "curve": outcome.curve,
        **({"note": note} if note else {}),
        "windows": [len(pupils), len(judges)],
    }


def _write(
    setting: _Setting,
    first: Checkpoint,
    codes: Mapping[str, QuantizedLinear],
    changed: Mapping[str, Tensor],
    report: Report,
    folder: Path,
    *,
    overwrite: bool,
) -> Report:
    """The start with its ``codes``, by layer name, and ``changed`` tensors replaced."""
    prepared = setting.prepared

    def kept(name: str) -> Tensor | None:
        if name in changed:
            return changed[name]
        return first.read([name])[name] if name in first.tensors else None

    writer = CheckpointWriter(folder, overwrite=overwrite)
    try:
        written: set[str] = set()
        for index in range(len(prepared.topology.block_names)):
            out: dict[str, Tensor] = {}
            for name in prepared.topology.block_tensors(index).values():
                layer = name.rpartition(".")[0]
                if layer not in codes:
                    value = kept(name)
                    assert value is not None
                    out[name] = value
                elif name.endswith(".weight"):
                    q = replace(codes[layer], bias_O=kept(f"{layer}.bias"))
                    out |= prepared.fmt.encode(layer, q)
            written |= out.keys()
            writer.write_shard(out)
        for name in sorted(first.tensors):
            if name not in written and name.rpartition(".")[0] not in codes:
                value = kept(name)
                assert value is not None
                writer.write_shard({name: value})
        method = f"{prepared.plan.method}, then training"
        for name, planned in prepared.plan.quantized.items():
            assert planned.scheme is not None
            bits = codes[name].bits_per_weight
            row = LayerReport(name, planned.shape, planned.scheme.name, method, bits)
            report.layers.append(row)
        report.add_ignored()
        finish_checkpoint(prepared.source, writer, prepared.plan, prepared.fmt, report)
    except BaseException:
        writer.discard()
        raise
    report.bytes_after = folder_bytes(folder)
    return report
