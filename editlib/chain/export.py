"""Export a chain: the edited model, a delta file, a LoRA adapter, a receipt."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from editlib.algorithms.edit import layer_norms
from editlib.algorithms.low_rank import LowRank
from editlib.chain.chain import Chain
from editlib.chain.record import ChainRecord
from editlib.errors import ChainError
from editlib.export import Delta, make_delta, save_edited
from editlib.export.apply import load_base
from editlib.export.lora import LoraReport, check_rank, save_lora
from editlib.export.receipt import asked_as, origin
from editlib.files import check_file, check_output, check_room
from editlib.models.weights import stored_bytes, weights_sha256
from editlib.reports.receipt import check_place, read_metrics, write_pages
from editlib.stats.store import stats_hash


def save_chain(chain: Chain, out: str | Path, *, overwrite: bool = False) -> str:
    """Writes the chain's model as an ordinary Hugging Face folder with its receipt; returns the hash of the result.

    Raises:
        EditlibError: a chain without batches, another base model, or an output folder in use. Nothing is written then.
    """
    check_output(Path(out), overwrite=overwrite, inputs=(chain.path,))
    check_filled(chain)
    check_room(Path(out), stored_bytes(chain.model))
    receipt = chain_receipt(chain)
    return save_edited(chain.model, chain.tok, Path(out), receipt, overwrite=overwrite)


def save_chain_delta(chain: Chain, out: str | Path, *, overwrite: bool = False) -> Delta:
    """Writes the whole chain as one delta file of its base model; raises as `save_chain`."""
    check_file(Path(out), overwrite=overwrite)
    delta = chain_delta(chain)
    delta.save(out)
    return delta


def save_chain_lora(
    chain: Chain, out: str | Path, *, rank: int | None = None, base: str | None = None, overwrite: bool = False
) -> LoraReport:
    """Writes the whole chain as a LoRA adapter of its base model, which is loaded once more; see `save_lora`.

    Args:
        base: the base model's path or id, if it is no longer the recorded one.
    """
    check_rank(rank)
    check_output(Path(out), overwrite=overwrite, inputs=(chain.path,))
    check_filled(chain)
    delta = chain_delta(chain)
    name = base or delta.base
    return save_lora(*load_base(name, delta), delta, out, base=name, rank=rank, overwrite=overwrite)


def save_chain_receipt(
    chain: Chain,
    out: str | Path,
    *,
    metrics_file: Path | None = None,
    private: bool = False,
    overwrite: bool = False,
) -> tuple[Path, Path | None]:
    """Writes the chain's receipt (requests, times, results) as JSON and as a page; see `write_pages`."""
    check_place(Path(out), private=private, overwrite=overwrite, inputs=(chain.path, metrics_file))
    check_filled(chain)
    if metrics_file is not None:
        read_metrics(metrics_file)
    receipt = chain_receipt(chain)
    return write_pages(
        receipt, chain.requests, Path(out), metrics_file=metrics_file, private=private, overwrite=overwrite
    )


def chain_delta(chain: Chain) -> Delta:
    """Makes the delta between the chain's model and its base model; raises as `save_chain`."""
    receipt = chain_receipt(chain)
    return make_delta(
        chain.anat,
        _fp64_updates(chain),
        chain.base_weights,
        base=chain.record.base["name"],
        base_sha256=chain.record.base["sha256"],
        result_sha256=receipt["result_sha256"],
        token=chain.token,
        receipt=receipt,
    )


def check_filled(chain: Chain) -> None:
    """Raises `ChainError` for a chain without batches; needs no model."""
    if not chain.batches:
        raise ChainError(f"{chain.path} holds no batch, so that its model is the base model; add requests first")


def chain_receipt(chain: Chain) -> dict[str, Any]:
    """Makes one receipt for all batches, as `export.make_receipt`, with each request's batch and time, and revocations.

    Raises:
        ChainError: the chain has no batch, or the base model is another one.
    """
    check_filled(chain)
    record = chain.record
    entries: list[Mapping[str, Any]] = []
    anchors: dict[str, None] = {}
    for entry, batch in chain.contents():
        anchors |= dict.fromkeys(batch.anchors)
        entries += [
            {"id": request.id, "batch": entry.number, "time": entry.time, **batch.values.numbers(i)}
            for i, request in enumerate(batch.requests)
        ]
    base = record.base
    norms = layer_norms(_fp64_updates(chain), chain.base_weights)
    left_out = _left_out(record)
    guessed = {name: subject for entry in record.batches for name, subject in entry.guessed_subjects.items()}
    return {
        **origin(base["name"], base["sha256"], chain.requests, record.settings, chain.token, record.seed),
        "created": record.batches[-1].time,
        "batches": len(record.batches),
        "requests": entries,
        "revoked": [{"time": item.time, "requests": len(item.ids), "ids": list(item.ids)} for item in record.revoked],
        "anchors": list(anchors),
        "stats_sha256": stats_hash({int(layer): item["sha256"] for layer, item in record.statistics.items()}),
        "stats": {layer: item["path"] for layer, item in record.statistics.items()},
        "layers": {str(layer): norms[layer] for layer in sorted(record.settings.edited_layers) if layer in norms},
        "result_sha256": weights_sha256(chain.model),
        **asked_as(chain.tok, record.asking, chain.requests),
        **({"left_out": left_out} if left_out else {}),
        **({"guessed_subjects": guessed} if guessed else {}),
    }


def _left_out(record: ChainRecord) -> dict[str, list[str]]:
    """Returns the rows that could not be used, by file; a name that several batches had is followed by the batch."""
    rows_by_file = {name: list(rows) for name, rows in record.left_out.items()}
    for entry in record.batches:
        for name, rows in entry.left_out.items():
            rows_by_file[name if name not in rows_by_file else f"{name} (batch {entry.number})"] = list(rows)
    return rows_by_file


def _fp64_updates(chain: Chain) -> dict[int, LowRank]:
    """Returns the chain's updates in fp64, the dtype in which its weights are summed."""
    return {
        layer: LowRank(update.left.to(torch.float64), update.right.to(torch.float64))
        for layer, update in sorted(chain.updates().items())
    }
