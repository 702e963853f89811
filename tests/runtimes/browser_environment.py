"""A virtual environment with playwright, and a Chromium: its own, or the one that is installed."""

import os
import shutil
from pathlib import Path

from runtimes.environment import CannotInstallError, _call, _locked

PACKAGE = "playwright==1.65.2"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def browser() -> tuple[Path, str]:
    """(interpreter with playwright, path of Chromium or "" for playwright's own).

    Raises CannotInstallError if playwright cannot be installed or there is no browser.
    """
    home = Path.home() / ".cache" / "bitwright" / "runtimes"
    root = Path(os.environ.get("BITWRIGHT_RUNTIMES", home)).expanduser()
    root.mkdir(parents=True, exist_ok=True)
    folder = root / PACKAGE.replace("==", "-")
    python = folder / "bin" / "python"
    marker = folder / "complete"
    with _locked(root / f"{folder.name}.lock"):
        if not marker.is_file():
            shutil.rmtree(folder, ignore_errors=True)
            _call([shutil.which("python3") or "python3", "-m", "venv", str(folder)])
            _call([str(python), "-m", "pip", "install", PACKAGE])
            marker.write_text(PACKAGE, encoding="utf-8")
        installed = next((path for name in BROWSERS if (path := shutil.which(name))), None)
        if installed is not None:
            return python, installed
        own = folder / "own-browser"
        if not own.is_file():
            try:
                _call([str(python), "-m", "playwright", "install", "chromium-headless-shell"])
            except CannotInstallError as error:
                raise CannotInstallError(
                    "no Chromium is installed (Debian: apt-get install chromium) and playwright "
                    f"could not fetch its own\n{error}"
                ) from error
            own.write_text("yes", encoding="utf-8")
    return python, ""
