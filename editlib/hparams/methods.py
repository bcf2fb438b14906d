"""Define the settings of each algorithm: its own keys on top of the shared ones, with the published defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, TypeGuard

from editlib.hparams.base import ClosedFormHyperParams, HyperParams
from editlib.settings import invalid, setting


@dataclass(frozen=True, kw_only=True)
class FTHyperParams(HyperParams):
    """Holds the keys of constrained fine-tuning (Zhu et al., 2012.00363), the ROME paper's FT+L: one matrix per layer,
    each of its entries changed by at most `norm_constraint`."""

    algorithm: ClassVar[str] = "FT"
    paper: ClassVar[str] = "2012.00363"
    summary: ClassVar[str] = "constrained fine-tuning of one matrix, the usual baseline"
    procedure: ClassVar[str] = "FT"
    chainable: ClassVar[bool] = False

    num_steps: int = setting(25, "largest number of passes over the requests", min=1)
    lr: float = setting(5e-4, "Adam's learning rate", above=0)
    weight_decay: float = setting(0.0, "Adam's weight decay", min=0)
    norm_constraint: float | None = setting(5e-4, "largest change to an entry of the matrix; none: no limit", above=0)
    batch_size: int = setting(64, "requests per gradient step", min=1)
    early_stop_loss: float = setting(0.01, "training stops when the mean NLL over a pass is below this", min=0)

    @property
    def uses_statistics(self) -> bool:
        return False

    @property
    def trained_steps(self) -> int:
        return self.num_steps


@dataclass(frozen=True, kw_only=True)
class ROMEHyperParams(ClosedFormHyperParams):
    """Holds the keys of ROME (2202.05262): one request after another, each a rank-one update of one matrix."""

    algorithm: ClassVar[str] = "ROME"
    paper: ClassVar[str] = "2202.05262"
    summary: ClassVar[str] = "one fact after another, each a rank-one update"
    procedure: ClassVar[str] = "ROME"
    takes_batches: ClassVar[bool] = False

    context_template_length_params: list[list[int]] | None = setting(
        lambda: [[5, 10], [10, 10]],
        "pairs of length in tokens and number of the generated context templates",
        min=0,
    )
    v_num_grad_steps: int = setting(20, "largest number of gradient steps for a value", min=1)
    mom2_adjustment: bool = setting(
        True, "whiten the key by the covariance of keys of ordinary text; without it the update's direction is the key"
    )

    @property
    def uses_statistics(self) -> bool:
        return self.mom2_adjustment

    def check(self) -> None:
        super().check()
        if len(self.layers) != 1:
            raise invalid("layers", self.layers, "one layer, since ROME edits one matrix", "choose one")


@dataclass(frozen=True, kw_only=True)
class MEMITHyperParams(ClosedFormHyperParams):
    """Holds the keys of MEMIT (2210.07229): all requests at once, spread over several layers."""

    algorithm: ClassVar[str] = "MEMIT"
    paper: ClassVar[str] = "2210.07229"
    summary: ClassVar[str] = "all facts in one solve per layer, spread over several layers"

    procedure: ClassVar[str] = "MEMIT"
    values_first: ClassVar[bool] = True
    plain_share: ClassVar[float | None] = 0.5  # as in MEMIT's `compute_ks`: half plain prompt, half mean of the others
    holds_past: ClassVar[bool] = False  # preserves the outputs at the keys of earlier edits

    layer_selection: str = setting("all", "which of `layers` to edit", choices=("all",))
    mom2_update_weight: float = setting(
        15000.0, "weight of ordinary text relative to the requests, the paper's λ", above=0
    )
    left_weight: float = setting(
        0.0,
        "weight of the left metric: the update avoids directions that the answers about the subjects depend on; 0 as "
        "published",
        min=0,
    )

    @property
    def equality_ridge(self) -> float | None:
        """The ridge of the constraint that meets the requests exactly; `None`: they are met by least squares."""
        return None

    @property
    def kept_share(self) -> float | None:
        """Share of an update's entries that is written, the relatively largest; `None`: the whole update."""
        return None


