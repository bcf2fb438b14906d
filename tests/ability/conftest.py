"""A base and an edited tiny model as folders, and files of questions."""

from __future__ import annotations

import copy

import pytest
import torch
from questions import CHOICES, CONTINUATIONS, write_lines

from editlib.models.weights import save_model


@pytest.fixture
def lambada(tmp_path):
    return write_lines(tmp_path / "lambada.jsonl", CONTINUATIONS)


@pytest.fixture
def arc(tmp_path):
    return write_lines(tmp_path / "arc.jsonl", CHOICES)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "prose.txt"
    lines = [row["context"].replace("\n", " ") + " the sea, the river and the president." for row in CONTINUATIONS]
    path.write_text("\n\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def saved(pristine, pristine_toks, tmp_path_factory):
    """`{"base": folder, "edited": folder}`: the same small model, one matrix of the second is other."""
    folders = {}
    model = copy.deepcopy(pristine["llama"])
    for name in ("base", "edited"):
        folders[name] = tmp_path_factory.mktemp(name)
        save_model(model, copy.deepcopy(pristine_toks["plain"]), folders[name])
        with torch.no_grad():
            weight = model.model.layers[2].mlp.down_proj.weight
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    return folders
