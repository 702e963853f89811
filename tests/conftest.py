"""Settings for every test: reproducible examples and random numbers."""

import os

# Triton reads it when it is first imported, and any test's imports may be the first to do so.
os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from hypothesis import HealthCheck, settings

pytest_plugins = ["support.fixtures"]

settings.register_profile(
    "bitwright",
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("bitwright")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
