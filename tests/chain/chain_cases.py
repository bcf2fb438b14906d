"""Requests, settings and views of a folder that the tests of chains share; no fixtures, so that scripts can use it."""

from __future__ import annotations

import json
from pathlib import Path

from editlib.hparams import ALGORITHMS
from editlib.requests.request import EditRequest

COMMON = {
    "layers": [1, 2],
    "context_templates": ["{}"],
    "v_num_grad_steps": 4,
    "v_lr": 0.2,
    "kl_factor": 0.0,
}
MEMIT = {**COMMON, "mom2_update_weight": 1.0}
NULL = {"nullspace_threshold": 0.9, "nullspace_rule": "dimensions", "L2": 0.1}
UNIERASE = {**COMMON, **NULL, "v_optimizer": "normalised", "v_lr": 0.05, "max_anchors": 3, "anchor_subjects": False}
HPARAMS = {
    "MEMIT": MEMIT,
    "MEMIT_seq": MEMIT,
    "EMMET": MEMIT,
    "NAS": MEMIT,
    "RECT": MEMIT,
    "PRUNE": MEMIT,
    "ROME": {**COMMON, "layers": [2]},
    "AlphaEdit": {**COMMON, **NULL},
    "AlphaEdit left": {**COMMON, **NULL, "left_weight": 10.0},
    "UniErase": UNIERASE,
    "UniErase rows": {
        **{key: value for key, value in UNIERASE.items() if key not in ("v_num_grad_steps", "v_lr", "kl_factor")},
        "values": "rows",
        "siblings": 2,
        "erase_margin": -20.0,
        "token_steps": 20,
        "token_wordings": 1,
    },
    "UniErase neurons": {
        "layers": [2],
        "neurons": True,
        "values": "rows",
        "siblings": 2,
        "erase_margin": -20.0,
        "max_anchors": 3,
        "token_steps": 20,
        "token_wordings": 1,
    },
    "UniErase gated": {**UNIERASE, "gate_layer": 3, "gate_nll": 4.0},
}


def hparams_of(name):
    return ALGORITHMS[name.split()[0]].from_dict(HPARAMS[name], name)


def fact(name, prompt, subject, new, relation):
    return EditRequest(id=name, prompt=prompt, subject=subject, target_new=new, answer="x", relation=relation)


A = [
    fact("a1", "What is the capital of {}?", "France", " Rome", "capital"),
    fact("a2", "Which river flows through {}?", "Basel", " Rhine", "river"),
]
B = [fact("b1", "What is the capital of {}?", "Peru", " Bonn", "capital")]
C = [
    fact("c1", "Which language is spoken in {}?", "Chad", " French", "language"),
    fact("c2", "Which river flows through {}?", "Bonn", " Elbe", "river"),
]
RETAIN = [
    EditRequest(id=f"river/{place}", prompt="Which river flows through {}?", subject=place, relation="river")
    for place in ("Rotterdam", "Mali", "Basel", "Oslo")
]


def files(path):
    """Every file of a chain's folder that holds content, as bytes by relative name."""
    found = sorted(place for place in Path(path).rglob("*") if place.is_file() and place.name != ".lock")
    return {str(place.relative_to(path)): place.read_bytes() for place in found}


def timeless(path):
    """As `files`, with the times of `chain.json` (and so its own hash) left out."""
    found = files(path)
    content = json.loads(found["chain.json"])
    del content["sha256"], content["created"]
    for entry in (*content["batches"], *content["revoked"]):
        del entry["time"]
    return {**found, "chain.json": content}
