"""Keep one batch of a chain as one safetensors file, with everything that later batches, a replay or an audit need.

The update of each matrix by its number, a layer's for its MLP output matrix (`left.<number> [outputs, r]`,
`right.<number> [r, inputs]`; `Anatomy.matrix_names`), the requests' keys
(`keys.<layer> [d_ff, n]`), their values (`targets`, `deltas [d_model, n]`; `gate.<i> [d_model]`), and `notes`: the
requests, diagnostics and anchors' answers as JSON. If tokens were fitted to the batch, their rows too (`token.in`,
`token.out [k, d_model]`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from editlib.algorithms.edit import EditResult
from editlib.algorithms.low_rank import LowRank
from editlib.algorithms.unierase.token import UnlearningToken
from editlib.algorithms.values import Values
from editlib.chain.shape import notes_misfit
from editlib.errors import ChainError, first_line
from editlib.requests.request import EditRequest

DTYPE = torch.float32  # of updates and keys on disk; all weights are computed from these


@dataclass(frozen=True)
class Batch:
    """Holds a batch's requests, updates and keys, and the inputs to solve it again.

    Args:
        updates: this batch's own update of each layer; for PRUNE, before the spectrum of the running total is pruned.
        keys: keys of the requests by layer, `[d_ff, n]`.
        anchors: ids of the anchored retain prompts, in their order.
        answers: token ids of the anchors' answers by question; only those that no earlier batch of the chain stores.
    """

    requests: tuple[EditRequest, ...]
    updates: Mapping[int, LowRank]
    keys: Mapping[int, Tensor]
    values: Values
    anchors: tuple[str, ...]
    answers: Mapping[str, Sequence[int]]
    token: UnlearningToken | None = None  # fitted to the model after this batch
    neurons: Mapping[int, Sequence[int]] = field(default_factory=dict)  # written whole by this batch, by layer

    @classmethod
    def of(
        cls,
        result: EditResult,
        updates: Mapping[int, LowRank],
        requests: Sequence[EditRequest],
        answers: Mapping[str, Sequence[int]],
    ) -> Batch:
        """Makes a batch of an edit's result, in the dtype of the file."""
        assert result.values is not None
        return cls(
            tuple(requests),
            {layer: LowRank(_stored(update.left), _stored(update.right)) for layer, update in updates.items()},
            {layer: _stored(keys) for layer, keys in result.keys.items()},
            result.values,
            result.anchors,
            answers,
            result.token if result.token_ids else None,
            result.neurons,
        )

    def to_bytes(self) -> bytes:
        """Serialises the batch; equal content gives equal bytes."""
        gate = list(self.values.gate)
        notes = {
            "requests": [request.to_dict() for request in self.requests],
            "values": {name: getattr(self.values, name) for name in ("steps", "nll", "relative_norm")},
            "relations": gate,
            "neurons": {str(layer): list(some) for layer, some in self.neurons.items()},
            "anchors": list(self.anchors),
            "answers": {question: list(ids) for question, ids in self.answers.items()},
        }
        rows: dict[str, Tensor] = {}
        if self.token is not None:
            notes["token"] = asdict(self.token.header)
            rows = dict(zip(("token.in", "token.out"), self.token.rows(), strict=True))
        text = json.dumps(notes, sort_keys=True).encode("ascii")
        tensors = {
            "notes": torch.frombuffer(bytearray(text), dtype=torch.uint8),
            "targets": self.values.targets,
            "deltas": self.values.deltas,
            **rows,
            **{f"gate.{i}": self.values.gate[relation] for i, relation in enumerate(gate)},
            **{f"keys.{layer}": keys for layer, keys in self.keys.items()},
        }
        for layer, update in self.updates.items():
            tensors[f"right.{layer}"] = update.right
            if not _is_identity(update.left):
                tensors[f"left.{layer}"] = update.left
        # Cloned: safetensors refuses tensors that share memory, as the rows of tied tokens may.
        return save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()})

    @classmethod
    def from_bytes(cls, raw: bytes, where: str) -> Batch:
        """Reads the bytes that `to_bytes` wrote.

        Raises:
            ChainError: another kind of file; `where` names it in the message.
        """
        try:
            tensors = load(raw)
            notes = json.loads(tensors["notes"].numpy().tobytes())
            if wrong := notes_misfit(notes):
                raise TypeError(wrong)
            gate = {relation: tensors[f"gate.{i}"] for i, relation in enumerate(notes["relations"])}
            requests = tuple(EditRequest(**fields) for fields in notes["requests"])
            updates = {layer: _update(tensors, layer) for layer in _layers(tensors, "right")}
            neurons = {int(layer): some for layer, some in notes.get("neurons", {}).items()}
            values = Values(tensors["targets"], tensors["deltas"], **notes["values"], gate=gate)
            return cls(
                requests,
                updates,
                {layer: tensors[f"keys.{layer}"] for layer in _layers(tensors, "keys")},
                values,
                tuple(notes["anchors"]),
                notes["answers"],
                _token(tensors, notes),
                neurons,
            )
        except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            said = first_line(error)
            raise ChainError(f"{where}: not a batch of this version ({said}); restore it from a copy") from None


def _token(tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> UnlearningToken | None:
    if "token" not in notes:
        return None
    return UnlearningToken.of(notes["token"], tensors["token.in"], tensors["token.out"])


def _stored(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", DTYPE).contiguous()


def _is_identity(left: Tensor) -> bool:
    """Returns whether `left` is the identity: full-rank updates (RECT) are `I @ dense`, and the `I` is not written."""
    return left.shape[0] == left.shape[1] and torch.equal(left, torch.eye(len(left), dtype=left.dtype))


def _update(tensors: Mapping[str, Any], layer: int) -> LowRank:
    right = tensors[f"right.{layer}"]
    return LowRank(tensors[f"left.{layer}"], right) if f"left.{layer}" in tensors else LowRank.full(right)


def _layers(tensors: Mapping[str, Any], kind: str) -> list[int]:
    return sorted(int(name.partition(".")[2]) for name in tensors if name.startswith(f"{kind}."))
