"""`pytest -p stand_in`: a stand-in for an accelerator (see `stand_in.cpp`), built once a PyTorch version, and taken as
the device of the tests that want one. It changes what PyTorch has for the whole process."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import types
from pathlib import Path

import torch
from torch.utils import cpp_extension

NAME = "standin"


def _build() -> types.ModuleType:
    folder = Path(__file__).parents[1] / "build" / f"stand_in-{torch.__version__}-py{sys.version_info.minor}"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))  # where ninja is
    source = str(Path(__file__).with_suffix(".cpp"))
    return cpp_extension.load("stand_in_device", [source], build_directory=str(folder), extra_cflags=["-O1"])


def _register() -> None:
    """Names the device and gives it the module that PyTorch looks for."""
    torch.utils.rename_privateuse1_backend(NAME)
    module = types.ModuleType(f"torch.{NAME}")
    module.is_available = module.is_initialized = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    torch._register_device_module(NAME, module)
    torch.utils.generate_methods_for_privateuse1_backend()


def _missing() -> list[str]:
    """What it takes to build it and is not here."""
    headers = Path(sysconfig.get_path("include"), "Python.h")
    compiler = os.environ.get("CXX", "c++")
    there = {compiler: shutil.which(compiler), str(headers): headers.is_file()}
    return [name for name, found in there.items() if not found]


if missing := _missing():
    sys.stderr.write(f"no stand-in for an accelerator without {', '.join(missing)}; its tests are skipped\n")
else:
    _build().start()
    _register()
    os.environ["EDITLIB_TEST_DEVICE"] = f"{NAME}:0"
