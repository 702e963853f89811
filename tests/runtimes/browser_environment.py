"""A virtual environment with playwright, and a Chromium: an installed one, or a copy of our own.

The copy comes from Debian's packages, unpacked into the cache: nothing is installed on the
machine and no privilege is needed. Where there is no apt-get, playwright fetches its own.
"""

import os
import shutil
from pathlib import Path

from runtimes.environment import CannotInstallError, call, environment, made_once

PLAYWRIGHT = "playwright==1.65.2"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "chromium-headless-shell")
DEBIAN = ("chromium-headless-shell", "fonts-dejavu-core", "fontconfig-config")
FONTS = """<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "urn:fontconfig:fonts.dtd">
<fontconfig>
<dir>/usr/share/fonts</dir><dir>{folder}/usr/share/fonts</dir><cachedir>{folder}/font-cache</cachedir>
<include ignore_missing="yes">/etc/fonts/conf.d</include>
<include ignore_missing="yes">{folder}/etc/fonts/conf.d</include>
</fontconfig>
"""


def browser() -> tuple[Path, str]:
    """(interpreter with playwright, path of Chromium or "" for playwright's own).

    Raises CannotInstallError if playwright cannot be installed or there is no browser.
    """
    python = environment("playwright-1.65.2", (("install", PLAYWRIGHT),))
    installed = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if installed is not None:
        return python, installed
    try:
        folder = made_once("chromium-debian", " ".join(DEBIAN) + FONTS, _unpack_debian)
        return python, str(folder / "chromium")
    except CannotInstallError as debian:
        try:
            call([str(python), "-m", "playwright", "install", "chromium-headless-shell"])
        except CannotInstallError as own:
            raise CannotInstallError(
                "no Chromium is installed, and neither Debian's packages nor playwright's own "
                f"could be fetched\n{debian}\n{own}"
            ) from own
    return python, ""


def _unpack_debian(folder: Path) -> None:
    """Chromium and the libraries it lacks here, with a script ``chromium`` that starts it."""
    apt, lists, debs = folder / "apt", folder / "apt" / "lists", folder / "apt" / "archives"
    for part in (lists, debs):
        (part / "partial").mkdir(parents=True)
    options = ["-qq", "-y", "--no-install-recommends"]
    settings = {
        "Debug::NoLocking": "1", "Dir::State::Lists": lists, "Dir::Cache": apt,
        "APT::Sandbox::User": "root" if os.geteuid() == 0 else "",
    }  # fmt: skip
    for key, value in settings.items():
        options += ["-o", f"{key}={value}"]
    call(["apt-get", *options, "update"])
    call(["apt-get", *options, "--download-only", "--reinstall", "install", *DEBIAN])
    for package in debs.glob("*.deb"):
        call(["dpkg-deb", "--extract", str(package), str(folder)])
    shutil.rmtree(apt)
    programs = list(folder.glob("usr/lib/chromium/chromium-headless-shell"))
    if not programs:
        raise CannotInstallError("Debian's package holds no headless Chromium")
    libraries = ":".join(sorted({str(file.parent) for file in folder.rglob("*.so*")}))
    fonts = folder / "fonts.conf"
    fonts.write_text(FONTS.format(folder=folder), encoding="utf-8")
    script = folder / "chromium"
    script.write_text(
        f'#!/bin/sh\nexport FONTCONFIG_FILE="{fonts}" LD_LIBRARY_PATH="{libraries}"\n'
        f'exec "{programs[0]}" "$@"\n',
        encoding="utf-8",
    )
    script.chmod(0o755)
