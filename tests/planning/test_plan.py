"""The plan as a whole: LLaMA-2-70B by hand, the shape of the JSON, the advice."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from planning.conftest import SMALL, WriteConfig
from support.cli import Ran, run_apart, run_here

import bitwright
from bitwright.errors import BadRequest, UnknownName
from bitwright.planning.hardware import device_names
from bitwright.planning.model import model_facts
from bitwright.planning.plan import quantize_here

SCHEMES = {
    "W16A16", "W8A8-FP8", "W8A8-INT8", "W4A16", "NVFP4", "GGUF-Q8_0", "GGUF-Q6_K", "GGUF-Q5_K",
    "GGUF-Q4_K", "GGUF-Q4_0",
}  # fmt: skip
ROW = {
    "scheme", "weight_bytes", "bits_per_weight", "gpus", "kv_bytes_per_token",
    "decode_tokens_per_second", "prefill_tokens_per_second", "native",
}  # fmt: skip
Run = Callable[..., Ran]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return lambda *arguments: run_here(monkeypatch, capsys, *arguments)


def _rows(found: dict[str, Any]) -> dict[str, Any]:
    return {row["scheme"]: row for row in found["schemes"]}


def test_llama_2_70b_on_a100(llama70: Path) -> None:
    rows = _rows(bitwright.plan(llama70, gpu="A100-80GB"))
    counts = {name: row["gpus"]["A100-80GB"] for name, row in rows.items()}
    assert counts["W16A16"] == 2
    assert counts["W8A8-FP8"] == counts["W8A8-INT8"] == counts["W4A16"] == 1
    assert rows["W16A16"]["weight_bytes"] == pytest.approx(140e9, rel=0.02)
    assert rows["W8A8-INT8"]["weight_bytes"] == pytest.approx(70e9, rel=0.02)
    assert 36e9 < rows["W4A16"]["weight_bytes"] < 37e9


def test_llama_2_70b_speed_ups_are_their_terms(llama70: Path) -> None:
    """One stream on two H100: the ratio of sums, each sum checked by hand.

    Bandwidths: 2 x 3350 GB/s, of which 16-bit kernels reach 0.75, 8-bit ones 0.74 and
    weight-only ones 0.50; the cache of 8192 tokens is read at 0.75.
    """
    found = bitwright.plan(llama70, gpu="H100")
    both = 2 * 3350e9
    read = {
        "W16A16": (137_953_296_384 - 2 * 32000 * 8192) / (both * 0.75),
        "W8A8-FP8": (69_515_689_984 - 2 * 32000 * 8192) / (both * 0.74),
        "W4A16": (36_346_281_984 - 2 * 32000 * 8192) / (both * 0.50),
    }
    cache = 8192 * 327_680 / (both * 0.75)
    links = 160 * (2 * 0.5 * 8192 * 2 / 450e9 + 8e-6)
    launches = {"W16A16": 80 * 10 * 2e-6, "W8A8-FP8": 80 * 14 * 2e-6, "W4A16": 80 * 10 * 2e-6}
    total = {name: read[name] + cache + links + launches[name] for name in read}
    for name in read:
        given = found["details"]["schemes"][name]["H100-SXM"]["speed_up"]
        assert given["devices"] == 2
        terms = given["single_stream"]["terms"]
        assert terms["read_weights"] == pytest.approx(read[name])
        assert terms["attention"] == pytest.approx(cache)
        assert terms["links"] == pytest.approx(links)
        assert terms["launches"] == pytest.approx(launches[name])
        assert terms["multiply"] < terms["read_weights"]
        assert terms["seconds"] == pytest.approx(total[name])
        assert given["single_stream"]["times"] == pytest.approx(total["W16A16"] / total[name])
    assert 1.5 < total["W16A16"] / total["W8A8-FP8"] < 1.9
    assert total["W16A16"] / total["W4A16"] > 2


def test_prefill_by_hand(llama70: Path) -> None:
    """Arithmetic: two operations per weight and token, and attention on half of all pairs."""
    found = bitwright.plan(llama70, gpu="A100-80GB", context=4096)
    rate = 624e12 * 0.65
    multiply = 2 * (68_451_041_280 * 4096 + 32000 * 8192) / rate
    attention = 80 * 4 * 64 * 128 * (4096 * 4097 / 2) / (312e12 * 0.61)
    launches = 80 * 14 * 2e-6
    expected = 4096 / (multiply + attention + launches)
    row = _rows(found)["W8A8-INT8"]
    assert row["gpus"]["A100-80GB"] == 1
    assert row["prefill_tokens_per_second"]["A100-80GB"] == pytest.approx(expected)


def test_batch_until_memory_bound_by_hand(llama70: Path) -> None:
    found = bitwright.plan(llama70, gpu="B200")
    one = found["details"]["schemes"]["W16A16"]["B200"]
    weights = 2 * (68_451_041_280 + 32000 * 8192)
    read = weights / (8000e9 * 0.75)
    multiply = weights / (2250e12 * 0.75)
    assert one["memory_bound_until_batch_weights_only"] == -(-read // multiply) == 282
    assert one["memory_bound_until_batch"] is None  # a cache of 8192 tokens is slower to read


def test_the_cache_of_the_request(llama70: Path) -> None:
    found = bitwright.plan(llama70, gpu="H200", context=4096, concurrency=10, kv_bits=8)
    cache = found["details"]["kv_cache"]
    assert cache["16"] == {
        "bytes_per_token": 327_680,
        "bytes_per_sequence": 327_680 * 4096,
        "bytes": 327_680 * 40960,
    }
    assert cache["8"]["bytes"] == 163_840 * 40960
    assert cache["4"]["bytes"] == 84_480 * 40960
    assert {row["kv_bytes_per_token"] for row in found["schemes"]} == {163_840}
    assert found["details"]["model"]["notes"] == []
    longer = bitwright.plan(llama70, gpu="H200", context=8192)
    assert "longer than the model's 4096" in longer["details"]["model"]["notes"][0]


def test_json(llama70: Path, run: Run) -> None:
    ran = run("plan", llama70, "--gpu", "A100-80GB,H100,CPU", "--json")
    assert (ran.code, ran.err, ran.out.count("\n")) == (0, "", 1)
    found = json.loads(ran.out)
    assert found.keys() == {"parameters", "schemes", "recommendation", "details"}
    assert found["parameters"] == 68_976_648_192
    assert {row["scheme"] for row in found["schemes"]} == SCHEMES
    names = {"A100-80GB", "H100-SXM", "CPU"}
    for row in found["schemes"]:
        assert row.keys() == ROW
        for key in ("gpus", "decode_tokens_per_second", "prefill_tokens_per_second", "native"):
            assert row[key].keys() == names
        assert {type(count) for count in row["gpus"].values()} == {int}
        assert {type(native) for native in row["native"].values()} == {bool}
        assert min(row["decode_tokens_per_second"].values()) > 0
    rows = _rows(found)
    assert rows["W8A8-FP8"]["native"] == {"A100-80GB": False, "H100-SXM": True, "CPU": False}
    assert rows["W8A8-INT8"]["native"] == dict.fromkeys(names, True)
    assert rows["NVFP4"]["native"] == dict.fromkeys(names, False)
    for name, advice in found["recommendation"].items():
        assert advice.keys() == {"scheme", "reason"}
        assert advice["scheme"] in SCHEMES
        assert name in names
    details = found["details"]
    assert details["devices"]["H100-SXM"]["origin"] == "datasheet"
    assert details["devices"]["CPU"]["origin"] == "assumed"
    assert "W8A16" in details["schemes"]["W8A8-FP8"]["A100-80GB"]["fallback"]
    assert details["schemes"]["W8A8-FP8"]["H100-SXM"]["fallback"] == ""
    assert details["quantize_here"]["gptq"]["seconds"] > details["quantize_here"]["rtn"]["seconds"]


def test_quantizing_takes_about_what_was_measured(config: WriteConfig) -> None:
    """The shape of Llama-2-7B with a vocabulary of 49152, as docs/scale.md reports it."""
    shape = {
        "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 49152, "tie_word_embeddings": True,
    }  # fmt: skip
    whole = model_facts(config(model_type="llama", num_hidden_layers=32, **shape))
    rtn = quantize_here(whole)["rtn"]
    assert rtn["seconds"] == pytest.approx(264, rel=0.5)
    assert rtn["ram_bytes"] == pytest.approx(2.15e9, rel=0.2)
    two = model_facts(config(model_type="llama", num_hidden_layers=2, **shape))
    gptq = quantize_here(two, tokens=8 * 512)["gptq"]
    assert gptq["seconds"] == pytest.approx(105, rel=0.6)
    assert gptq["ram_bytes"] == pytest.approx(4.09e9, rel=0.2)


def test_a_process_of_its_own_needs_no_weights(config: WriteConfig) -> None:
    ran = run_apart("plan", config(model_type="qwen3", **SMALL), "--gpu", "L4", "--json")
    assert (ran.code, ran.err) == (0, "")
    assert json.loads(ran.out)["parameters"] > 0


def test_on_screen(llama70: Path, run: Run) -> None:
    ran = run("plan", llama70, "--gpu", "A100-80GB", "--explain")
    text = " ".join(ran.out.split())
    assert ran.code == 0
    assert "68.98 billion parameters" in text
    assert "A100-80GB: W4A16 - memory is the limit" in text
    assert "W8A8-FP8: A100-80GB does not execute it; W8A16" in text
    assert "read weights" in text
    assert "device datasheet" in text
    assert "weight-only published" in text
    assert "8-bit assumed" in text
    assert "attention bandwidth assumed, compute published" in text


@pytest.mark.parametrize(
    ("gpu", "options", "scheme"),
    [
        ("H100", {}, "W8A8-FP8"),
        ("H200", {"priority": "cost"}, "W8A8-FP8"),
        ("MI300X", {}, "W8A8-FP8"),
        ("H100", {"priority": "latency"}, "W4A16"),
        ("A100-80GB", {}, "W4A16"),
        ("A100-80GB", {"priority": "cost"}, "W4A16"),
        ("A100-80GB", {"gpus": 8}, "W8A8-INT8"),
        ("A100-40GB", {"gpus": 1}, "W4A16"),
        ("RTX3090", {}, "W4A16"),
        ("RTX4090", {}, "W4A16"),
        ("L4", {"priority": "cost"}, "W4A16"),
        ("B200", {}, "NVFP4"),
        ("B200", {"priority": "quality"}, "W16A16"),
        ("H100", {"priority": "quality"}, "W8A8-FP8"),
        ("H100", {"priority": "quality", "gpus": 2}, "W16A16"),
        ("A100-80GB", {"priority": "quality", "gpus": 1}, "W8A8-FP8"),
        ("CPU", {}, "GGUF-Q4_K"),
        ("CPU", {"priority": "quality", "cpu_memory": 128.0}, "GGUF-Q8_0"),
    ],
)
def test_advice(gpu: str, options: dict[str, Any], scheme: str, llama70: Path) -> None:
    found = bitwright.plan(llama70, gpu=gpu, **options)
    (advice,) = found["recommendation"].values()
    assert advice["scheme"] == scheme
    assert len(advice["reason"]) > 20


def test_advice_for_this_machine(config: WriteConfig) -> None:
    found = bitwright.plan(config(model_type="qwen3", **SMALL), gpu="here")
    assert found["recommendation"]["HERE"]["scheme"] == "GGUF-Q4_K"
    assert found["details"]["devices"]["HERE"]["origin"] == "measured"


@pytest.mark.parametrize("priority", ["quality", "throughput", "cost", "latency"])
@pytest.mark.parametrize("gpus", [None, 1, 4])
def test_advice_is_given_for_every_device(priority: str, gpus: int | None, llama70: Path) -> None:
    """What is advised fits on the devices there are, or the reason says that nothing does."""
    devices = list(device_names())
    found = bitwright.plan(llama70, gpu=devices, gpus=gpus, priority=priority)
    rows = _rows(found)
    for name in devices:
        advice = found["recommendation"][name]
        needed = rows[advice["scheme"]]["gpus"][name]
        assert gpus is None or needed <= gpus or advice["reason"].startswith("nothing fits")
        native = rows[advice["scheme"]]["native"][name]
        assert native or "weights only" in advice["reason"]


def test_advice_says_when_not_all_sequences_fit(llama70: Path) -> None:
    many = bitwright.plan(llama70, gpu="H100")["recommendation"]["H100-SXM"]
    assert many["scheme"] == "W8A8-FP8"
    assert "all that were asked need 4" in many["reason"]  # 69.5 + 32 x 2.7 GB, 3 not dividing 64
    one = bitwright.plan(llama70, gpu="H100", concurrency=1)["recommendation"]["H100-SXM"]
    assert "asked" not in one["reason"]


def test_advice_where_nothing_fits(llama70: Path) -> None:
    advice = bitwright.plan(llama70, gpu="T4", gpus=1)["recommendation"]["T4"]
    assert advice["scheme"] == "W4A16"
    assert advice["reason"].startswith("nothing fits on 1 T4")
    assert "needs 4" in advice["reason"]


def test_given_devices_are_used(llama70: Path) -> None:
    one = _rows(bitwright.plan(llama70, gpu="H200", gpus=1))["W4A16"]
    two = _rows(bitwright.plan(llama70, gpu="H200", gpus=2))["W4A16"]
    assert one["gpus"] == two["gpus"] == {"H200": 1}
    assert two["decode_tokens_per_second"]["H200"] > one["decode_tokens_per_second"]["H200"]


def test_measured_kernels_are_named(llama70: Path, tmp_path: Path) -> None:
    file = tmp_path / "marlin.json"
    row = {"device": "H100", "kernel": "weight-only", "bandwidth": 0.25, "compute": 0.5}
    file.write_text(json.dumps({"kernels": [row]}), encoding="utf-8")
    before = bitwright.plan(llama70, gpu="H100")["details"]["schemes"]
    found = bitwright.plan(llama70, gpu="H100", measured=file)["details"]
    after = found["schemes"]
    measured, assumed = ({"bandwidth": kind, "compute": kind} for kind in ("measured", "assumed"))
    assert after["W4A16"]["H100-SXM"]["kernel_origin"] == measured
    assert after["W16A16"]["H100-SXM"]["kernel_origin"] == assumed
    share = found["kernels"]["H100-SXM"]["weight-only"]["bandwidth"]
    assert share == {"value": 0.25, "origin": "measured", "source": "marlin.json"}
    for key, ratio in (("read_weights", 2.0), ("attention", 1.0)):
        terms = [x["W4A16"]["H100-SXM"]["decode_terms"][key] for x in (before, after)]
        assert terms[1] == pytest.approx(ratio * terms[0])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gpu": "TPU"}, UnknownName, "known: "),
        ({"gpu": " , "}, BadRequest, "no device"),
        ({"priority": "beauty"}, UnknownName, "latency"),
        ({"kv_bits": 3}, BadRequest, "16, 8 or 4"),
        ({"context": 0}, BadRequest, "--context 0"),
        ({"concurrency": -1}, BadRequest, "--concurrency -1"),
        ({"gpus": 0}, BadRequest, "--gpus 0"),
    ],
)
def test_refusals(
    options: dict[str, Any], error: type[Exception], message: str, llama70: Path
) -> None:
    with pytest.raises(error, match=message):
        bitwright.plan(llama70, **options)


def test_refusals_are_one_line(run: Run, tmp_path: Path) -> None:
    ran = run("plan", tmp_path / "missing", "--json")
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
