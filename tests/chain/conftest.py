"""A tiny base model with statistics and a token, made once, and chains of it."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from chain_cases import HPARAMS, hparams_of
from tiny_models import make_llama, train_tokenizer

from editlib.algorithms.unierase import finding, held_places, refusal_tokens
from editlib.algorithms.unierase.token import TokenHeader, UnlearningToken
from editlib.chain import Chain
from editlib.models.anatomy import anatomy
from editlib.models.weights import save_model, weights_sha256
from editlib.stats.file import LayerStats, StatsHeader
from editlib.stats.store import save_stats
from editlib.workbench import Workbench


@pytest.fixture(autouse=True)
def little_text(monkeypatch):
    """Refusal tokens are fitted to little text, in few steps: no test here looks at where they are generated."""
    monkeypatch.setattr(finding, "GENERAL_STEP", 100)
    for name in ("TEXTS", "TEXT_TOKENS", "BEGINNINGS"):
        monkeypatch.setattr(held_places, name, 4)
    monkeypatch.setattr(refusal_tokens, "PLACE_STEPS", 20)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A folder with `tiny/` (the model), `stats/` and `token.safetensors`; not to be changed."""
    home = tmp_path_factory.mktemp("base")
    model = make_llama()
    (home / "tiny").mkdir()
    save_model(model, train_tokenizer(), home / "tiny")
    anat, sha256 = anatomy(model), weights_sha256(model)
    generator = torch.Generator().manual_seed(7)
    for layer in (1, 2):
        keys = torch.randn(anat.d_ff, 400, generator=generator)
        header = StatsHeader(
            str(home / "tiny"), anat.mlp_output_names[layer], anat.d_ff, 400, 4, "drawn", "", 64, 0, 0, sha256
        )
        save_stats(home / "stats", LayerStats(keys @ keys.T, 400, 4, header))
    row = 0.1 * torch.randn(32, generator=generator)
    UnlearningToken(row, row, TokenHeader("[UNL]", "tiny", sha256, 0, 0, 0)).save(home / "token.safetensors")
    return home


@pytest.fixture(scope="session")
def loaded(base):
    """The base model as loaded; not to be changed."""
    return Workbench.load(str(base / "tiny"), base / "stats", progress=False)


@pytest.fixture
def bench(loaded):
    """The base model, to change at will."""
    return copy.deepcopy(loaded)


@pytest.fixture
def start(base, bench, tmp_path):
    """`start(algorithm, name="chain")` -> a new chain whose clock ticks from zero; `again(chain)` opens it anew."""

    def make(algorithm, name="chain", **options):
        if hparams_of(algorithm).uses_token:
            options = {"token": base / "token.safetensors", **options}
        ticks = itertools.count()
        return Chain.create(
            tmp_path / name, copy.deepcopy(bench), hparams_of(algorithm), clock=lambda: f"t{next(ticks)}", **options
        )

    return make


@pytest.fixture
def again(loaded):
    """Another process in all but name: a fresh model, and nothing but the folder."""

    def open_anew(chain, **options):
        return Chain.open(chain.path, copy.deepcopy(loaded), **options)

    return open_anew


@pytest.fixture(params=[name for name in HPARAMS if name not in ("EMMET", "NAS")])
def algorithm(request):
    """Those that can be chained, in turn, but for two that differ from MEMIT in their solve only."""
    return request.param
