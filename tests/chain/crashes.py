"""Copies of a chain as `kill -9` would leave it at each step on disk of `add`, `undo`, `revoke` and of exports.

Steps are the moments before and after every rename, removal and sync, and before, in the middle of and after every
write of a file. What is on disk at such a moment is what a process that is killed there leaves: nothing of it is
cleaned up, and what it has not handed to the system yet is lost.
"""

import os
import shutil
from pathlib import Path

import pytest
from chain_cases import C

from editlib.chain.export import save_chain, save_chain_delta, save_chain_receipt

OPERATIONS = {
    "add": lambda chain: chain.add(C),
    "undo": lambda chain: chain.undo(),
    "revoke": lambda chain: chain.revoke(["a1"]),
}
EXPORTS = {
    "folder": lambda chain: save_chain(chain, out_of(chain)),
    "delta": lambda chain: save_chain_delta(chain, out_of(chain)),
    "receipt": lambda chain: save_chain_receipt(chain, out_of(chain), private=True),
}


def out_of(chain):
    return chain.path.with_suffix(".out")


def left_by_kills(chain, operation, work):
    """Runs `operation` on `chain`; returns the copies, the last of which is of the run that got through.

    An export's output is copied to the same name, ending in `.out`.
    """
    taken = []

    def step():
        taken.append(work / f"{chain.path.name}-{len(taken):02d}")
        shutil.copytree(chain.path, taken[-1])
        out = out_of(chain)
        if out.is_dir():
            shutil.copytree(out, taken[-1].with_suffix(".out"))
        elif out.exists():
            shutil.copy(out, taken[-1].with_suffix(".out"))

    def watched(function):
        def call(*args, **kwargs):
            step()
            result = function(*args, **kwargs)
            step()
            return result

        return call

    def write_bytes(self, data):
        step()
        with open(self, "wb") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            step()
            file.write(data[len(data) // 2 :])
        step()

    with pytest.MonkeyPatch.context() as patch:
        for name in ("replace", "unlink", "fsync"):
            patch.setattr(os, name, watched(getattr(os, name)))
        patch.setattr(Path, "write_bytes", write_bytes)
        operation(chain)
    step()
    return taken
