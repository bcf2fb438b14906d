"""One batch of a chain: everything a later batch, a replay or an audit needs of an edit, as one safetensors file.

The update of each layer (`left.<layer> [d_model, r]`, `right.<layer> [r, d_ff]`), the requests' keys
(`keys.<layer> [d_ff, n]`), their target states (`targets`, `deltas [d_model, n]`; `gate.<i> [d_model]`), and `notes`:
requests, numbers and the anchors' answers as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from editlib.algorithms.edit import EditResult
from editlib.algorithms.low_rank import LowRank
from editlib.algorithms.values import Values
from editlib.errors import ChainError
from editlib.requests.request import EditRequest

DTYPE = torch.float32  # of updates and keys on disk, and so of all that is computed from them


@dataclass(frozen=True)
class Batch:
    """`updates` are this batch's own (of PRUNE: before the spectrum of all together is cut), `anchors` the ids of the
    retain prompts held in place, in their order, and `answers` what stands behind them, as token ids by question, where
    no earlier batch of the chain says it."""

    requests: tuple[EditRequest, ...]
    updates: Mapping[int, LowRank]
    keys: Mapping[int, Tensor]
    values: Values
    anchors: tuple[str, ...]
    answers: Mapping[str, Sequence[int]]

    @classmethod
    def of(
        cls,
        result: EditResult,
        updates: Mapping[int, LowRank],
        requests: Sequence[EditRequest],
        answers: Mapping[str, Sequence[int]],
    ) -> Batch:
        """What an edit left, in the precision that is kept."""
        assert result.values is not None
        return cls(
            tuple(requests),
            {layer: LowRank(_kept(one.left), _kept(one.right)) for layer, one in updates.items()},
            {layer: _kept(keys) for layer, keys in result.keys.items()},
            result.values,
            result.anchors,
            answers,
        )

    def to_bytes(self) -> bytes:
        """The file, the same for the same content."""
        gate = list(self.values.gate)
        notes = {
            "requests": [request.to_dict() for request in self.requests],
            "values": {name: getattr(self.values, name) for name in ("steps", "nll", "relative_norm")},
            "relations": gate,
            "anchors": list(self.anchors),
            "answers": {question: list(ids) for question, ids in self.answers.items()},
        }
        text = json.dumps(notes, sort_keys=True).encode("ascii")
        tensors = {
            "notes": torch.frombuffer(bytearray(text), dtype=torch.uint8),
            "targets": self.values.targets,
            "deltas": self.values.deltas,
            **{f"gate.{i}": self.values.gate[relation] for i, relation in enumerate(gate)},
            **{f"keys.{layer}": keys for layer, keys in self.keys.items()},
        }
        for layer, update in self.updates.items():
            tensors[f"right.{layer}"] = update.right
            if not _is_identity(update.left):
                tensors[f"left.{layer}"] = update.left
        return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})

    @classmethod
    def from_bytes(cls, raw: bytes, where: str) -> Batch:
        """Reads what `to_bytes` wrote.

        Raises:
            ChainError: it is another kind of file; `where` names it.
        """
        try:
            tensors = load(raw)
            notes = json.loads(tensors["notes"].numpy().tobytes())
            gate = {relation: tensors[f"gate.{i}"] for i, relation in enumerate(notes["relations"])}
            requests = tuple(EditRequest(**fields) for fields in notes["requests"])
            values = Values(tensors["targets"], tensors["deltas"], **notes["values"], gate=gate)
            return cls(
                requests,
                {layer: _update(tensors, layer) for layer in _layers(tensors, "right")},
                {layer: tensors[f"keys.{layer}"] for layer in _layers(tensors, "keys")},
                values,
                tuple(notes["anchors"]),
                notes["answers"],
            )
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ChainError(f"{where}: not a batch of this version ({error}); restore it from a copy") from None


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", DTYPE).contiguous()


def _is_identity(left: Tensor) -> bool:
    """Updates of no low rank (RECT) come as `I @ dense`; the `I` is not written."""
    return left.shape[0] == left.shape[1] and torch.equal(left, torch.eye(len(left), dtype=left.dtype))


def _update(tensors: Mapping[str, Any], layer: int) -> LowRank:
    right = tensors[f"right.{layer}"]
    return LowRank(tensors[f"left.{layer}"], right) if f"left.{layer}" in tensors else LowRank.full(right)


def _layers(tensors: Mapping[str, Any], kind: str) -> list[int]:
    return sorted(int(name.partition(".")[2]) for name in tensors if name.startswith(f"{kind}."))