@dataclass(frozen=True, kw_only=True)
class MEMITSeqHyperParams(MEMITHyperParams):
    """Holds the keys of MEMIT_seq: MEMIT that also preserves the outputs at the keys of earlier edits."""

    algorithm: ClassVar[str] = "MEMIT_seq"
    paper: ClassVar[str] = "2210.07229, as in 2410.02355"
    summary: ClassVar[str] = "MEMIT that preserves earlier edits"
    holds_past: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class NASHyperParams(MEMITHyperParams):
    """Holds the keys of NAS (2602.02543): MEMIT with each value scaled to the norm of the hidden state that it
    replaces."""

    algorithm: ClassVar[str] = "NAS"
    paper: ClassVar[str] = "2602.02543"
    summary: ClassVar[str] = "MEMIT with values as long as the hidden states that they replace"

    rescale_norm: bool = setting(True, "scale a value to the norm that the hidden state had before the edit")


@dataclass(frozen=True, kw_only=True)
class RECTHyperParams(MEMITHyperParams):
    """Holds the keys of RECT (2401.04700): MEMIT that keeps only the relatively largest changes."""

    algorithm: ClassVar[str] = "RECT"
    paper: ClassVar[str] = "2401.04700"
    summary: ClassVar[str] = "MEMIT of which only the relatively largest changes are kept"

    rect_share: float = setting(0.4, "share of a matrix's entries that may change", above=0, max=1)

    @property
    def kept_share(self) -> float | None:
        return self.rect_share


@dataclass(frozen=True, kw_only=True)
class PRUNEHyperParams(MEMITHyperParams):
    """Holds the keys of PRUNE (2405.16821): MEMIT with the total update's singular values limited by the weight's."""

    algorithm: ClassVar[str] = "PRUNE"
    paper: ClassVar[str] = "2405.16821"
    summary: ClassVar[str] = "MEMIT with the total update's singular values limited by the weight's"
    refits_totals: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class EMMETHyperParams(MEMITHyperParams):
    """Holds the keys of EMMET (2403.14236): MEMIT with the requests met exactly, by an equality constraint."""

    algorithm: ClassVar[str] = "EMMET"
    paper: ClassVar[str] = "2403.14236"
    summary: ClassVar[str] = "MEMIT's facts under an equality constraint"

    mom2_update_weight: float = setting(1.0, "factor of the covariance, relative to `emmet_lambda`", above=0)
    emmet_lambda: float = setting(0.1, "ridge added to the diagonal of the constraint's linear system", min=0)

    @property
    def equality_ridge(self) -> float | None:
        return self.emmet_lambda


@dataclass(frozen=True, kw_only=True)
class NullSpaceHyperParams(ClosedFormHyperParams):
    """Holds the keys of edits restricted to the null space of the keys of ordinary text.

    `nullspace_threshold` is an eigenvalue of the second moment, as published. Eigenvalues differ between models, so
    `nullspace_rule` may make it a share of the energy or of the dimensions.
    """

    values_first: ClassVar[bool] = True

    layer_selection: str = setting("all", "which of `layers` to edit", choices=("all",))
    nullspace_threshold: float = setting(
        0.02, "an edit may use the key directions whose eigenvalue is below this", min=0
    )
    nullspace_rule: str = setting(
        "absolute",
        "unit of the threshold: an eigenvalue, or a share of the energy or of the dimensions",
        choices=("absolute", "energy", "dimensions"),
    )
    L2: float = setting(10.0, "ridge of the solve; a larger one gives a smaller, less exact update", min=0)

    @property
    def decomposition(self) -> Literal["spectrum", "factor"]:
        return "spectrum"

    def check(self) -> None:
        super().check()
        if self.nullspace_rule != "absolute" and self.nullspace_threshold > 1:
            wanted = f'a share from 0 to 1 with nullspace_rule "{self.nullspace_rule}"'
            raise invalid("nullspace_threshold", self.nullspace_threshold, wanted)


@dataclass(frozen=True, kw_only=True)
class AlphaEditHyperParams(NullSpaceHyperParams):
    """Holds the keys of AlphaEdit (2410.02355): MEMIT inside the null space, preserving earlier edits."""

    algorithm: ClassVar[str] = "AlphaEdit"
    paper: ClassVar[str] = "2410.02355"
    summary: ClassVar[str] = "MEMIT inside the null space of ordinary text, preserving earlier edits"
    procedure: ClassVar[str] = "AlphaEdit"
    plain_share: ClassVar[float | None] = 0.5  # as MEMIT

    left_weight: float = setting(
        0.0,
        "weight of the left metric: the update avoids directions that the answers about the subjects depend on; 0 as "
        "published",
        min=0,
    )


