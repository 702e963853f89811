"""What `--memory` promises is kept, and what cannot be kept is refused before any work."""

import json
from pathlib import Path

import pytest
from support.cli import run_apart
from support.models import make_model

from bitwright.api import prepare
from bitwright.errors import BadRequest
from bitwright.pipeline.budget import PROGRAM, parse_size

WIDE = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8,
    "num_hidden_layers": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("wide") / "model", **WIDE)


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_the_measured_peak_stays_under_the_promise(
    method: str, wide: Path, text: Path, tmp_path: Path
) -> None:
    calibration = ["--calibration", text, "--samples", 8, "--sequence-length", 64]
    command = [
        "quantize", wide, tmp_path / "out", "--method", method, "--json",
        *(calibration if method != "rtn" else []),
    ]  # fmt: skip
    refused = run_apart(*command, "--memory", "100MB")
    assert refused.code != 0
    assert "cannot be kept" in refused.err
    assert not list(tmp_path.iterdir())
    smallest = refused.err.split("may need ")[1].split(";")[0]
    ran = run_apart(*command, "--memory", f"{float(smallest.removesuffix('GiB')) + 0.01}GiB")
    assert ran.code == 0, ran.err
    peak, promise = json.loads(ran.out)["peak_rss_bytes"], parse_size(smallest)
    assert peak < promise * 1.01
    assert promise < 3 * peak, "a bound this loose refuses what would fit"
    assert peak > PROGRAM / 2


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 * 2**30), ("500MB", 500_000_000), ("1.5 GB", 1_500_000_000), ("1024", 1024)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "0", "nan", "many", "infGB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(BadRequest, match="is not a size"):
        parse_size(text)


def test_methods_that_hold_the_whole_model_say_so(wide: Path, text: Path) -> None:
    plain, tuned = (
        prepare(wide, method=method, calibration=str(text), samples=4, sequence_length=64)
        for method in ("gptq", "gptq+tune")
    )
    assert tuned.prediction.memory_bytes >= plain.prediction.memory_bytes
    assert tuned.prediction.seconds > plain.prediction.seconds
