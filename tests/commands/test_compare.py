"""Comparing: rows, failures, the page, and carrying on where an earlier run stopped."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cli import Ran, run_here

import bitwright
from bitwright.commands.compare import Entry, parse_entries
from bitwright.errors import BadRequest, BitwrightError
from bitwright.evaluation.perplexity import evaluate_model
from bitwright.evaluation.remember import Remembered
from bitwright.kernels.cpu_w4a16 import why_not_compiled
from bitwright.pipeline import run as pipeline

Run = Callable[..., Ran]
ROW = {
    "name", "scheme", "method", "status", "reason", "bits_per_weight", "bytes", "seconds",
    "tokens_per_second_predicted", "tokens_per_second_measured", "perplexity",
    "perplexity_interval", "reference_perplexity", "perplexity_change", "kl_mean", "kl_median",
    "kl_99", "kl_interval", "top1_agreement", "windows", "sequence_length",
}  # fmt: skip


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return lambda *arguments: run_here(monkeypatch, capsys, *arguments)


def _settings(text: Path) -> dict[str, Any]:
    return {"text": str(text), "calibration": str(text), "windows": 3, "sequence_length": 64,
            "samples": 4, "calibration_length": 64}  # fmt: skip


def _options(text: Path) -> list[object]:
    return ["--text", text, "--calibration", text, "--windows", 3, "--sequence-length", 64,
            "--samples", 4, "--calibration-length", 64]  # fmt: skip


def test_entries() -> None:
    assert parse_entries("w4a16:GPTQ, W8A16,,W4A16:gptq") == [
        Entry("W4A16", "gptq"), Entry("W8A16", "rtn"),
    ]  # fmt: skip
    with pytest.raises(BadRequest, match="names no scheme"):
        parse_entries(" , ")


def test_json_rows_and_page(run: Run, llama: Path, text: Path, tmp_path: Path) -> None:
    schemes = "W4A16:gptq,W8A16,W4A16:unheard,NONSENSE"
    ran = run("compare", llama, "--schemes", schemes, *_options(text), "-o", tmp_path / "c",
              "--json")  # fmt: skip
    assert (ran.code, ran.err, ran.out.count("\n")) == (0, "", 1)
    found = json.loads(ran.out)
    assert found == json.loads((tmp_path / "c" / "results.json").read_text())
    names = ["W4A16:gptq", "W8A16:rtn", "W4A16:unheard", "NONSENSE:rtn"]
    assert [row["name"] for row in found["rows"]] == names
    gptq, eight, unheard, nonsense = found["rows"]
    assert gptq.keys() == eight.keys() == ROW
    assert (gptq["status"], unheard["status"], nonsense["status"]) == ("done", "failed", "failed")
    assert "unheard" in unheard["reason"]
    assert "unknown scheme" in nonsense["reason"]
    assert (gptq["bits_per_weight"], eight["bits_per_weight"]) == (4.25, 8.25)
    assert eight["kl_mean"] < gptq["kl_mean"] < gptq["kl_99"]
    assert gptq["kl_median"] < gptq["kl_99"]
    assert eight["top1_agreement"] > gptq["top1_agreement"]
    low, high = gptq["perplexity_interval"]
    assert low < gptq["perplexity"] < high
    assert gptq["perplexity_change"] == pytest.approx(
        gptq["perplexity"] / found["reference"]["perplexity"] - 1
    )
    assert gptq["tokens_per_second_predicted"] > 0
    assert eight["tokens_per_second_measured"] is None  # no kernel multiplies 8-bit weights alone
    assert (gptq["tokens_per_second_measured"] is None) == bool(why_not_compiled())
    assert gptq["tokens_per_second_measured"] is None or gptq["tokens_per_second_measured"] > 0
    assert found["reference"]["tokens_per_second_measured"] > 0
    page = (tmp_path / "c" / "report.html").read_text(encoding="utf-8")
    assert page.count("data-chart=") == 2 + 2 * 8
    for name in names:
        assert name in page
    assert "failed: unknown scheme" in page
    assert "bitwright compare" in page


def test_rows_are_what_evaluate_and_quantize_say(llama: Path, text: Path, tmp_path: Path) -> None:
    found = bitwright.compare(llama, tmp_path / "c", "W4A16:gptq", **_settings(text))
    row = found["rows"][0]
    bitwright.quantize(llama, tmp_path / "q", scheme="W4A16", method="gptq",
                       calibration=str(text), samples=4, sequence_length=64)  # fmt: skip
    plain = bitwright.evaluate(
        tmp_path / "q", reference=llama, text=str(text), windows=3, sequence_length=64
    )
    assert row["perplexity"] == plain.perplexity
    assert row["reference_perplexity"] == plain.reference_perplexity
    assert row["top1_agreement"] == plain.top1_agreement
    assert row["kl_mean"] == pytest.approx(plain.kl_divergence, rel=1e-5)
    for file in (tmp_path / "q").iterdir():
        same = tmp_path / "c" / "checkpoints" / "W4A16-gptq" / file.name
        assert same.read_bytes() == file.read_bytes()


def test_finished_rows_are_not_done_again(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second scheme is interrupted; the third run redoes neither the first nor what is made."""
    blocks: list[str] = []
    real = pipeline.quantize_block

    def counted(*arguments: Any, **rest: Any) -> Any:
        scheme = arguments[0].plan.scheme.name
        blocks.append(scheme)
        if scheme == "W3A16" and len(blocks) == 4 and not (tmp_path / "again").exists():
            raise KeyboardInterrupt
        return real(*arguments, **rest)

    monkeypatch.setattr("bitwright.pipeline.run.quantize_block", counted)
    with pytest.raises(KeyboardInterrupt):
        bitwright.compare(llama, tmp_path / "c", "W4A16,W3A16", **_settings(text))
    assert blocks == ["W4A16", "W4A16", "W3A16", "W3A16"]
    first = json.loads((tmp_path / "c" / "results.json").read_text())["rows"]
    assert [row["name"] for row in first] == ["W4A16:rtn"]
    (tmp_path / "again").touch()
    found = bitwright.compare(llama, tmp_path / "c", "W4A16,W3A16", **_settings(text))
    assert blocks[4:] == ["W3A16"]  # its first block was done
    assert found["rows"][0] == first[0]
    assert [row["status"] for row in found["rows"]] == ["done", "done"]
    bitwright.compare(llama, tmp_path / "c", "W3A16,W4A16", **_settings(text))
    assert len(blocks) == 5


