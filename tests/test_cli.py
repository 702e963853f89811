"""The command line: options, tables, and JSON that is alone on stdout."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.cli import Ran, run_apart, run_here

Run = Callable[..., Ran]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return lambda *arguments: run_here(monkeypatch, capsys, *arguments)


def _json(ran: Ran) -> dict[str, Any]:
    assert (ran.code, ran.err) == (0, "")
    value = json.loads(ran.out)
    assert isinstance(value, dict)
    assert ran.out.count("\n") == 1
    return value


QUANTIZE = {
    "output", "scheme", "method", "bits_per_weight", "bytes_before", "bytes_after", "seconds",
    "peak_rss_bytes", "layers",
}  # fmt: skip
EVALUATE = {
    "perplexity", "reference_perplexity", "kl_divergence", "top1_agreement", "windows",
    "sequence_length", "seconds", "perplexity_interval", "kl_interval",
}  # fmt: skip


def test_quantize_json(run: Run, llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    value = _json(run("quantize", llama, out, "--scheme", "w3a16", "--group-size", 32, "--json"))
    assert value.keys() == QUANTIZE
    assert (value["output"], value["scheme"], value["method"]) == (str(out), "W3A16", "rtn")
    assert value["bits_per_weight"] == 3.5
    data = sum(t.nbytes for t in load_file(llama / "model.safetensors").values())
    assert value["bytes_before"] == data
    assert value["bytes_after"] == sum(f.stat().st_size for f in out.glob("*.safetensors"))
    assert value["seconds"] > 0
    assert 1e8 < value["peak_rss_bytes"] < 1e11
    layers = {row["name"]: row for row in value["layers"]}
    assert len(layers) == 15
    assert layers["lm_head"]["ignored"] == "output embedding"
    assert layers["model.layers.0.mlp.up_proj"]["scheme"] == "W3A16"
    assert layers["model.layers.0.mlp.up_proj"]["shape"] == [128, 64]


def test_json_from_a_process_of_its_own(llama: Path, tmp_path: Path) -> None:
    assert _json(run_apart("quantize", llama, tmp_path / "out", "--json")).keys() == QUANTIZE


def test_dry_run_json_computes_nothing(run: Run, llama: Path, tmp_path: Path) -> None:
    value = _json(run("quantize", llama, tmp_path / "out", "--dry-run", "--json"))
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.iterdir()) == []
    assert value["scheme"] == "W4A16"
    assert value["group_size"] == 64
    assert value["bits_per_weight"] == 4.25
    assert value["predicted"].keys() == {"memory_bytes", "disk_bytes", "seconds"}
    assert all(number > 0 for number in value["predicted"].values())
    assert value["layers"]["lm_head"] == "ignored: output embedding"
    assert value["layers"]["model.layers.1.mlp.down_proj"] == "W4A16"


def test_dry_run_predicts_the_size_on_disk(run: Run, llama: Path, tmp_path: Path) -> None:
    options = ("--scheme", "W4A16", "--group-size", 32, "--json")
    predicted = _json(run("quantize", llama, tmp_path / "out", "--dry-run", *options))
    done = _json(run("quantize", llama, tmp_path / "out", *options))
    assert predicted["predicted"]["disk_bytes"] == pytest.approx(done["bytes_after"], rel=0.1)


def test_dry_run_on_screen(run: Run, llama: Path, tmp_path: Path) -> None:
    ran = run("quantize", llama, tmp_path / "out", "--dry-run", "--ignore", "o_proj")
    assert ran.code == 0
    assert "group size 64" in ran.err
    assert "4.250 bits per weight" in ran.out
    assert "left alone: --ignore o_proj" in ran.out
    assert "disk" in ran.out


def test_quantize_on_screen(run: Run, llama: Path, tmp_path: Path) -> None:
    ran = run("quantize", llama, tmp_path / "out")
    assert (ran.code, ran.out) == (0, "")
    assert "not a multiple of 128: using group size 64" in " ".join(ran.err.split())
    assert "4.250 bits per weight" in " ".join(ran.err.split())
    ran = run("quantize", llama, tmp_path / "out", "--overwrite", "--quiet")
    assert (ran.code, ran.out, ran.err) == (0, "", "")


@pytest.mark.parametrize(
    ("options", "bits", "group", "asymmetric"),
    [
        (("--scheme", "W8A16", "--group-size", "-1"), 8 + 16 / 64, -1, False),
        (("--group-size", "32", "--asymmetric"), 4 + 20 / 32, 32, True),
        (("--group-size", "16", "--method", "gptq", "--samples", "4"), 5.0, 16, False),
        (("--search", "absmax"), 4.25, 64, False),
    ],
    ids=["channel", "asymmetric", "gptq", "absmax"],
)
def test_options_reach_the_file(
    options: tuple[str, ...],
    bits: float,
    group: int,
    asymmetric: bool,
    run: Run,
    llama: Path,
    text: Path,
    tmp_path: Path,
) -> None:
    if "gptq" in options:
        options = (*options, "--calibration", str(text), "--sequence-length", "64")
    done = _json(run("quantize", llama, tmp_path / "out", *options, "--json"))
    rows = {
        row["name"]: row for row in _json(run("inspect", tmp_path / "out", "--json"))["tensors"]
    }
    row = rows["model.layers.0.self_attn.q_proj"]
    assert (row["group_size"], row["asymmetric"]) == (group, asymmetric)
    assert row["bits"] == bits
    if group != -1:
        assert done["bits_per_weight"] == bits


def test_evaluate_json(run: Run, llama: Path, text: Path, tmp_path: Path) -> None:
    options = ("--text", text, "--windows", 3, "--sequence-length", 48, "--json")
    plain = _json(run("evaluate", llama, *options))
    assert plain.keys() == EVALUATE
    assert plain["reference_perplexity"] is None
    assert (plain["windows"], plain["sequence_length"]) == (3, 48)
    run("quantize", llama, tmp_path / "out", "--quiet")
    compared = _json(run("evaluate", tmp_path / "out", "--reference", llama, *options))
    assert compared.keys() == EVALUATE
    assert compared["reference_perplexity"] == plain["perplexity"]
    assert compared["kl_divergence"] > 0
    assert 0 < compared["top1_agreement"] < 1


def test_evaluate_on_screen(run: Run, llama: Path, text: Path) -> None:
    ran = run("evaluate", llama, "--text", text, "--windows", 2, "--sequence-length", 32)
    assert ran.code == 0
    assert "perplexity" in ran.out
    assert "kl_divergence" not in ran.out


def test_inspect_json(run: Run, llama: Path, tmp_path: Path) -> None:
    before = _json(run("inspect", llama, "--json"))
    assert before["format"] == "unquantized"
    assert {row["scheme"] for row in before["tensors"]} == {"float32"}
    assert before["left_alone"] == {}
    run("quantize", llama, tmp_path / "out", "--quiet", "--ignore", "v_proj")
    after = _json(run("inspect", tmp_path / "out", "--json"))
    assert after.keys() == {"model", "format", "bytes", "tensors", "left_alone"}
    assert after["format"] == "compressed-tensors"
    assert after["left_alone"]["lm_head"] == "output embedding"
    assert after["left_alone"]["model.layers.0.self_attn.v_proj"] == "--ignore v_proj"
    assert len(after["left_alone"]) == 3
    for value in (before, after):
        assert sum(row["bytes"] for row in value["tensors"]) == value["bytes"]
    weights = {row["name"].removesuffix(".weight"): row["shape"] for row in before["tensors"]}
    assert {
        row["name"].removesuffix(".weight"): row["shape"] for row in after["tensors"]
    } == weights


def test_inspect_on_screen(run: Run, llama: Path, tmp_path: Path) -> None:
    run("quantize", llama, tmp_path / "out", "--quiet", "--asymmetric")
    ran = run("inspect", tmp_path / "out")
    assert ran.code == 0
    assert "W4A16 g64 asym" in ran.out
    assert "left alone: lm_head (output embedding)" in ran.out


def test_generate_prints_the_answer(run: Run, llama: Path) -> None:
    first = run("generate", llama, "A quick brown", "--max-new-tokens", 5)
    assert (first.code, first.err) == (0, "")
    assert first.out.strip("\n") != ""
    assert run("generate", llama, "A quick brown", "--max-new-tokens", 5).out == first.out


@pytest.mark.parametrize("command", ["quantize", "evaluate", "generate", "inspect"])
def test_help(command: str, run: Run) -> None:
    ran = run(command, "--help")
    assert ran.code == 0
    assert "Usage" in ran.out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("plan",), "Missing argument 'model' (see bitwright plan --help)"),
        (("quantize", "a", "b", "--target-bits", "four"), "'--target-bits'"),
        (("quantize", "a", "b", "--target-bits", 1), "'--target-bits'"),
        (("report", "a"), "Missing option '--output'"),
        (("compare", "a", "--schemes", "W4A16", "-o", "c", "--speed"), "No such option"),
        (("frobnicate",), "No such command 'frobnicate'"),
    ],
)
def test_wrong_usage_is_one_line(arguments: tuple[object, ...], reason: str, run: Run) -> None:
    ran = run(*arguments)
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert ran.err.startswith("bitwright: ")
    assert reason in ran.err


def test_without_arguments_there_is_help(run: Run) -> None:
    ran = run()
    assert (ran.code, ran.err) == (0, "")
    assert "Usage: bitwright" in ran.out


def test_interruption_is_told(
    run: Run, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bitwright.pipeline.run.quantize_block", interrupt)
    ran = run("quantize", llama, tmp_path / "out", "--quiet")
    assert ran.code == 130
    assert "no output was changed" in ran.err
    assert list(tmp_path.iterdir()) == []


def test_python_has_the_same_verbs(llama: Path, text: Path, tmp_path: Path) -> None:
    import bitwright

    report = bitwright.quantize(llama, tmp_path / "out", scheme="W8A16")
    assert report.plan.scheme.name == "W8A16"
    evaluation = bitwright.evaluate(
        tmp_path / "out", reference=llama, text=str(text), windows=2, sequence_length=32
    )
    assert evaluation.kl_divergence is not None
    assert evaluation.kl_divergence < 0.1
    model, tokenizer = bitwright.load(tmp_path / "out")
    ids = tokenizer("A quick", return_tensors="pt")["input_ids"]
    assert bool(torch.isfinite(model(ids).logits).all())
    assert bitwright.inspect(tmp_path / "out")["format"] == "compressed-tensors"
    assert isinstance(bitwright.generate(llama, "A", max_new_tokens=2), str)
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        bitwright.missing  # noqa: B018
