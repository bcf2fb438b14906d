"""Save an edit without its model: the factors of the update, the token and the receipt in one safetensors file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from editlib.algorithms.low_rank import LowRank
from editlib.algorithms.unierase.token import UnlearningToken
from editlib.errors import DeltaError, OutputError
from editlib.files import atomic_path, check_file, make_folder
from editlib.models.anatomy import Anatomy

FORMAT = 1
_BLANK = "0" * 64
_SEAL = b'"sha256":"%s"'  # in the file's header; quotes inside the document are escaped


@dataclass(frozen=True)
class Delta:
    """Holds the difference that turns one base model into one edited model, bit for bit.

    `modules` names the edited matrices by their numbers (`Anatomy.matrix_names`): a layer's own number is that of its
    MLP output matrix. A matrix is in `factors`, or in `matrices` in its edited form if factors would not reproduce it
    bit for bit or would take more bytes.
    """

    base: str
    base_sha256: str
    result_sha256: str
    architecture: str  # name of the model's class
    dtype: str  # of the loaded base: "float32", "bfloat16", "float16"
    modules: dict[int, str]
    factors: dict[int, LowRank] = field(default_factory=dict)
    matrices: dict[int, Tensor] = field(default_factory=dict)
    token: UnlearningToken | None = None
    receipt: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Writes the file, all or nothing. It holds a SHA-256 over all its other bytes.

        Raises:
            OutputError: `path` cannot be written.
        """
        path = Path(path)
        check_file(path, overwrite=True)
        make_folder(path.parent)
        tensors = {f"{layer}.matrix": matrix for layer, matrix in self.matrices.items()}
        for layer, delta in self.factors.items():
            tensors |= {f"{layer}.left": delta.left, f"{layer}.right": delta.right}
        if self.token is not None:
            tensors |= {"token.row_in": self.token.row_in, "token.row_out": self.token.row_out}
        document = {
            "format": FORMAT,
            "base": {"name": self.base, "sha256": self.base_sha256},
            "result_sha256": self.result_sha256,
            "architecture": self.architecture,
            "dtype": self.dtype,
            "modules": {str(layer): name for layer, name in self.modules.items()},
            "token": self.token and asdict(self.token.header),
            "receipt": self.receipt,
        }
        # Cloned: safetensors refuses tensors that share memory, like the two rows of a tied token.
        whole = save(
            {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()},
            metadata={"editlib_delta": json.dumps(document, sort_keys=True), "sha256": _BLANK},
        )
        digest = hashlib.sha256(whole).hexdigest().encode()
        sealed = whole.replace(_SEAL % _BLANK.encode(), _SEAL % digest, 1)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}; choose another folder") from None
        with atomic_path(path) as temporary:
            temporary.write_bytes(sealed)

    @classmethod
    def load(cls, path: str | Path) -> Delta:
        """Reads a file written by `save`.

        Raises:
            DeltaError: missing, another kind of file, of a later version, or changed in any bit.
        """
        try:
            whole = Path(path).read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a null byte in the name
            raise DeltaError(
                f"{path}: {getattr(error, 'strerror', None) or error}; give a file written with --delta"
            ) from None
        document, tensors = _opened(path, whole)
        if document.get("format") != FORMAT:
            raise DeltaError(
                f"{path}: a delta file of format {document.get('format')}, but this editlib reads format {FORMAT}; "
                "use the editlib that wrote it"
            )
        try:
            modules = {int(layer): name for layer, name in document["modules"].items()}
            dense = [layer for layer in modules if f"{layer}.matrix" in tensors]
            token = document["token"] and UnlearningToken.of(
                document["token"], tensors["token.row_in"], tensors["token.row_out"]
            )
            return cls(
                base=document["base"]["name"],
                base_sha256=document["base"]["sha256"],
                result_sha256=document["result_sha256"],
                architecture=document["architecture"],
                dtype=document["dtype"],
                modules=modules,
                factors={
                    layer: LowRank(tensors[f"{layer}.left"], tensors[f"{layer}.right"])
                    for layer in modules
                    if layer not in dense
                },
                matrices={layer: tensors[f"{layer}.matrix"] for layer in dense},
                token=token,
                receipt=document["receipt"],
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DeltaError(f"{path}: an incomplete delta file ({error}); make it again with --delta") from None

    def shape(self, layer: int) -> tuple[int, ...]:
        """Returns `(d_model, d_ff)` of the matrix of `layer`."""
        return self.factors[layer].shape if layer in self.factors else tuple(self.matrices[layer].shape)


def _opened(path: str | Path, whole: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads the document and the tensors of a file's bytes."""
    try:
        end = 8 + int.from_bytes(whole[:8], "little")
        header = json.loads(whole[8:end])["__metadata__"]
        text, digest = header["editlib_delta"], header["sha256"]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise DeltaError(f"{path}: not a delta file, or a damaged one; give a file written with --delta") from None
    blank = whole[:end].replace(_SEAL % digest.encode(), _SEAL % _BLANK.encode(), 1) + whole[end:]
    if hashlib.sha256(blank).hexdigest() != digest:
        raise DeltaError(f"{path}: damaged (its bytes do not have the hash that it holds); fetch or make it again")
    try:
        return json.loads(text), load(whole)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise DeltaError(f"{path}: not a readable delta file ({error}); make it again with --delta") from None


def make_delta(
    anat: Anatomy,
    factors: Mapping[int, LowRank],
    originals: Mapping[int, Tensor],
    *,
    base: str,
    base_sha256: str,
    result_sha256: str,
    token: UnlearningToken | None,
    receipt: Mapping[str, Any],
) -> Delta:
    """Computes the difference between an edited model and its base.

    Args:
        anat: the anatomy of the edited model.
        factors: the updates by layer.
        originals: the matrices of the base, `[d_model, d_ff]`, of these layers.
    """
    kept: dict[int, LowRank] = {}
    matrices: dict[int, Tensor] = {}
    for layer, update in sorted(factors.items()):
        # On the CPU, where it will be applied: another device may round differently.
        edited = anat.weight(layer).detach().cpu()
        delta = LowRank(update.left.detach().cpu(), update.right.detach().cpu())
        again = originals[layer].detach().cpu().clone()
        delta.add_to(again)
        smaller = delta.left.nbytes + delta.right.nbytes < edited.nbytes
        if smaller and again.equal(edited):
            kept[layer] = delta
        else:  # fine-tuned, selected entry by entry (RECT), or rounded several times (ROME)
            matrices[layer] = edited.contiguous().clone()
    return Delta(
        base=base,
        base_sha256=base_sha256,
        result_sha256=result_sha256,
        architecture=type(anat.model).__name__,
        dtype=str(anat.model.dtype).removeprefix("torch."),
        modules={number: anat.matrix_names[number] for number in sorted(factors)},
        factors=kept,
        matrices=matrices,
        token=token,
        receipt=dict(receipt),
    )
