"""What a chain holds, in words and numbers."""

from __future__ import annotations

from typing import Any

from editlib.chain.record import ChainRecord
from editlib.chain.store import Store


def summary(store: Store, record: ChainRecord) -> dict[str, Any]:
    """JSON-ready: what the chain is made of, and per batch who was asked about, when, and how large the change was.

    `ratio` is the norm of a batch's update over the norm of the weight before, in the layer where that is largest.
    """
    batches = [
        {
            "number": entry.number,
            "time": entry.time,
            "editlib": entry.editlib,
            "ids": list(entry.ids),
            "keys": entry.keys,
            "ratio": max(float(layer["ratio"]) for layer in entry.layers.values()),
            "file": entry.file,
            "bytes": store.size(entry),
        }
        for entry in record.batches
    ]
    return {
        "path": str(store.path),
        "created": record.created,
        "base": {key: record.base[key] for key in ("name", "sha256", "dtype")},
        "algorithm": record.algorithm,
        "layers": sorted(int(layer) for layer in record.base["layers"]),
        "seed": record.seed,
        "requests": len(record.ids),
        "bytes": sum(batch["bytes"] for batch in batches),
        "batches": batches,
        "revoked": [{"time": one.time, "ids": list(one.ids), "batches": list(one.batches)} for one in record.revoked],
    }
