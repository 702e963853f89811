"""The verbs: quantize, evaluate, generate, inspect, load. The command line calls these."""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bitwright.errors import BadRequest, UnknownName
from bitwright.evaluation.perplexity import Evaluation, evaluate_model
from bitwright.pipeline.checkpoint import Checkpoint
from bitwright.pipeline.gguf_import import cache_folder
from bitwright.pipeline.memory import return_freed_memory
from bitwright.pipeline.report import Report
from bitwright.pipeline.run import Engine, Progress, quantize_checkpoint
from bitwright.pipeline.texts import (
    calibration_windows,
    evaluation_windows,
    first_tokens,
    read_text,
    tokenize,
)
from bitwright.pipeline.written import self_written
from bitwright.request import EFFORTS, Prediction, Prepared, prepare
from bitwright.runtime.gguf_export import write_checkpoint
from bitwright.runtime.kv_load import cache_factory
from bitwright.runtime.load import format_of, load_model, read_layer, stored_config
from bitwright.runtime.source import load_tokenizer, resolve
from bitwright.runtime.store import is_url, require_nothing_at, upload
from bitwright.schemes.plan import Calibration
from bitwright.schemes.scheme import Scheme

CPU = torch.device("cpu")

__all__ = [
    "EFFORTS", "Prediction", "Prepared", "calibration_tokens", "checked_target", "evaluate",
    "execute", "generate", "inspect", "load", "load_tokenizer", "new_cache_of", "prepare",
    "quantize", "resolve",
]  # fmt: skip

KV_ROUNDINGS = ("nearest", "feedback")
FEEDBACK_TEXT = (8, 512)  # windows and tokens of text that queries are taken from


def quantize(
    model: str | Path,
    output: str | Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress = lambda done, total, note: None,
    engine: Engine | None = None,
    **request: Any,
) -> Report:
    """Quantize ``model`` into the folder ``output``; keywords are those of `prepare`.

    For mixed precision see `api_allocate.mixed_precision`, between `prepare` and `execute`.
    """
    prepared = prepare(model, **request)
    return execute(
        prepared, output, overwrite=overwrite, resume=resume, progress=progress, engine=engine
    )


def execute(
    prepared: Prepared,
    output: str | Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress = lambda done, total, note: None,
    engine: Engine | None = None,
) -> Report:
    """Carry out a prepared request; with ``resume`` go on where a stopped run of it was.

    ``output``: a path, or a URL that fsspec can write to. ``engine``: where blocks are solved,
    such as `bitwright.cluster.on_ray`; None: in this process.
    """
    if is_url(output):
        url = str(output)
        require_nothing_at(url, overwrite=overwrite)
        key = hashlib.sha256(url.encode()).hexdigest()[:16]
        staged = cache_folder() / "outgoing" / f"{url.rstrip('/').rpartition('/')[2]}-{key}"
        report = execute(
            prepared, staged, overwrite=True, resume=resume, progress=progress, engine=engine
        )
        upload(staged, url)
        shutil.rmtree(staged) if staged.is_dir() else staged.unlink()
        return report
    target = checked_target(prepared.source, output, overwrite=overwrite)
    plan = prepared.plan
    tokens = None
    if plan.calibration is not None:
        tokens, note = calibration_tokens(
            prepared.source, plan.calibration, plan.seed, device=prepared.topology.device
        )
        return_freed_memory()
        if note:
            plan = replace(plan, notes=(*plan.notes, note))
    try:
        return write_checkpoint(
            prepared.fmt,
            target,
            lambda folder, replacing: quantize_checkpoint(
                prepared.source, prepared.topology, folder, plan, prepared.fmt, tokens_NT=tokens,
                overwrite=replacing, resume=resume, overlap=prepared.overlap, progress=progress,
                engine=engine,
            ),
            overwrite=overwrite,
            progress=progress,
        )  # fmt: skip
    except torch.OutOfMemoryError as error:
        raise BadRequest(
            "the GPU has too little memory for one block, its statistics and a batch: free some "
            "of it, or take --device cpu; --resume goes on after the last finished block"
        ) from error


def checked_target(source: Checkpoint, output: str | Path, *, overwrite: bool) -> Path:
    """The folder to write. Raises BadRequest if it exists, or is the model."""
    target = Path(output).expanduser()
    if target.exists() and not overwrite:
        raise BadRequest(f"{target} exists: choose another output or add --overwrite")
    if target.resolve() == source.folder.resolve():
        raise BadRequest("the output is the model itself: choose another folder")
    return target


def calibration_tokens(
    source: Checkpoint,
    calibration: Calibration,
    seed: int,
    *,
    device: torch.device = CPU,
    progress: Progress = lambda done, total, note: None,
) -> tuple[torch.Tensor, str]:
    """Token windows (N, T) of a calibration source, and a note for the user (or "").

    What the model writes itself, on ``device``, is kept in the user's cache folder and written
    once.
    """
    length = calibration.sequence_length
    if calibration.source == "self":
        facts = [source.folder.resolve(), source.nbytes, source.config, length, seed]
        key = hashlib.sha256("\n".join(map(str, facts)).encode()).hexdigest()[:16]
        return self_written(
            lambda: load_model(source).to(device),
            calibration.samples,
            length,
            seed,
            file=cache_folder() / "written" / f"{source.folder.name}-{key}.jsonl",
            progress=progress,
        ), ""
    ids = tokenize(load_tokenizer(source), read_text(calibration.source))
    return calibration_windows(ids, calibration.samples, length, seed)


