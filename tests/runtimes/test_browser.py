"""The report in a real browser, on a telephone's width and a desk's, in light and in dark."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runtimes.browser_environment import browser
from runtimes.conftest import NOTES
from runtimes.environment import CannotInstallError

pytestmark = pytest.mark.runtime

CHARTS = {
    "pareto", "kl-position", "heat-0", "weights-0-0", "weights-0-1", "inputs-0-0", "inputs-0-1",
    "outliers-0", "seconds-0", "memory-0",
}  # fmt: skip


@pytest.fixture(scope="module")
def looks(
    tmp_path_factory: pytest.TempPathFactory, llama: Path, text: Path
) -> dict[str, dict[str, Any]]:
    """What Chromium saw of a page about one checkpoint and of one that compares, by view."""
    try:
        python, executable = browser()
    except CannotInstallError as error:
        NOTES.append(f"SKIPPED, NOTHING WAS TESTED IN A BROWSER: {error}")
        pytest.skip("there is no browser here; see 'real runtimes' in the summary")
    folder = tmp_path_factory.mktemp("browser")
    scored = ("--text", text, "--windows", 2, "--sequence-length", 128)
    for arguments in (
        ("quantize", llama, folder / "q", "--method", "awq", "--calibration", text,
         "--samples", 4, "--sequence-length", 64),
        ("report", folder / "q", "--reference", llama, *scored, "-o", folder / "page.html"),
        ("compare", llama, "--schemes", "W8A8-INT8,NVFP4A16,UNHEARD", *scored,
         "-o", folder / "many"),
    ):  # fmt: skip
        command = [sys.executable, "-m", "bitwright.cli", *map(str, arguments), "--quiet"]
        subprocess.run(command, check=True)
    found = _look(python, executable, folder / "page.html", folder)
    many = _look(python, executable, folder / "many" / "report.html", folder / "many")
    return found | {f"many {view}": look for view, look in many.items()}


def _look(python: Path, executable: str, page: Path, shots: Path) -> dict[str, dict[str, Any]]:
    script = Path(__file__).with_name("browse.py")
    done = subprocess.run(
        [python, script, page, executable, shots], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


VIEWS = ["400 light", "400 dark", "1400 light", "1400 dark"]
EVERY = [*VIEWS, *(f"many {view}" for view in VIEWS)]


@pytest.mark.parametrize("view", EVERY)
def test_nothing_goes_wrong_and_nothing_is_fetched(
    view: str, looks: dict[str, dict[str, Any]]
) -> None:
    assert looks[view]["said"] == []
    assert [url for url in looks[view]["asked"] if not url.startswith(("file:", "data:"))] == []


@pytest.mark.parametrize("view", VIEWS)
def test_every_chart_is_drawn(view: str, looks: dict[str, dict[str, Any]]) -> None:
    charts = looks[view]["charts"]
    assert {chart["name"] for chart in charts} == CHARTS
    assert all(chart["marks"] >= 1 for chart in charts)


@pytest.mark.parametrize("view", EVERY)
def test_it_can_be_read(view: str, looks: dict[str, dict[str, Any]]) -> None:
    look = looks[view]
    assert look["scroll_width"] <= look["client_width"]  # no sideways scrolling
    assert look["font"] >= 9.5  # pixels, of the text in charts
    assert look["contrast"] >= 7
    assert look["soft_contrast"] >= 4.5
    assert look["cut"] == []
    assert look["columns"] == (3 if "1400" in view else 1)


def test_dark_is_dark(looks: dict[str, dict[str, Any]]) -> None:
    assert looks["1400 light"]["paper"] > 0.8
    assert looks["1400 dark"]["paper"] < 0.05


@pytest.mark.parametrize("page", ["", "many "])
def test_it_prints(page: str, looks: dict[str, dict[str, Any]]) -> None:
    printed = looks[f"{page}printed"]
    assert printed["bytes"] > 20_000
    assert printed["cut"] == []
    assert printed["width"] <= 718
