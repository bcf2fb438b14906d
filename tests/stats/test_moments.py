"""A pass that is interrupted, killed, or finds its checkpoint damaged ends with the same sums."""

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_layer_stats import ALL, DOCUMENTS, HEADER, close, dense, run

from editlib.errors import OutputError, StatsError
from editlib.models.anatomy import anatomy
from editlib.models.loading import load
from editlib.models.weights import save_model
from editlib.stats import layer_stats as module
from editlib.stats.layer_stats import document_windows
from editlib.stats.moments import Buffers, MomentSums, add_gram, drop_checkpoint, finish, held_interrupts, mirror
from editlib.workbench import Workbench


class Cut(Exception):
    pass


def interrupted(anat, tok, path, monkeypatch, after, **options):
    """A run that dies after some batches, with a checkpoint after each."""
    record, done = module.record_moments, []

    def dies(*args):
        if len(done) == after:
            raise Cut
        done.append(1)
        return record(*args)

    monkeypatch.setattr(module, "record_moments", dies)
    with pytest.raises(Cut):
        run(anat, tok, checkpoint=path, checkpoint_seconds=-1, **{"batch_tokens": 100, **options})
    monkeypatch.setattr(module, "record_moments", record)
    assert path.exists()


@pytest.fixture(autouse=True)
def checkpoints_are_cheap(monkeypatch):
    monkeypatch.setattr("editlib.stats.moments.SAVING", 1e9)


@pytest.mark.parametrize("after", [1, 3])
@pytest.mark.parametrize("limit", [ALL, 330])
def test_a_continued_run_equals_one_in_a_piece(tiny_llama, tok, tmp_path, monkeypatch, after, limit):
    anat, path = anatomy(tiny_llama), tmp_path / "stats.part"
    whole = run(anat, tok, batch_tokens=100, tokens=limit)
    interrupted(anat, tok, path, monkeypatch, after, tokens=limit)
    windows = []
    pad = module.pad
    monkeypatch.setattr(module, "pad", lambda rows, **kwargs: windows.extend(rows) or pad(rows, **kwargs))
    again = run(anat, tok, batch_tokens=100, checkpoint=path, tokens=limit)
    assert len(windows) < len(list(document_windows(tok, DOCUMENTS, 32)))  # the first ones were not run again
    for layer, stats in whole.items():
        assert (again[layer].count, again[layer].sample_size) == (stats.count, stats.sample_size)
        assert again[layer].header == stats.header
        assert torch.equal(again[layer].mom2, stats.mom2)
    drop_checkpoint(path)
    assert list(tmp_path.iterdir()) == []


def damage_sums(path):
    """Flips bytes inside the last array; the arrays before it stay readable."""
    raw = bytearray(path.read_bytes())
    at = raw.rfind(b"sum.3.npy", 0, raw.find(b"PK\x01\x02"))
    raw[at + 600 : at + 608] = b"\xff" * 8
    path.write_bytes(bytes(raw))


def rewrite(path, **change):
    with np.load(path) as found:
        arrays = {**found, **change}
    with path.open("wb") as out:
        np.savez(out, **arrays)


def without_tokens(path):
    with np.load(path) as found:
        state = json.loads(str(found["state"]))
    return {key: value for key, value in state.items() if key != "tokens"}


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not a zip"),
    "bytes in the last array": damage_sums,
    "other shape": lambda path: rewrite(path, **{"sum.3": np.zeros((3, 3))}),
    "state is a list": lambda path: rewrite(path, state=np.array("[1]")),
    "state lacks a field": lambda path: rewrite(path, state=np.array(json.dumps(without_tokens(path)))),
    "a bare array": lambda path: np.save(path.open("wb"), np.zeros(3)),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_costs_time_never_correctness(tiny_llama, tok, tmp_path, monkeypatch, caplog, kind):
    anat, path = anatomy(tiny_llama), tmp_path / "stats.part"
    interrupted(anat, tok, path, monkeypatch, 3)
    DAMAGE[kind](path)
    again = run(anat, tok, batch_tokens=100, checkpoint=path)
    assert f"{path} is damaged" in caplog.text
    for layer in (1, 3):
        wanted, count = dense(anat, tok, layer)
        assert again[layer].count == count
        close(again[layer].mom2, wanted)


@pytest.mark.parametrize(
    "change", [{"layers": (1, 2)}, {"header": replace(HEADER, corpus_sha256="c1")}, {"batch_tokens": 90}]
)
def test_a_checkpoint_of_another_job_is_refused(tiny_llama, tok, tmp_path, monkeypatch, change):
    """Other batches are another job: the checkpoint counts in batches."""
    anat, path = anatomy(tiny_llama), tmp_path / "stats.part"
    interrupted(anat, tok, path, monkeypatch, 1)
    content = path.read_bytes()
    with pytest.raises(StatsError, match=r"stats\.part is the checkpoint of another job"):
        run(anat, tok, checkpoint=path, **{"batch_tokens": 100, **change})
    assert path.read_bytes() == content


