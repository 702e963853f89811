"""Checkpoints built once and shared; tests that damage one copy it first."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from support.models import make_model, make_text

ModelFactory = Callable[..., Path]


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> ModelFactory:
    """``model_of("llama")``: the folder of a tiny checkpoint."""
    made: dict[str, Path] = {}

    def factory(architecture: str = "llama") -> Path:
        if architecture not in made:
            folder = tmp_path_factory.mktemp("models") / architecture
            made[architecture] = make_model(folder, architecture)
        return made[architecture]

    return factory


@pytest.fixture(scope="session")
def llama(model_of: ModelFactory) -> Path:
    return model_of("llama")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text(tmp_path_factory.mktemp("text") / "calibration.txt")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For training tiny models: threads that wait for each other take minutes on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
