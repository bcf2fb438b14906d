"""Apply a delta file to its base model."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editlib.algorithms.edit import restore
from editlib.errors import DeltaError
from editlib.export.delta import Delta
from editlib.export.folder import save_edited
from editlib.files import check_output, check_room
from editlib.models.anatomy import Anatomy, anatomy
from editlib.models.loading import DTYPES
from editlib.models.outline import load_checked
from editlib.models.weights import stored_bytes, weights_sha256


def apply_delta_file(base: str, delta_file: str | Path, out: str | Path, *, overwrite: bool = False) -> Delta:
    """Applies the edit in `delta_file` to the model `base` and writes to `out` the same folder as the edit, with its
    receipt.

    Raises:
        DeltaError: a damaged file, or one of another base; nothing is written then.
        ModelError, OutputError: the base cannot be loaded, or `out` cannot be written.
    """
    check_output(Path(out), overwrite=overwrite, inputs=(base, delta_file))
    delta = Delta.load(delta_file)
    model, tok = load_base(base, delta)
    check_room(Path(out), stored_bytes(model))
    apply_delta(model, tok, delta)
    save_edited(model, tok, Path(out), delta.receipt, overwrite=overwrite)
    return delta


def load_base(base: str, delta: Delta) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads the model `base` in the dtype of the edit, and its tokenizer; see `check_base`.

    Raises:
        ModelError: it cannot be loaded.
    """
    return load_checked(
        base,
        lambda outline: check_kind(outline.model, delta, base),
        dtype=delta.dtype if delta.dtype in DTYPES else None,
    )


def apply_delta(model: PreTrainedModel, tok: PreTrainedTokenizerBase, delta: Delta) -> None:
    """Edits `model` in place, and adds the token to `tok` if the edit has one. Each matrix is summed in the dtype of
    the factors and rounded once, starting from the base.

    Raises:
        DeltaError: another model, or a sum that is rounded differently on this machine. The matrices are then
            unchanged, but an added token stays.
    """
    anat = anatomy(model)
    check_base(anat, delta, model.name_or_path)
    if delta.token is not None:
        delta.token.add_to(model, tok)
    originals: dict[int, Tensor] = {layer: anat.weight(layer).clone() for layer in delta.modules}
    for layer, update in delta.factors.items():
        update.add_to(anat.weight(layer))
    for layer, matrix in delta.matrices.items():
        anat.weight(layer).copy_(matrix)
    sha256 = weights_sha256(model)
    if sha256 != delta.result_sha256:
        restore(anat, originals)
        raise DeltaError(
            f"the result has hash {sha256[:12]}, expected {delta.result_sha256[:12]}: this machine rounds differently "
            "from the one that made the edit; apply it there, or on the CPU"
        )


def check_base(anat: Anatomy, delta: Delta, name: str | None) -> None:
    """Raises `DeltaError` if a model is not the one from which `delta` was made."""
    name = name or "this model"
    check_kind(anat.model, delta, name)
    for layer, module in delta.modules.items():
        known = layer < len(anat.matrix_names)
        here = anat.matrix_names[layer] if known else "none"
        shape = tuple(anat.weight(layer).shape) if known else ()
        if (here, shape) != (module, delta.shape(layer)):
            raise DeltaError(
                f"the delta changes {module} {_by(delta.shape(layer))} of {delta.base}, but layer {layer} of {name} "
                f"has {here} {_by(shape)}; give the model that was edited"
            )
    dtype = str(anat.model.dtype).removeprefix("torch.")
    if dtype != delta.dtype:
        raise DeltaError(
            f"{name} is loaded in {dtype}, but the delta was made from {delta.base} in {delta.dtype}; load it so"
        )
    sha256 = weights_sha256(anat.model)
    if sha256 != delta.base_sha256:
        raise DeltaError(
            f"the delta was made from {delta.base} in {delta.dtype}, hash {delta.base_sha256[:12]}, but {name} has "
            f"hash {sha256[:12]}: other weights, or the same in another dtype; give the model that was edited"
        )


def check_kind(model: PreTrainedModel, delta: Delta, name: str) -> None:
    """Raises `DeltaError` if a model, perhaps without weights, has another architecture than that of `delta`."""
    kind = type(model).__name__
    if kind != delta.architecture:
        raise DeltaError(f"the delta belongs to a {delta.architecture} ({delta.base}), but {name} is a {kind}")


def _by(shape: tuple[int, ...]) -> str:
    return f"({' x '.join(map(str, shape))})"