def test_a_checkpoint_that_was_made_but_not_measured_is_kept(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("bitwright.commands.comparison.candidate_of", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            bitwright.compare(llama, tmp_path / "c", "W4A16", **_settings(text))
    monkeypatch.setattr("bitwright.commands.comparison.quantize_checkpoint", _interrupt)
    found = bitwright.compare(llama, tmp_path / "c", "W4A16", **_settings(text))
    assert found["rows"][0]["status"] == "done"
    assert found["rows"][0]["seconds"] > 0


def _interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_failed_rows_are_tried_again(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object, **__: object) -> None:
        raise RuntimeError("the sky fell")

    with monkeypatch.context() as patch:
        patch.setattr("bitwright.pipeline.run.quantize_block", crash)
        found = bitwright.compare(llama, tmp_path / "c", "W4A16", **_settings(text))
    assert found["rows"][0]["reason"] == "RuntimeError: the sky fell"
    found = bitwright.compare(llama, tmp_path / "c", "W4A16", **_settings(text))
    assert found["rows"][0]["status"] == "done"


def test_other_settings_are_refused(llama: Path, text: Path, tmp_path: Path) -> None:
    bitwright.compare(llama, tmp_path / "c", "W8A16", **_settings(text))
    other = _settings(text) | {"windows": 2}
    with pytest.raises(BadRequest, match="another windows"):
        bitwright.compare(llama, tmp_path / "c", "W8A16", **other)
    found = bitwright.compare(llama, tmp_path / "c", "W8A16", overwrite=True, **other)
    assert found["rows"][0]["windows"] == 2


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [
        ("gpu", "TPU", "unknown device"),
        ("effort", "huge", "unknown effort"),
        ("text", "missing.txt", "is not a file"),
        ("calibration", "missing.txt", "is not a file"),
    ],
)
def test_wrong_settings_are_refused_before_any_work(
    setting: str, value: object, reason: str, llama: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(BitwrightError, match=reason):
        bitwright.compare(llama, tmp_path / "c", "W4A16:gptq", **_settings(text) | {setting: value})
    assert not (tmp_path / "c").exists()


def test_when_everything_fails(run: Run, llama: Path, text: Path, tmp_path: Path) -> None:
    ran = run("compare", llama, "--schemes", "X,Y", *_options(text), "-o", tmp_path / "c", "-q")
    assert (ran.code, ran.out) == (2, "")
    assert "every scheme failed" in ran.err
    rows = json.loads((tmp_path / "c" / "results.json").read_text())["rows"]
    assert [row["status"] for row in rows] == ["failed", "failed"]


def test_on_screen(run: Run, llama: Path, text: Path, tmp_path: Path) -> None:
    ran = run("compare", llama, "--schemes", "W8A16,X", *_options(text), "-o", tmp_path / "c")
    assert ran.code == 0
    assert "W8A16:rtn" in ran.out
    assert "failed X:rtn: unknown scheme" in ran.out
    assert "report.html" in ran.err


def test_a_quantized_model_is_refused(llama: Path, text: Path, tmp_path: Path) -> None:
    bitwright.quantize(llama, tmp_path / "q")
    with pytest.raises(BadRequest, match="already quantized"):
        bitwright.compare(tmp_path / "q", tmp_path / "c", "W8A16", **_settings(text))
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("architecture", ["llama", "granite"])
def test_a_remembered_reference_says_the_same(
    architecture: str, model_of: Callable[[str], Path]
) -> None:
    folder = model_of(architecture)
    windows = torch.randint(0, 320, (2, 40))
    reference, model = bitwright.load(folder)[0], bitwright.load(folder)[0]
    model.get_output_embeddings().weight.mul_(1.1)
    plain = evaluate_model(model, windows, reference=reference)
    kept = Remembered(reference)
    for _ in range(2):
        again = evaluate_model(model, windows, reference=kept)
        assert again.kl_divergence == plain.kl_divergence
        assert again.reference_perplexity == plain.reference_perplexity
