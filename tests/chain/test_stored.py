"""Chains that an earlier version wrote, before its packages moved, open with this one.

`stored/` holds one chain of MEMIT and one of UniErase with a gate, two batches each, of the tiny base model of
`conftest.py`; they were made once and are not made again.
"""

import shutil
from pathlib import Path

import pytest
from chain_cases import A, B, files

from editlib.chain import Chain

STORED = Path(__file__).parent / "stored"


@pytest.mark.parametrize("name", ["MEMIT", "UniErase"])
def test_a_chain_of_an_earlier_version_opens_verifies_and_goes_back(name, bench, base, tmp_path):
    folder = tmp_path / name
    shutil.copytree(STORED / name, folder)
    original = {layer: bench.anat.weight(layer).clone() for layer in (1, 2)}
    chain = Chain.open(folder, bench, stats_dir=base / "stats")
    assert [list(entry.ids) for entry in chain.record.batches] == [[request.id for request in some] for some in (A, B)]
    before = files(folder)
    chain.verify()
    assert files(folder) == before
    chain.revoke([request.id for request in (*A, *B)])
    assert all(chain.anat.weight(layer).equal(original[layer]) for layer in (1, 2))