def evaluate(
    model: str | Path,
    *,
    reference: str | Path | None = None,
    text: str = "pydoc",
    windows: int = 40,
    sequence_length: int = 1024,
    kv_rounding: str = "nearest",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Perplexity of a model, and its divergence from a reference, on the start of a text.

    ``kv_rounding``: how a quantized key-value cache rounds keys, see `new_cache_of`.
    """
    checkpoint = resolve(model)
    tokens = first_tokens(load_tokenizer(checkpoint), text, windows * sequence_length)
    chosen = evaluation_windows(tokens, windows, sequence_length)
    other = load_model(resolve(reference)) if reference is not None else None
    network = load_model(checkpoint)
    cache = new_cache_of(checkpoint, network, kv_rounding)
    return evaluate_model(network, chosen, reference=other, new_cache=cache, progress=progress)


def new_cache_of(
    checkpoint: Checkpoint, network: Any, kv_rounding: str = "nearest"
) -> Callable[[], Any] | None:
    """What makes the key-value cache a checkpoint asks for; None for 16 bits.

    ``kv_rounding``: "nearest", as other runtimes round keys, or "feedback": for the queries that
    the model asks on Python's manual (runtime/key_feedback.py). Raises UnknownName for another.
    """
    if kv_rounding not in KV_ROUNDINGS:
        known = ", ".join(KV_ROUNDINGS)
        raise UnknownName(f"unknown rounding of keys {kv_rounding!r}; known: {known}")
    text = None
    if kv_rounding == "feedback" and cache_factory(checkpoint, network) is not None:
        windows, length = FEEDBACK_TEXT
        ids = first_tokens(load_tokenizer(checkpoint), "pydoc", windows * length)
        text = evaluation_windows(ids, windows, length)
    return cache_factory(checkpoint, network, text)


def load(model: str | Path, *, packed: bool = False, device: str = "cpu") -> tuple[Any, Any]:
    """(transformers model, tokenizer) of a folder, hub id or GGUF file, quantized or not.

    With ``packed``, quantized Linears keep their codes and scales in memory instead of 16-bit
    weights (docs/runtime.md): 4-bit weights and INT8 W8A8 have kernels and are faster for it,
    others are slower; on "cuda" more have (docs/kernels.md). Raises BadRequest for "cuda" where
    there is no GPU.
    """
    checkpoint = resolve(model)
    return load_model(checkpoint, packed=packed, device=device), load_tokenizer(checkpoint)


def generate(
    model: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    kv_rounding: str = "nearest",
    device: str = "cpu",
) -> str:
    """The model's greedy answer to one prompt, through its chat template if it has one.

    ``kv_rounding``: see `new_cache_of`. Raises BadRequest for "cuda" where there is no GPU.
    """
    checkpoint = resolve(model)
    network = load_model(checkpoint, packed=True, panels=False, device=device)
    tokenizer = load_tokenizer(checkpoint)
    new_cache = new_cache_of(checkpoint, network, kv_rounding)
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    else:
        text = prompt
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False).to(network.device)
    with torch.no_grad():
        out = network.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            past_key_values=new_cache() if new_cache else None,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )
    answer: str = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer


def inspect(model: str | Path) -> dict[str, Any]:
    """Every tensor or quantized layer: scheme, shape, bits, bytes; and the totals."""
    checkpoint = resolve(model)
    fmt = format_of(checkpoint)
    names = fmt.quantized_names(set(checkpoint.tensors)) if fmt else set()
    rows: list[dict[str, Any]] = []
    parts: dict[str, int] = dict.fromkeys(names, 0)
    for tensor, info in checkpoint.tensors.items():
        owner = tensor.rpartition(".")[0]
        if owner in parts and not tensor.endswith(".bias"):
            parts[owner] += info.nbytes
            continue
        bits = info.dtype.itemsize * 8
        row = {"name": tensor, "shape": list(info.shape), "scheme": str(info.dtype)[6:]}
        rows.append(row | {"bits": float(bits), "bytes": info.nbytes})
    for name in names:
        assert fmt is not None
        q = read_layer(checkpoint, fmt, name)
        scheme = Scheme(q.spec, q.input_spec).name
        details = {"group_size": q.spec.group[1], "asymmetric": q.spec.asymmetric}
        row = {"name": name, "shape": list(q.shape), "scheme": scheme}
        rows.append(row | {"bits": q.bits_per_weight, "bytes": parts[name]} | details)
    rows.sort(key=lambda row: str(row["name"]))
    ignored = fmt.ignored(stored_config(checkpoint)) if fmt else []
    return {
        "model": str(checkpoint.folder),
        "format": fmt.name if fmt else "unquantized",
        "bytes": checkpoint.nbytes,
        "tensors": rows,
        "left_alone": {name: _why(name, checkpoint.folder) for name in ignored},
    }


def _why(name: str, folder: Path) -> str:
    import json

    report = folder / "quantization_report.json"
    if report.exists():
        for layer in json.loads(report.read_text())["layers"]:
            if layer["name"] == name:
                return str(layer.get("ignored", ""))
    return "listed in the checkpoint's ignore list"
