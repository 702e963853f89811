"""`bitwright train` from end to end on small real checkpoints."""

import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cli import run_apart
from support.models import make_model
from support.training import ALONE, SMALL, divergence_of, run_jobs

from bitwright.api import resolve
from bitwright.api_train import train
from bitwright.errors import BadRequest, UnknownName
from bitwright.runtime.load import format_of, read_layer
from bitwright.runtime.source import load_tokenizer
from bitwright.training.qat import Diverged

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("W4A16", {"init": "gptq", "group_size": 32}),
        ("W4A16", {"init": "rtn", "learn": "all", "group_size": 32}),
        ("W4A16", {"learn": "all", "step_sizes": "lsq", "group_size": 32}),
        ("W3A16", {"init": "awq+gptq", "learn": "all", "group_size": 32, "asymmetric": True}),
        ("W4A8KV4", {"init": "gptq", "learn": "all", "group_size": 32}),
        ("W4A8KV4", {"init": "rtn", "learn": "all", "group_size": 32}),
        ("W4A8-KV8-FP8", {"init": "rtn", "group_size": 32}),
        ("W8A8-INT8", {"init": "rtn", "learn": "all", "activations": "static"}),
        ("W8A8-FP8", {"init": "rtn", "learn": "all"}),
        ("NVFP4", {"init": "rtn", "learn": "all"}),
        ("NVFP4", {"init": "rtn", "learn": "all", "step_sizes": "lsq"}),
        ("MXFP4", {"init": "rtn"}),
        ("W4A4", {"init": "gptq", "learn": "all", "group_size": 32}),
    ],
)
def test_what_was_trained_is_what_loads(
    scheme: str, options: dict[str, Any], llama: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    report, outcome = train(llama, out, scheme=scheme, data=str(text), **SMALL, **options)
    assert divergence_of(out, llama, text) == outcome.best  # bit for bit, through the file
    assert outcome.best <= outcome.before
    assert [line[0] for line in outcome.curve] == [2, 4]
    assert report.training["best_step"] == outcome.best_step
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_scales_learn_while_codes_stay(llama: Path, text: Path, tmp_path: Path) -> None:
    from bitwright import quantize

    common: dict[str, Any] = {"scheme": "W3A16", "group_size": 32}
    quantize(llama, tmp_path / "start", method="gptq", calibration=str(text), samples=8,
             sequence_length=32, **common)  # fmt: skip
    _, outcome = train(llama, tmp_path / "out", data=str(text), **{**SMALL, "steps": 20}, **common)
    assert outcome.best < 0.95 * outcome.before
    before, after = resolve(tmp_path / "start"), resolve(tmp_path / "out")
    fmt = format_of(before)
    assert fmt is not None
    moved = 0
    for name in fmt.quantized_names(set(before.tensors)):
        first, last = read_layer(before, fmt, name), read_layer(after, fmt, name)
        assert torch.equal(first.codes_OI, last.codes_OI)
        moved += not torch.equal(first.scale_RG, last.scale_RG)
    assert moved > 0


@pytest.mark.parametrize("format", ["gptq", "awq", "gguf"])
def test_other_formats(format: str, text: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", hidden_size=128, intermediate_size=128)
    out = tmp_path / "out"
    size = {"gguf": "auto"}.get(format, 32)
    extra = {"asymmetric": True} if format == "awq" else {}
    _, outcome = train(model, out, init="rtn", data=str(text), format=format, group_size=size,
                       **SMALL, **extra)  # fmt: skip
    assert outcome.best <= outcome.before
    if format != "gguf":  # transformers reads GGUF in another dtype
        assert divergence_of(out, model, text) == outcome.best
    else:
        assert (out / "model.gguf").stat().st_size > 0


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("W4A8KV4", {"group_size": 32}),
        ("W8A8-INT8", {"activations": "static"}),  # gradients stop where inputs saturate
    ],
)
def test_recomputed_activations_change_nothing(
    scheme: str, options: dict[str, Any], llama: Path, text: Path, tmp_path: Path
) -> None:
    curves = []
    for name in ("kept", "recomputed"):
        _, outcome = train(llama, tmp_path / name, scheme=scheme, learn="all", data=str(text),
                           gradient_checkpointing=name == "recomputed", **SMALL,
                           **options)  # fmt: skip
        curves.append(outcome.losses)
    assert curves[0] == curves[1]


def test_teacher_on_disk(llama: Path, text: Path, tmp_path: Path) -> None:
    _, live = train(llama, tmp_path / "live", data=str(text), group_size=32, **SMALL)
    _, kept = train(llama, tmp_path / "kept", data=str(text), group_size=32, teacher_top=1000,
                    **SMALL)  # fmt: skip
    assert kept.losses == pytest.approx(live.losses, rel=1e-3)