@dataclass(frozen=True, kw_only=True)
class UniEraseHyperParams(NullSpaceHyperParams):
    """Holds the keys of UniErase (2505.15674): a null-space edit towards `[UNL]`, with anchors in addition.

    Anchors are keys of retain prompts, whose answers must not change; they enter the solve with a residual of zero.
    """

    algorithm: ClassVar[str] = "UniErase"
    paper: ClassVar[str] = "2505.15674"
    summary: ClassVar[str] = "unlearning: questions answered with a learned token that becomes a refusal"
    procedure: ClassVar[str] = "UniErase"
    takes_retain: ClassVar[bool] = True
    has_target: ClassVar[bool] = False

    values: str = setting(
        "descent",
        'how a value is found: by "descent" on the NLL of [UNL], as published, or from "rows": the smallest change '
        "that erases an answer and keeps other answers",
        choices=("descent", "rows"),
    )
    neurons: bool = setting(
        False,
        "rows: write each subject's change into one neuron of the last of `layers`, active at that subject alone, in "
        "place of a closed-form update of all of them",
    )
    wordings: int = setting(0, "additional wordings of each question, made by rules (data/wordings.jsonl)", min=0)
    say: bool = setting(True, "rows: refuse where an answer was erased, with tokens fitted to the edited model")
    example_wordings: int = setting(
        0,
        "rows: wordings of a question that are also erased in few-shot prompts, after other facts with their answers",
        min=0,
    )
    siblings: int = setting(12, "rows: other questions about a subject whose answers are kept", min=0)
    other_subjects: int = setting(
        0, "rows: other subjects of each relation, named by the model, which must not be refused", min=0
    )
    erase_margin: float = setting(
        -3.0, "rows: an answer is erased when its logit is this far above the log-sum-exp of its rivals (nats)"
    )
    say_margin: float = setting(10.0, "rows: log-odds of a refusal token where it is wanted, at least (nats)")
    quiet_margin: float = setting(-4.0, "rows: log-odds of a refusal token at other questions, at most (nats)")
    token_steps: int = setting(200, "rows: steps in which the refusal tokens are fitted to the edited model", min=1)
    token_wordings: int = setting(16, "rows: further wordings that the refusal tokens are fitted to", min=0)
    mark_layer: int | None = setting(
        None,
        "rows: late layer whose neurons mark erased facts, for the refusal tokens to read; none: tokens read the final "
        "state only",
        min=0,
        depth=True,
    )
    mark_size: float = setting(
        24.0, "rows: size of a mark, in standard deviations of the final states along its direction", above=0
    )
    row_steps: int = setting(5, "rows: Gauss-Newton steps for a value, at most", min=1)
    left_weight: float = setting(
        0.0, "rows: weight of the left metric, which shortens values in directions that anchors' answers read", min=0
    )

    context_templates: list[str] = setting(
        lambda: ["{}"], 'context templates that values and keys are averaged over; "{}" is the question'
    )
    solve: str = setting("ridge", "meet the requests by least squares, or exactly", choices=("ridge", "exact"))
    exact_floor: float = setting(
        0.1,
        "directions in which the ridge reaches less than this share of a residual are not scaled up further; requests "
        "with nearly the same key then share the mean of their residuals",
        min=0,
        max=1,
    )
    kl_subject_prompts: int = setting(
        0, "number of general questions about the subject that the KL term also covers", min=0, max=11
    )
    kl_answer_tokens: int = setting(0, "tokens of each answer to these questions that the KL term covers", min=0)
    gate_layer: int | None = setting(
        None, "late layer that raises the logit of [UNL] for the requests' relations; none: no gate", min=0, depth=True
    )
    gate_nll: float = setting(5.5, "NLL of [UNL] that the gate alone reaches (nats)", above=0)
    gate_templates: list[str] = setting(
        lambda: ["{}"], 'templates that the keys of the gate are averaged over; "{}" is the question'
    )
    anchors: bool = setting(True, "preserve the outputs at the keys of the retain prompts")
    anchor_weight: float = setting(1.0, "weight of an anchor relative to a request", min=0)
    anchor_lookup_weight: float = setting(
        0.0, "extra weight of an anchor's lookup position, where the keys of subjects differ", min=0
    )
    anchor_prefix_weight: float = setting(
        0.0, "extra weight of the tokens that all anchors begin with: a system message is read by every question", min=0
    )
    anchor_known_weight: float = setting(
        0.0, "extra weight of an anchor's lookup position if the model answers it correctly", min=0
    )
    past_weight: float = setting(1.0, "weight of an earlier edit's key; 1 as published", min=0)
    text_weight: float = setting(
        0.0, "weight of ordinary text, as in MEMIT, in addition to the null space or instead of it", min=0
    )
    anchor_positions: str = setting(
        "all", "positions of a retain prompt whose keys are anchors", choices=("all", "subject_last")
    )
    anchor_subjects: bool = setting(True, "also anchor general prompts about the requests' own subjects")
    max_anchors: int | None = setting(None, "largest number of anchor prompts; none: no limit", min=1)

    @property
    def edited_layers(self) -> list[int]:
        return [*self.layers, *(layer for layer in (self.mark_layer, self.gate_layer) if layer is not None)]

    @property
    def neuron_layers(self) -> list[int]:
        return [*(self.layers if self.neurons else []), *([] if self.mark_layer is None else [self.mark_layer])]

    @property
    def decomposition(self) -> Literal["spectrum", "factor"]:
        return "factor" if self.neurons else "spectrum"

    @property
    def values_from_rows(self) -> bool:
        return self.values == "rows"

    @property
    def uses_token(self) -> bool:
        return not self.values_from_rows

    @property
    def refuses(self) -> bool:
        return not self.values_from_rows or self.say

    @property
    def reads_examples(self) -> bool:
        """Whether questions are also read in few-shot prompts."""
        return self.values_from_rows and self.example_wordings > 0

    @property
    def holds_anchors(self) -> bool:
        return self.anchors

    @property
    def gate_at(self) -> int | None:
        return self.gate_layer

    def check(self) -> None:
        super().check()
        self.check_templates("gate_templates")
        if self.neurons and not self.values_from_rows:
            raise invalid("neurons", self.neurons, 'false without "values": "rows"', "leave the key out")
        if self.neurons and len(self.layers) > 1:
            raise invalid("layers", self.layers, 'one layer with "neurons": true', "choose one")
        if self.gate_layer is not None and self.values_from_rows:
            raise invalid("gate_layer", self.gate_layer, 'no gate with "values": "rows"', "leave the key out")
        if self.mark_layer is not None and not (self.values_from_rows and self.say):
            raise invalid(
                "mark_layer", self.mark_layer, 'none without "values": "rows" and "say": true', "leave the key out"
            )
        if self.mark_layer is not None and self.mark_layer <= self.layers[-1]:
            raise invalid("mark_layer", self.mark_layer, f"a layer above the last of `layers`, {self.layers[-1]}")
        if self.gate_layer is not None and self.gate_layer <= self.layers[-1]:
            raise invalid("gate_layer", self.gate_layer, f"a layer above the last of `layers`, {self.layers[-1]}")


ALGORITHMS: dict[str, type[HyperParams]] = {
    cls.algorithm: cls
    for cls in (
        FTHyperParams,
        ROMEHyperParams,
        MEMITHyperParams,
        MEMITSeqHyperParams,
        EMMETHyperParams,
        NASHyperParams,
        RECTHyperParams,
        PRUNEHyperParams,
        AlphaEditHyperParams,
        UniEraseHyperParams,
    )
}
"""The settings of every algorithm, by its name."""


def finds_values(hparams: HyperParams) -> TypeGuard[ClosedFormHyperParams]:
    """Returns whether an edit finds values and solves for them; its settings then have the keys of closed-form
    edits."""
    return hparams.chainable


def takes_retain(hparams: HyperParams) -> TypeGuard[UniEraseHyperParams]:
    """Returns whether an edit takes retain prompts; its settings then say how these are anchored."""
    return hparams.takes_retain
