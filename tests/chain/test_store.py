"""The folder: nothing lost, nothing changed unseen, one writer at a time."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from chain_cases import RETAIN, A, B, files
from crashes import EXPORTS, OPERATIONS, left_by_kills
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from editlib.algorithms.low_rank import LowRank
from editlib.chain import Chain, store
from editlib.errors import ChainError, OutputError

HERE = Path(__file__).parent


@pytest.fixture
def chain(start):
    made = start("MEMIT")
    made.add(A)
    made.add(B)
    return made


@pytest.fixture
def unlearned(start):
    """A chain with every kind of file in it."""
    made = start("UniErase", retain=RETAIN)
    made.add(A)
    return made


def left_over(path):
    return [place for place in Path(path).rglob("*") if place.name.endswith(".tmp")]


def contents(path):
    return files(path) if path.is_dir() else {"": path.read_bytes()}


def script(*args, **options):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    return subprocess.Popen([sys.executable, *map(str, args)], env=env, text=True, **options)


def copied(chain, place, again):
    """The same chain in another folder."""
    shutil.copytree(chain.path, place)
    return again(SimpleNamespace(path=place), clock=lambda: "t")


def test_killed_at_any_moment_an_export_is_whole_or_not_there(chain, again, tmp_path):
    (work := tmp_path / "work").mkdir()
    before = files(chain.path)
    for name, export in EXPORTS.items():
        runs = left_by_kills(copied(chain, tmp_path / name, again), export, work)
        whole = runs[-1].with_suffix(".out")  # of the run that got through
        assert len(runs) > 3 and whole.exists()
        for run in runs:
            assert files(run) == before
            out = run.with_suffix(".out")
            if out.exists():
                assert contents(out) == contents(whole)


def test_killed_at_any_moment_it_is_before_or_after(chain, again, tmp_path):
    (work := tmp_path / "work").mkdir()
    before = files(chain.path)
    for name, operation in OPERATIONS.items():
        runs = left_by_kills(copied(chain, tmp_path / name, again), operation, work)
        after = files(runs[-1])  # the run that got through
        assert len(runs) > 8 and after["chain.json"] != before["chain.json"]
        seen = set()
        for k, run in enumerate(runs):
            found = Chain.open(run)
            was_before = (run / "chain.json").read_bytes() == before["chain.json"]
            wanted = before if was_before else after
            assert (run / "chain.json").read_bytes() == wanted["chain.json"]
            assert wanted.items() <= files(run).items()
            seen.add(was_before)
            found = again(found, clock=lambda: "t")
            found.verify()
            if was_before and (name == "undo" or k % 3 == 0):
                operation(found)
                assert files(run) == after  # and what the killed one left is gone
            else:
                with found._store.writing():  # cleans up
                    pass
                assert files(run) == wanted
        assert seen == {True, False}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_bit_in_any_file_is_found_and_named(unlearned, data):
    name = data.draw(st.sampled_from(sorted(files(unlearned.path))))
    place = unlearned.path / name
    whole = place.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    flipped = bytearray(whole)
    flipped[at] ^= 1 << data.draw(st.integers(0, 7))
    try:
        place.write_bytes(flipped)
        for look in (Chain.open, lambda path: unlearned.verify()):
            with pytest.raises(ChainError, match=f"{Path(name).name}.*damaged"):
                look(unlearned.path)
    finally:
        place.write_bytes(whole)


@pytest.mark.parametrize("harm", ["cut", "longer", "gone", "empty"])
def test_so_is_every_other_harm(unlearned, harm):
    for name, whole in files(unlearned.path).items():
        place = unlearned.path / name
        if harm == "gone":
            place.unlink()
        else:
            place.write_bytes({"cut": whole[:-1], "longer": whole + b"\n", "empty": b""}[harm])
        wanted = "is not a chain" if (name, harm) == ("chain.json", "gone") else Path(name).name
        with pytest.raises(ChainError, match=wanted):
            Chain.open(unlearned.path)
        place.write_bytes(whole)
    Chain.open(unlearned.path)


def test_verify_finds_a_change_that_was_signed(chain, again):
    """Updates that were replaced with all hashes made to fit, but for the one of the weights that they gave."""
    entry = chain.batches[1]
    batch = chain._session.batch(entry)
    update = batch.updates[2]
    changed = replace(batch, updates={**batch.updates, 2: LowRank(update.left, update.right * 1.01)})
    file, sha256 = chain._store.write_batch(2, changed.to_bytes())
    record = chain.record.with_batches([chain.batches[0], replace(entry, file=file, sha256=sha256)])
    (chain.path / "chain.json").write_bytes(record.to_bytes())
    with pytest.raises(ChainError, match=r"batch 2, layer 2: its updates on the base model give weights of hash"):
        again(chain).verify()


def test_a_chain_of_a_later_format_is_refused(chain):
    (chain.path / "chain.json").write_bytes(replace(chain.record, format=2).to_bytes())
    with pytest.raises(ChainError, match="has format 2, this editlib reads 1"):
        Chain.open(chain.path)


def test_two_writers(chain, again):
    other = again(chain)
    with chain._store.writing():
        for operation in OPERATIONS.values():
            with pytest.raises(ChainError, match="being written by another process"):
                operation(other)
        assert other.status()["requests"] == 3  # readers need no lock
        Chain.open(chain.path)
        other.verify()
    other.undo()


def test_the_lock_dies_with_its_process(chain):
    held = (
        "import sys, time\nfrom editlib.chain.store import Store\n"
        "with Store(sys.argv[1]).writing():\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    holder = script("-c", held, chain.path, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ChainError, match="being written by another process"):
        chain.undo()
    holder.kill()
    holder.wait()
    chain.undo()


def test_what_others_put_there_stays(chain):
    mine = [chain.path / "notes.txt", chain.path / "batches" / "mine.safetensors"]
    for place in mine:
        place.write_text("mine")
    rubbish = [chain.path / ".chain.json.1.tmp", chain.path / "batches" / ".0003-0123456789ab.safetensors.9.tmp"]
    rubbish.append(chain.path / "batches" / "0007-0123456789ab.safetensors")
    for place in rubbish:
        place.write_text("half")
    Chain.open(chain.path)
    assert all(place.exists() for place in (*mine, *rubbish))
    chain.undo()
    assert all(place.exists() for place in mine) and not any(place.exists() for place in rubbish)


def unchanged(chain, again, before, wanted, change):
    weights = {name: value.clone() for name, value in chain.model.state_dict().items()}
    with pytest.raises(OutputError, match=wanted) as caught:
        change()
    assert "\n" not in str(caught.value)
    assert files(chain.path) == before and not left_over(chain.path)
    assert all(torch.equal(value, weights[name]) for name, value in chain.model.state_dict().items())
    assert chain.record == again(chain).record


@pytest.mark.parametrize("room", [0, 0.5, 1])
def test_a_full_disk(chain, again, room):
    """Files may not grow beyond a part of a batch; of a whole one, so that only chain.json does not fit."""
    record = len((chain.path / "chain.json").read_bytes())
    batch = chain._store.size(chain.batches[1])
    chain.undo()
    assert batch < record
    before, usual = files(chain.path), resource.getrlimit(resource.RLIMIT_FSIZE)

    def change():
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(room * batch), usual[1]))
        try:
            chain.add(B)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, usual)

    wanted = "chain.json" if room == 1 else "batches/0002"
    unchanged(chain, again, before, f"cannot write .*{wanted}.*File too large", change)
    chain.add(B)


@pytest.mark.parametrize("name", ["replace", "fsync"])
@pytest.mark.parametrize("at", ["batch", "chain.json"])
def test_a_disk_that_fails_later(chain, again, monkeypatch, name, at):
    chain.undo()
    before, real, calls = files(chain.path), getattr(os, name), []

    def fail(*args):
        calls.append(args)
        # A batch is synced and renamed first, then chain.json; the folders' own syncs may fail.
        if len(calls) == {"batch": 1, "chain.json": 3 if name == "fsync" else 2}[at]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    monkeypatch.setattr(os, name, fail)
    unchanged(chain, again, before, "cannot write .*No space left", lambda: chain.add(B))
    with pytest.raises(OutputError):
        calls.clear()
        chain.revoke(["a1"])
    assert files(chain.path) == before


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_read_only_folder(chain, again, monkeypatch, name):
    """What a read-only mount answers, since root may write everywhere else."""
    before, real = files(chain.path), os.open

    def refuse(path, flags, *args, **kwargs):
        if str(path).startswith(str(chain.path)) and flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    unchanged(chain, again, before, "cannot write .*Read-only file system", lambda: OPERATIONS[name](chain))
    again(chain).verify()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(chain, again):
    places = [chain.path, *chain.path.rglob("*")]
    before = files(chain.path)
    for place in places:
        place.chmod(0o555 if place.is_dir() else 0o444)
    try:
        unchanged(chain, again, before, "cannot write", chain.undo)
    finally:
        for place in places:
            place.chmod(0o755)


def test_a_chain_that_is_replaced_while_it_is_read(chain, again, monkeypatch):
    """A reader that finds a file gone looks whether the chain has moved on."""
    other, real, done = again(chain), store.Store.read, []

    def read(self, name, wanted):
        if not done:
            done.append(name)
            other.revoke(["a1"])  # replaces both batches
        return real(self, name, wanted)

    monkeypatch.setattr(store.Store, "read", read)
    assert list(Chain.open(chain.path).record.ids) == ["a2", "b1"]


def test_a_copy_needs_nothing_but_the_base_model_and_the_statistics(unlearned, again, tmp_path):
    shutil.copytree(unlearned.path, tmp_path / "elsewhere")
    shutil.rmtree(unlearned.path)
    moved = again(replace_path(unlearned, tmp_path / "elsewhere"))
    moved.verify()
    moved.add(B)
    content = json.loads((moved.path / "chain.json").read_text())
    assert str(unlearned.path) not in json.dumps(content)


def replace_path(chain, path):
    chain._store.path = path
    return chain