def test_a_killed_run_goes_on_to_the_same_result(llama: Path, text: Path, tmp_path: Path) -> None:
    options = {**SMALL, "steps": 12, "learn": "all", "group_size": 32, "data": str(text)}
    whole, out = tmp_path / "whole", tmp_path / "out"
    _, outcome = train(llama, whole, **options)
    code, _ = run_jobs([(llama, out, options | {"die_at": 7})], tmp_path)
    assert code == -signal.SIGKILL
    assert not out.exists()
    again = ["train", llama, out, "--data", text, "--train", "all", "--group-size", "32", "--json",
             "--samples", "12", "--sequence-length", "32", "--batch-tokens", "64", "--resume",
             "--calibration-samples", "8", "--check-every", "2", "--steps", "12"]  # fmt: skip
    other = run_apart(*again, "--lr", "1e-3", **ALONE)
    assert other.code == 2
    assert "begun with recipe" in other.err
    assert len(other.err.strip().splitlines()) == 1
    done = run_apart(*again, **ALONE)
    assert done.code == 0, done.err
    assert json.loads(done.out)["training"]["curve"] == outcome.curve
    for path in whole.glob("*.safetensors"):
        assert path.read_bytes() == (out / path.name).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["out", "whole"]


def test_without_data_and_with_a_line_of_progress(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITWRIGHT_CACHE", str(tmp_path / "cache"))
    said: list[tuple[int, int, str]] = []
    options = {**SMALL, "group_size": 32, "data": "self"}
    _, first = train(llama, tmp_path / "out", progress=lambda *line: said.append(line), **options)
    assert len(first.losses) == 4
    assert sum("writes its own text" in note for *_, note in said) > 0
    steps = [(done, total) for done, total, note in said if note.startswith("loss")]
    assert steps == [(step, 4) for step in range(4)]  # what the time left is made of
    line = next(note for done, _, note in said if note.startswith("loss") and done == 3)
    assert re.fullmatch(r"loss \d\.\d{4}, held out \d\.\d{4}, \d+ tokens/s", line)
    said.clear()
    _, again = train(llama, tmp_path / "again", progress=lambda *line: said.append(line), **options)
    assert again.losses == first.losses
    assert not any("writes its own text" in note for *_, note in said)


def test_numbers_that_overflow_are_named(llama: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"step \d+: .*lower --lr"):
        train(llama, tmp_path / "out", learn="all", init="rtn", lr=1e37, data=str(text),
              group_size=32, **SMALL)  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_done_is_said_first(llama: Path, text: Path, tmp_path: Path) -> None:
    def refused(error: type[Exception], match: str, **options: Any) -> None:
        with pytest.raises(error, match=match):
            train(llama, tmp_path / "out", data=str(text), **options)
        assert list(tmp_path.iterdir()) == []

    refused(UnknownName, "--train is one of", learn="everything")
    refused(UnknownName, "unknown step sizes", step_sizes="large")
    refused(BadRequest, "leaves no scale", step_sizes="minmax")
    refused(BadRequest, "learns weights as well", step_sizes="lsq")
    for step_sizes in ("minmax", "lsq"):  # the folded norms belong to other weights
        refused(BadRequest, "--init awq.gptq rescales", learn="all", init="awq+gptq",
                step_sizes=step_sizes)  # fmt: skip
    refused(BadRequest, "unknown device", device="tpu")
    refused(UnknownName, "unknown scheme", scheme="W9A16")
    with pytest.raises(BadRequest, match="the output is the model itself"):
        train(llama, llama, data=str(text), group_size=32, init="rtn", overwrite=True)
    (tmp_path / "out").mkdir()
    with pytest.raises(BadRequest, match="exists"):
        train(llama, tmp_path / "out", data=str(text))
    shutil.rmtree(tmp_path / "out")


def test_the_curve_is_on_the_page(llama: Path, text: Path, tmp_path: Path) -> None:
    from bitwright import report

    train(llama, tmp_path / "out", data=str(text), init="rtn", group_size=32, **SMALL)
    page = report(tmp_path / "out", tmp_path / "page.html").read_text(encoding="utf-8")
    assert 'data-chart="training-0"' in page
    assert "held-out windows" in page


def test_biases_and_norms_learn(model_of: Any, text: Path, tmp_path: Path) -> None:
    model = model_of("qwen2")
    out = tmp_path / "out"
    _, outcome = train(model, out, data=str(text), group_size=32, **SMALL)
    assert divergence_of(out, model, text) == outcome.best
    before, after = resolve(model), resolve(out)
    name = next(n for n in before.tensors if n.endswith("q_proj.bias"))
    assert not torch.equal(before.read([name])[name], after.read([name])[name])
    assert load_tokenizer(after) is not None
