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
    """What Chromium saw of the page about a small AWQ checkpoint, by width and colours."""
    try:
        python, executable = browser()
    except CannotInstallError as error:
        NOTES.append(f"SKIPPED, NOTHING WAS TESTED IN A BROWSER: {error}")
        pytest.skip("there is no browser here; see 'real runtimes' in the summary")
    folder = tmp_path_factory.mktemp("browser")
    for arguments in (
        ("quantize", llama, folder / "q", "--method", "awq", "--calibration", text,
         "--samples", 4, "--sequence-length", 64),
        ("report", folder / "q", "--reference", llama, "--text", text, "--windows", 2,
         "--sequence-length", 128, "-o", folder / "page.html"),
    ):  # fmt: skip
        command = [sys.executable, "-m", "bitwright.cli", *map(str, arguments), "--quiet"]
        subprocess.run(command, check=True)
    script = Path(__file__).with_name("browse.py")
    done = subprocess.run(
        [python, script, folder / "page.html", executable, folder],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


VIEWS = ["400 light", "400 dark", "1400 light", "1400 dark"]


@pytest.mark.parametrize("view", VIEWS)
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


@pytest.mark.parametrize("view", VIEWS)
def test_it_can_be_read(view: str, looks: dict[str, dict[str, Any]]) -> None:
    look = looks[view]
    assert look["scroll_width"] <= look["client_width"]  # no sideways scrolling
    assert look["font"] >= 9.5  # pixels, of the text in charts
    assert look["contrast"] >= 7
    assert look["soft_contrast"] >= 4.5
    assert look["cut"] == []
    assert look["columns"] == (1 if view.startswith("400") else 3)


def test_dark_is_dark(looks: dict[str, dict[str, Any]]) -> None:
    assert looks["1400 light"]["paper"] > 0.8
    assert looks["1400 dark"]["paper"] < 0.05


def test_it_prints(looks: dict[str, dict[str, Any]]) -> None:
    assert int(looks["printed"]) > 20_000  # type: ignore[call-overload]
