"""Kills itself with SIGKILL at the k-th step on disk of `add`, `undo`, `revoke` and of exports, for every k there is.

`python crash_job.py BASE BEFORE WORK`: for each operation and each k a forked process works on a copy of the chain
`BEFORE`, left in `WORK/<operation>-<k>`, until the operation gets through; exports go to `WORK/<operation>-<k>.out`.
Steps are the moments before and after every rename, removal and sync, and before, in the middle of and after every
write of a file.
"""

import os
import shutil
import signal
import sys
from pathlib import Path

import torch
from chain_cases import C

from editlib.chain import Chain
from editlib.chain.export import save_chain, save_chain_delta, save_chain_receipt
from editlib.workbench import Workbench

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


def die_at(k):
    """From now on the k-th step on disk is the last."""
    left = [k]

    def step():
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

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

    for name in ("replace", "unlink", "fsync"):
        setattr(os, name, watched(getattr(os, name)))
    Path.write_bytes = write_bytes


def main(base, before, work):
    torch.set_num_threads(1)
    bench = Workbench.load(str(base / "tiny"), base / "stats", progress=False)
    for name, operation in {**OPERATIONS, **EXPORTS}.items():
        for k in range(1, 100):
            copy = work / f"{name}-{k:02d}"
            shutil.copytree(before, copy)
            child = os.fork()
            if child == 0:
                chain = Chain.open(copy, bench, clock=lambda: "t")
                die_at(k)
                operation(chain)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            if os.WIFEXITED(status):
                assert os.WEXITSTATUS(status) == 0, (name, k)
                break
            assert os.WTERMSIG(status) == signal.SIGKILL, (name, k)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
