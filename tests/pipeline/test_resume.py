"""Stopped runs go on where they were and give the same bytes, or are refused by what differs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bitwright.api import quantize
from bitwright.errors import BadRequest
from bitwright.pipeline.journal import NAME, Journal

DRIVER = Path(__file__).parents[1] / "support" / "resume_driver.py"
OPTIONS: dict[str, Any] = {
    "scheme": "W4A16", "method": "gptq", "group_size": 32, "samples": 8, "sequence_length": 32,
}  # fmt: skip


@pytest.mark.skipif(os.name != "posix", reason="forks")
@pytest.mark.parametrize(("method", "trials"), [("gptq", 8), ("awq", 6), ("best", 6)])
def test_killed_runs_finish_with_the_same_bytes(
    method: str, trials: int, llama: Path, text: Path, tmp_path: Path
) -> None:
    command = [sys.executable, str(DRIVER), str(llama), str(text), str(tmp_path), method]
    done = subprocess.run([*command, str(trials)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    tally = json.loads(done.stdout)
    assert tally["same"] == tally["trials"], tally
    assert tally["killed"] >= trials // 2
    assert tally["left"] == ["warm", "whole"]


def stopped(llama: Path, text: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is interrupted in its second block."""
    import bitwright.pipeline.run as run

    real, calls = run.quantize_block, list[int]()

    def interrupted(*arguments: Any) -> Any:
        calls.append(arguments[1])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(run, "quantize_block", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantize(llama, out, calibration=str(text), **OPTIONS)


def test_only_the_unfinished_blocks_are_done_again(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(llama, text, tmp_path / "out", monkeypatch)
    assert not (tmp_path / "out").exists()
    seen: list[int] = []
    report = quantize(
        llama, tmp_path / "out", calibration=str(text), resume=True,
        progress=lambda done, total, note: seen.append(done), **OPTIONS,
    )  # fmt: skip
    assert seen == [1, 2]
    whole = quantize(llama, tmp_path / "whole", calibration=str(text), **OPTIONS)
    assert report.to_json() == whole.to_json()
    assert len(report.blocks) == 2
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"method": "awq"}, "plan method: gptq then, awq now"),
        ({"samples": 7}, "plan calibration samples: 8 then, 7 now"),
        ({"seed": 1}, "plan seed: 0 then, 1 now"),
    ],
)
def test_another_plan_is_refused(
    changed: dict[str, Any], match: str, llama: Path, text: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    stopped(llama, text, tmp_path / "out", monkeypatch)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BadRequest, match=match):
        quantize(
            llama, tmp_path / "out", resume=True, **OPTIONS | {"calibration": str(text)} | changed
        )
    assert sorted(tmp_path.rglob("*")) == before


def test_another_text_or_model_is_refused(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = tmp_path / "words.txt"
    words.write_text(text.read_text())
    stopped(llama, words, tmp_path / "out", monkeypatch)
    words.write_text(text.read_text().replace("fox", "cat"))
    options = OPTIONS | {"calibration": str(words), "resume": True}
    with pytest.raises(BadRequest, match="calibration tokens"):
        quantize(llama, tmp_path / "out", **options)
    words.write_text(text.read_text())
    weights = llama / "model.safetensors"
    status = weights.stat()
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    try:
        with pytest.raises(BadRequest, match=r"model model\.safetensors"):
            quantize(llama, tmp_path / "out", **options)
    finally:
        os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    quantize(llama, tmp_path / "out", **options)


def test_lost_states_are_refused(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(llama, text, tmp_path / "out", monkeypatch)
    (tmp_path / ".out.work" / "hidden-states.1").unlink()
    with pytest.raises(BadRequest, match="start over without --resume"):
        quantize(llama, tmp_path / "out", calibration=str(text), resume=True, **OPTIONS)


def test_resume_with_nothing_to_resume_just_runs(llama: Path, tmp_path: Path) -> None:
    quantize(llama, tmp_path / "out", resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_torn_line_does_not_count(tmp_path: Path) -> None:
    journal = Journal(tmp_path, {"plan": 1})
    journal.commit({"block": 0})
    with (tmp_path / NAME).open("a") as handle:
        handle.write('{"blo')
    again = Journal(tmp_path, {"plan": 1})
    assert again.blocks == [{"block": 0}]
    again.commit({"block": 1})
    assert Journal(tmp_path, {"plan": 1}).blocks == [{"block": 0}, {"block": 1}]
