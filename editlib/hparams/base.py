"""Define the settings shared by all algorithms: which matrices to edit, and how values are found."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_type_hints

from editlib.errors import HparamsError, nearest
from editlib.hparams.published import FAMILY_KEYS, as_ours
from editlib.settings import checked, invalid, read_settings, setting

logger = logging.getLogger(__name__)

_ABOUT = frozenset({"unused", "source"})  # fields that are not keys of a file

Self = TypeVar("Self", bound="HyperParams")


@dataclass(frozen=True, kw_only=True)
class HyperParams:
    """Holds the keys of every algorithm: which matrices to edit, and the origin of the settings.

    `layers` has no default, since it depends on the model. Published files name modules by templates, which may be left
    out; they are compared with the modules of the model.

    Raises:
        HparamsError: a value of the wrong type or out of range; quotes it and the allowed values.
    """

    algorithm: ClassVar[str] = ""
    paper: ClassVar[str] = ""  # its source, usually the arXiv number
    summary: ClassVar[str] = ""  # its method in one line

    # Traits of the algorithm, so that no caller asks for its class.
    procedure: ClassVar[str] = ""  # the algorithm whose function applies these settings; MEMIT's serves its relatives
    takes_retain: ClassVar[bool] = False  # takes retain prompts
    chainable: ClassVar[bool] = True  # its values can be stored and replayed, which a chain needs
    has_target: ClassVar[bool] = True  # edits towards a request's `target_new`
    takes_batches: ClassVar[bool] = True  # edits several requests at once
    values_first: ClassVar[bool] = False  # finds the values of a whole batch before any weight changes
    refits_totals: ClassVar[bool] = False  # prunes the sum of all edits so far, not only its own

    layers: list[int] = setting(help="decoder layers to edit, rising, counted from 0", min=0, depth=True)
    model_name: str | None = setting(None, "the model that these settings are for")
    rewrite_module_tmp: str | None = setting(
        None, 'name of the edited matrix, "{}" for the layer\'s number; none: found in the model'
    )
    layer_module_tmp: str | None = setting(
        None, 'name of a decoder layer, "{}" for its number; none: found in the model'
    )
    mlp_module_tmp: str | None = setting(None, 'name of an MLP, "{}" for the layer\'s number; none: found in the model')
    notes: dict | str = setting("", "free text, such as the origin of the settings")
    unused: dict = field(
        default_factory=dict, repr=False, compare=False, metadata={"help": "published keys that are not used"}
    )
    source: str = field(
        default="", repr=False, compare=False, metadata={"help": "origin of the settings, for receipts"}
    )

    @property
    def edited_layers(self) -> list[int]:
        """The layers whose matrices an edit writes, rising."""
        return list(self.layers)

    @property
    def statistics_layers(self) -> list[int]:
        """The layers whose statistics an edit reads."""
        return list(self.layers)

    @property
    def neuron_layers(self) -> list[int]:
        """The layers in which an edit writes whole neurons: rows of the MLP input matrices, too."""
        return []

    @property
    def uses_statistics(self) -> bool:
        """Whether an edit reads layer statistics."""
        return True

    @property
    def decomposition(self) -> Literal["spectrum", "factor"]:
        """The decomposition of a second moment that a solve needs: all eigenvectors, or a Cholesky factor."""
        return "factor"

    @property
    def trained_steps(self) -> int:
        """Largest number of gradient steps on weights; 0: an edit solves for them."""
        return 0

    @property
    def refuses(self) -> bool:
        """Whether an edit replaces the answer by a refusal."""
        return False

    @property
    def uses_token(self) -> bool:
        """Whether an edit writes the unlearning token into the model."""
        return False

    @property
    def holds_anchors(self) -> bool:
        """Whether an edit uses the keys of retain prompts as constraints."""
        return False

    @property
    def gate_at(self) -> int | None:
        """The layer of the answer gate; `None` without one."""
        return None

    @property
    def lookup_place(self) -> str:
        """The token of a prompt whose state an edit changes, as `fact_token` names it; "last": needs no subject."""
        return "last"

    @property
    def values_from_rows(self) -> bool:
        """Whether values are found from rows, which erase the answer, instead of by descent."""
        return False

    @property
    def wanted_statistics(self) -> dict[str, Any]:
        """Which statistics are preferred: arguments of `Workbench.find_or_make_stats`."""
        return {}

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for item in fields(self):
            value = checked(item.name, getattr(self, item.name), hints[item.name], item.metadata)
            object.__setattr__(self, item.name, value)  # 10 becomes 10.0 for a float
        self.check()

    def check(self) -> None:
        """Checks conditions on several fields; subclasses add their own and call this method."""
        if not self.layers or any(a >= b for a, b in pairwise(self.layers)):
            raise invalid("layers", self.layers, "at least one, rising, none twice", "sort the list")
        for name in ("rewrite_module_tmp", "layer_module_tmp", "mlp_module_tmp"):
            value = getattr(self, name)
            if value is not None and value.count("{}") != 1:
                raise invalid(name, value, 'one "{}" in the layer\'s place', "or leave the key out")

    @classmethod
    def depth_fields(cls) -> list[str]:
        """Names the fields that hold layer numbers, whose values fit models of one depth only."""
        return [item.name for item in fields(cls) if item.metadata.get("depth")]

    def check_depth(self, n_layers: int) -> None:
        """Raises `HparamsError` for a layer number of `n_layers` or more; needs no model."""
        for name in self.depth_fields():
            value = getattr(self, name)
            outside = [layer for layer in (value if isinstance(value, list) else [value or 0]) if layer >= n_layers]
            if outside:
                raise HparamsError(
                    f'key "{name}": layer {outside[0]} was asked for, but the model has layers 0-{n_layers - 1}: these '
                    "settings are for a model of another depth; change it, or leave --hparams out and some are found"
                )

    @classmethod
    def from_dict(cls: type[Self], values: Mapping[str, Any], where: str = "hparams") -> Self:
        """Builds settings from published keys; keys of the ROME family that are not used go to `unused`.

        Raises:
            HparamsError: an unknown or missing key, or an invalid value; starts with `where`.
        """
        try:
            values, idle = as_ours(values)
        except HparamsError as error:
            raise HparamsError(f"{where}: {error}") from None
        names = [item.name for item in fields(cls) if item.name not in _ABOUT]
        for key in values:
            if key not in names and key not in FAMILY_KEYS | CLOSED_FORM_KEYS:
                near = nearest(str(key), names, FAMILY_KEYS)
                raise HparamsError(f'{where}: key "{key}": unknown; expected {near}; rename it, or remove it')
        for item in fields(cls):
            if item.name not in values and item.default is item.default_factory is MISSING:
                wanted = item.metadata["help"]
                raise HparamsError(f'{where}: key "{item.name}": missing; expected {wanted}; add it')
        unused = idle | {key: value for key, value in values.items() if key not in names}
        if named := [key for key in unused if key != "alg_name"]:  # `alg_name` chose the algorithm
            logger.info("%s: not used by %s: %s", where, cls.algorithm or cls.__name__, ", ".join(named))
        try:
            return cls(**{key: value for key, value in values.items() if key in names}, unused=unused, source=where)
        except HparamsError as error:
            raise HparamsError(f"{where}: {error}") from None

    @classmethod
    def from_json(cls: type[Self], path: str | Path) -> Self:
        """Reads one flat JSON or YAML object.

        Raises:
            HparamsError: the file cannot be read, or see `from_dict`.
        """
        return cls.from_dict(read_settings(path), str(path))

    def to_dict(self) -> dict[str, Any]:
        """Returns all keys with their values, for JSON and `from_dict`; without `unused` and `source`."""
        return {key: value for key, value in asdict(self).items() if key not in _ABOUT}


@dataclass(frozen=True, kw_only=True)
class ClosedFormHyperParams(HyperParams):
    """Holds the keys of the closed-form edits: how a request's value is found, and which layer statistics are used.

    Values are found by gradient steps (`v_*`, `kl_factor`, `clamp_norm_factor`); `mom2_*` name the layer statistics.
    Keys and values are averaged over context templates. Without `context_templates` the model generates them: MEMIT's
    five, or those of `context_template_length_params` (ROME's pairs of length and number).
    """

    plain_share: ClassVar[float | None] = None
    """Weight of the plain prompt in a request's mean key; none: the same as that of each context template."""

    fact_token: str = setting(
        "subject_last",
        "the lookup position: the token whose hidden state is edited",
        choices=("subject_last", "last", "subject_first", "subject_first_after_last"),
    )
    context_templates: list[str] | None = setting(
        None, 'texts around the prompt, "{}" in its place, the plain "{}" first; none: the model generates them'
    )
    context_template_length_params: list[list[int]] | None = setting(
        None, "pairs of length in tokens and number of the generated context templates; none: MEMIT's five", min=0
    )
    v_optimizer: str = setting(
        "adam",
        'optimiser of a value; "normalised" is gradient descent with steps of a fixed length',
        choices=("adam", "normalised"),
    )
    v_precision: str = setting(
        "model",
        'dtype of the passes that find values: the model\'s, or "fast": bf16 if the processor is faster in it',
        choices=("model", "fast"),
    )
    v_num_grad_steps: int = setting(25, "largest number of gradient steps for a value", min=1)
    v_lr: float = setting(
        0.5, "Adam's learning rate, or the length of a normalised step in norms of the hidden state", above=0
    )
    v_loss_layer: int | None = setting(
        None, "layer whose output enters the loss; none: the last, the only one supported", min=0, depth=True
    )
    v_weight_decay: float = setting(0.5, "weight in the loss of the norm of the change to the hidden state", min=0)
    clamp_norm_factor: float = setting(
        4.0, "largest norm of the change to the hidden state, in norms of the hidden state", above=0
    )
    kl_factor: float = setting(
        0.0625, "weight of the KL term, which preserves predictions about the subject in general", min=0
    )
    early_stop_loss: float = setting(
        0.05, "a value is done when the NLL of its target is below this (nats per token)", min=0
    )
    rescale_norm: bool = setting(
        False, "scale a value to the norm that the hidden state had before the edit (NAS, 2602.02543)"
    )
    mom2_dataset: str | None = setting(
        None, "corpus whose layer statistics are preferred; none: those over the most tokens"
    )
    mom2_n_samples: int | None = setting(
        None, "number of texts in the layer statistics, to choose between several files", min=1
    )
    mom2_dtype: str = setting("float32", "dtype of the layer statistics' files", choices=("float32",))

    @property
    def lookup_place(self) -> str:
        return self.fact_token

    @property
    def wanted_statistics(self) -> dict[str, Any]:
        return {"dataset": self.mom2_dataset, "samples": self.mom2_n_samples}

    def check_depth(self, n_layers: int) -> None:
        super().check_depth(n_layers)
        if self.v_loss_layer not in (None, n_layers - 1):
            raise HparamsError(
                f"v_loss_layer is {self.v_loss_layer}; the loss is read after the last layer, {n_layers - 1}, of this "
                "model: these settings are for a model of another depth, or leave the key out"
            )

    def check(self) -> None:
        super().check()
        if self.context_templates is not None:
            self.check_templates("context_templates")
        for length, _ in self.context_template_length_params or []:
            if length < 1:
                raise invalid("context_template_length_params", length, "lengths of at least 1")

    def check_templates(self, name: str) -> None:
        """Raises `HparamsError` unless the field `name` lists texts with one "{}" each."""
        texts = getattr(self, name)
        if not texts or any(text.count("{}") != 1 for text in texts):
            raise invalid(name, texts, 'texts with one "{}" each')


CLOSED_FORM_KEYS = frozenset(item.name for item in fields(ClosedFormHyperParams)) - _ABOUT
"""Keys that files of the ROME family may hold, whether an algorithm uses them or not."""
