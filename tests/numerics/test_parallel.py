"""Compiled loops keep to torch's threads, and leave them as they were."""

import os
import subprocess
import sys

import pytest

CODE = """
import torch
from bitwright.numerics.grids import IntGrid
from bitwright.numerics.scales import choose_scale
before = torch.get_num_threads()
choose_scale(torch.randn(64, 32), IntGrid(4), dtype=torch.float16)
import numba
print(before, torch.get_num_threads(), numba.get_num_threads())
"""


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="there is only one thread to have")
def test_a_limit_of_torch_outlives_the_first_loop() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["1", "1", "1"]