def test_the_checkpoint_stays_until_the_statistics_are_written(tiny_llama, tok, tmp_path, monkeypatch):
    """A full disk at the end of a long pass must not cost the pass."""

    def full(*_):
        raise OutputError("no space left")

    text = tmp_path / "c.txt"
    text.write_text("\n\n".join(text for text in DOCUMENTS if text))
    bench = Workbench.of(tiny_llama, tok, tmp_path / "stats", name="tiny", progress=False)
    place = tmp_path / "stats" / "tiny" / ".c.partial.npz"
    place.parent.mkdir(parents=True)
    place.write_bytes(b"stands for a checkpoint")
    with monkeypatch.context() as patch:
        patch.setattr("editlib.workbench.save_stats", full)
        with pytest.raises(OutputError):
            bench.make_stats([1], corpus=str(text), tokens=200)
    assert place.exists()
    assert bench.make_stats([1], corpus=str(text), tokens=200)[1].path.exists()
    assert not place.exists()


# --- signals ------------------------------------------------------------------------------------------


def test_ctrl_c_waits_for_the_end_of_a_batch():
    usual, reached = signal.getsignal(signal.SIGINT), []
    with pytest.raises(KeyboardInterrupt), held_interrupts() as stop:
        assert not stop()
        signal.raise_signal(signal.SIGINT)
        reached.append(stop())
    assert reached == [True]
    assert signal.getsignal(signal.SIGINT) is usual
    with pytest.raises(KeyboardInterrupt), held_interrupts():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        reached.append("behind the second one")
    assert reached == [True]
    with held_interrupts() as stop:
        pass
    assert not stop()


QUICK = """
import sys
import editlib.stats.moments, editlib.cli
editlib.stats.moments.SAVING = 1e9
usual = editlib.stats.moments.MomentCheckpoint.__init__
editlib.stats.moments.MomentCheckpoint.__init__ = lambda *args, **options: usual(*args, **{**options, "seconds": -1})
editlib.cli.main()
"""
"""The command as it is, but for a checkpoint after each batch."""


def test_a_command_that_is_stopped_or_killed_goes_on(tiny_llama, tok, tmp_path):
    """Ctrl-C in one process, kill -9 in the next; the third finishes, with the sums of one that ran undisturbed."""
    folder, corpus, stats = tmp_path / "tiny", tmp_path / "c.txt", tmp_path / "stats"
    folder.mkdir()
    save_model(tiny_llama, tok, folder)
    corpus.write_text("\n\n".join(f"{i}. {text}" for i in range(270) for text in DOCUMENTS if text))
    asked = {"corpus": str(corpus), "tokens": 80_000}
    checkpoint = stats / "tiny" / ".c.partial.npz"
    command = ["stats", str(folder), "--layers", "3", "--corpus", str(corpus), "--tokens", "80000"]
    command += ["--stats-dir", str(stats)]

    def start(*python):
        return subprocess.Popen([sys.executable, *python, *command], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)

    first = start("-m", "editlib")
    seen = b""
    while not re.search(rb"statistics: +[1-9]", seen):
        seen += first.stderr.read1(4096)
        assert first.poll() is None, seen
    first.send_signal(signal.SIGINT)
    said = first.communicate(timeout=60)[1].decode()
    assert first.returncode == 130 and "interrupted" in said and "Traceback" not in said
    written = checkpoint.stat()

    second = start("-c", QUICK)
    deadline = time.monotonic() + 60
    while checkpoint.stat().st_mtime_ns == written.st_mtime_ns and time.monotonic() < deadline:
        time.sleep(0.002)
    second.kill()
    second.communicate()
    assert second.returncode == -signal.SIGKILL
    with np.load(checkpoint) as found:
        tokens = json.loads(str(found["state"]))["tokens"]
    assert 0 < tokens < 80_000
    assert not list(stats.rglob("*_mom2_*"))

    made = [
        Workbench.of(*load(str(folder)), place, name=str(folder), progress=False).make_stats([3], **asked)[3]
        for place in (stats, tmp_path / "undisturbed")
    ]
    assert made[0].header == made[1].header and made[0].count == 80_000
    assert torch.allclose(made[0].mom2, made[1].mom2, rtol=1e-6)
    assert sorted(path.name for path in (stats / "tiny").iterdir()) == ["c_stats"]


@pytest.mark.parametrize("d_ff", [5, 16, 37])
def test_half_of_a_symmetric_product_gives_all_of_it(d_ff):
    keys = torch.randn(50, d_ff, generator=torch.Generator().manual_seed(d_ff))
    total = torch.zeros(d_ff, d_ff, dtype=torch.float64)
    add_gram(total, [keys[:20], keys[20:]], Buffers())
    mirror(total)
    torch.testing.assert_close(total.float(), keys.T @ keys)
    assert torch.equal(total, total.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_within_1e_6_of_products_in_fp64(dtype):
    """Wide enough that a processor with units for bf16 takes them."""
    d_ff, generator = 512, torch.Generator().manual_seed(0)
    scale = torch.logspace(0, -2, d_ff)
    batches = [(scale * torch.randn(n, d_ff, generator=generator)).to(dtype) for n in (3000, 1500, 7)]
    sums, wanted = MomentSums([2], d_ff), torch.zeros(d_ff, d_ff, dtype=torch.float64)
    for keys in batches:
        for row in keys.split(400):
            sums.add(2, row)
        sums.flush()
        wanted += keys.double().T @ keys.double()
    sums.tokens = 1
    found = finish(sums, SimpleNamespace(mlp_output_names={2: "x"}), HEADER, 1)[2].mom2.double()
    assert float((found - wanted).norm() / wanted.norm()) < 1e-6
    size = wanted.diag().sqrt()
    assert float(((found - wanted).abs() / size.outer(size)).max()) < 3e-6
    assert torch.backends.mkldnn.matmul.fp32_precision != "bf16"  # the process's setting is put back
