"""Another device than the CPU: nothing meets a tensor that is elsewhere, and the codes agree."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bitwright.errors import BadRequest
from bitwright.pipeline.device import pick_device

DRIVER = Path(__file__).parents[1] / "support" / "device_driver.py"
REQUESTS = (
    "W4A16:gptq",
    "W3A16:awq+gptq",
    "W8A8-INT8:smoothquant+gptq",
    "W8A8-FP8-KV8-FP8:gptq",
    "NVFP4:rtn",
    "W4A16:best",
)


def test_every_step_runs_on_another_device(llama: Path, text: Path, tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, DRIVER, llama, text, tmp_path, *REQUESTS],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["refuses_to_mix"]
    assert found["blocks_elsewhere"] >= 2 * len(REQUESTS)
    for request, share in found["shares"].items():
        assert share > 0.999, request  # sums in another order may meet a tie otherwise


def test_devices_by_name() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(BadRequest, match="auto, cpu, cuda"):
        pick_device("tpu")
    if torch.cuda.is_available():
        assert pick_device("auto").type == "cuda"
    else:
        assert pick_device("auto").type == "cpu"
        with pytest.raises(BadRequest, match="no CUDA device"):
            pick_device("cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_codes_of_the_cpu(llama: Path, text: Path, tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, DRIVER, "--cuda", llama, text, tmp_path, *REQUESTS],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    for request, share in json.loads(ran.stdout.splitlines()[-1])["shares"].items():
        assert share > 0.98, request
