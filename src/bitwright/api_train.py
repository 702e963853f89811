"""`bitwright.train`: quantize, train what was lost back, write an ordinary checkpoint."""

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitwright.api import calibration_tokens
from bitwright.errors import BadRequest, UnknownName
from bitwright.pipeline.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    folder_bytes,
    open_checkpoint,
)
from bitwright.pipeline.memory import peak_rss_bytes
from bitwright.pipeline.report import LayerReport, Report
from bitwright.pipeline.run import finish_checkpoint, quantize_checkpoint
from bitwright.pipeline.topology import match_names
from bitwright.request import Prepared, prepare
from bitwright.runtime.gguf_export import export_folder
from bitwright.runtime.kv_load import read_cache_scales
from bitwright.runtime.load import dense_view, load_model
from bitwright.runtime.source import resolve
from bitwright.schemes.plan import Calibration
from bitwright.schemes.quantized import QuantizedLinear
from bitwright.training.cache import RoundingCache
from bitwright.training.distill import KeptTargets, Targets
from bitwright.training.latent import Latent, MinMax, Plain, Scaled
from bitwright.training.qat import (
    Outcome,
    Recipe,
    Student,
    recompute_activations,
    restore_best,
    split_samples,
)
from bitwright.training.qat import train as run_training

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
    learned: str
    minmax: bool
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
    the default after rtn) or "learned" (the default after other inits). ``data``: "self",
    a text file, "pydoc" or a hub dataset; the start is calibrated on the first
    ``calibration_samples`` windows of ``calibration``, or else of the same. ``teacher``: another
    model of the same vocabulary, default the original; with ``teacher_top`` > 0 so many of its
    probabilities per token are kept on disk and it leaves memory. ``lr``: of scales (of their
    logarithms), or with "all" of weights (in codes). Further keywords are those of `prepare`.

    Under torchrun every process trains on its share of each step, the first one writes.
    Raises BadRequest, BadCheckpoint, NoSpace, training.qat.Diverged.
    """
    began = time.perf_counter()
    if learn not in TRAIN or init not in INITS:
        raise UnknownName(f"--train is one of {', '.join(TRAIN)}, --init one of {', '.join(INITS)}")
    step_sizes = step_sizes or ("minmax" if init == "rtn" and learn == "all" else "learned")
    if step_sizes not in ("minmax", "learned"):
        raise UnknownName(f"unknown step sizes {step_sizes!r}; known: minmax, learned")
    if step_sizes == "minmax" and learn == "scales":
        raise BadRequest("--step-sizes minmax leaves no scale to learn: use --train all")
    engine = _engine()
    rank, processes = (engine.process_index, engine.num_processes) if engine else (0, 1)
    meet = engine.wait_for_everyone if engine else lambda: None
    per_step = max(1, batch_tokens // sequence_length)
    if per_step % processes:
        raise BadRequest(
            f"a step of {per_step} sequences cannot be shared by {processes} processes: "
            f"give --batch-tokens a multiple of {processes * sequence_length}"
        )
    if learn == "all" and init == "rtn":
        request |= {"search": "absmax"}
    calibration = calibration or (None if init == "rtn" else data)
    prepared = prepare(
        model, scheme=scheme, method=init, seed=seed, calibration=calibration,
        samples=calibration_samples, sequence_length=sequence_length, **request,
    )  # fmt: skip
    target = Path(output).expanduser()
    if target.exists() and not overwrite:
        raise BadRequest(f"{target} exists: choose another output or add --overwrite")
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
        "train": [learn, step_sizes, processes],
    }
    setting = _Setting(
        prepared, target, learn, step_sizes == "minmax", recipe,
        Calibration(data, samples, sequence_length), asked,
    )  # fmt: skip
    if rank == 0 and not resume:
        shutil.rmtree(setting.folder, ignore_errors=True)
    meet()
    if rank == 0:
        _start(setting, resume, progress)
        calibration_tokens(prepared.source, setting.data, seed, progress=progress)
    meet()
    tokens, note = calibration_tokens(prepared.source, setting.data, seed, progress=progress)
    first = open_checkpoint(setting.folder / "start")
    student, layers = _student(setting, first, recompute=gradient_checkpointing)
    if engine:
        average = partial(engine.reduce, reduction="mean")
        student = replace(student, rank=rank, processes=processes, average=average)
    targets = _teacher(setting, teacher, teacher_top, tokens, progress)
    outcome = run_training(
        student, tokens, targets, recipe, setting.folder,
        request=asked, resume=resume, say=progress,
    )  # fmt: skip
    meet()
    restore_best(student, setting.folder)
    report = Report(prepared.plan, bytes_before=prepared.source.nbytes)
    report.training = _summary(setting, outcome, len(tokens), note)
    if rank == 0:
        _write(setting, first, student, layers, report, overwrite, progress)
        shutil.rmtree(setting.folder, ignore_errors=True)
    meet()
    report.seconds, report.peak_rss_bytes = time.perf_counter() - began, peak_rss_bytes()
    return report, outcome


def _engine() -> Any:
    """Accelerate's handle on the processes that torchrun started; None if there is only one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    from accelerate import Accelerator

    return Accelerator(cpu=True)


def _start(setting: _Setting, resume: bool, progress: Say) -> None:
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
            prepared.source, prepared.plan.calibration, prepared.plan.seed, progress=progress
        )
    quantize_checkpoint(
        prepared.source, prepared.topology, folder, prepared.plan, prepared.fmt,
        tokens_NT=tokens, resume=resume, progress=progress,
    )  # fmt: skip


def _student(
    setting: _Setting, first: Checkpoint, *, recompute: bool
) -> tuple[Student, dict[str, str]]:
    """The model to train and, by parameter name, the layers whose codes it holds."""
    layers: dict[str, tuple[str, QuantizedLinear]] = {}
    model = load_model(first, observe=lambda p, name, q: layers.update({p: (name, q)}))
    fmt = setting.prepared.fmt
    latents: dict[str, Latent] = {}
    for parameter, (name, q) in layers.items():
        if setting.minmax:
            key = f"{name}.weight"
            latents[parameter] = MinMax(setting.prepared.source.read([key])[key], q)
        else:
            latents[parameter] = Scaled(q, codes=setting.learned == "all")
    names = match_names(model, dense_view(first, fmt, {name for name, _ in layers.values()}))
    for parameter, value in model.named_parameters():  # embeddings stay: they are not quantized
        if parameter not in latents and parameter in names and value.ndim == 1:
            latents[parameter] = Plain(value, first.tensors[names[parameter]].dtype)
    for parameter, value in model.named_parameters():
        value.requires_grad_(parameter in latents)
    spec = setting.prepared.plan.scheme.kv_cache
    scales = {}
    if spec is not None and spec.mode == "static":
        scales = read_cache_scales(first, fmt, model)

    def forward(tokens_BT: Tensor) -> Tensor:
        extra: dict[str, Any] = {"use_cache": False}
        if spec is not None:
            extra = {
                "use_cache": True,
                "past_key_values": RoundingCache(model.config, spec, scales),
            }
        logits: Tensor = model(input_ids=tokens_BT, **extra).logits[0]
        return logits

    if recompute:
        blocks = setting.prepared.topology.block_names
        recompute_activations([model.get_submodule(name) for name in blocks])
    owners = {parameter: name for parameter, (name, _) in layers.items()}
    return Student(model, latents, forward), owners


def _teacher(
    setting: _Setting, teacher: str | Path | None, top: int, tokens_NT: Tensor, progress: Say
) -> Callable[[int], Targets]:
    """A function from a sample's number to the teacher's predictions for it."""
    source = setting.prepared.source if teacher is None else resolve(teacher)
    if top == 0:
        model = load_model(source)

        def live(sample: int) -> Targets:
            with torch.no_grad():
                logits: Tensor = model(input_ids=tokens_NT[sample][None], use_cache=False).logits[0]
            return logits

        return live
    config: Any = setting.prepared.topology.model.config
    top = min(top, config.get_text_config().vocab_size)
    kept = KeptTargets(setting.folder / "teacher.bin", *tokens_NT.shape, k=top)
    missing = [i for i in range(len(tokens_NT)) if i not in kept]
    if missing:
        model = load_model(source)
        for done, sample in enumerate(missing):  # by every process alike: the file is one
            progress(done, len(missing), "the teacher predicts")
            with torch.no_grad():
                logits = model(input_ids=tokens_NT[sample][None], use_cache=False).logits[0]
            kept.put(sample, logits)
    return lambda sample: kept[sample]


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
    student: Student,
    owners: dict[str, str],
    report: Report,
    overwrite: bool,
    progress: Say,
) -> None:
    prepared = setting.prepared
    codes: dict[str, QuantizedLinear] = {}
    changed: dict[str, Tensor] = {}
    dense = dense_view(first, prepared.fmt, set(owners.values()))
    names = match_names(student.model, dense) | {p: f"{n}.weight" for p, n in owners.items()}
    for parameter, latent in student.latents.items():
        if isinstance(latent, (MinMax, Scaled)):
            codes[owners[parameter]] = latent.result()
        else:
            changed[names[parameter]] = latent.value()

    def kept(name: str) -> Tensor | None:
        if name in changed:
            return changed[name]
        return first.read([name])[name] if name in first.tensors else None

    is_gguf = prepared.fmt.name == "gguf"
    target = setting.target
    folder = target.parent / f".{target.name}.staged" if is_gguf else target
    writer = CheckpointWriter(folder, overwrite=overwrite or is_gguf)
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
    if is_gguf:
        report.bytes_after = export_folder(folder, target, overwrite=overwrite, progress=progress)
