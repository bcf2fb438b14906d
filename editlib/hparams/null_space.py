"""Define the settings of edits inside the null space of the keys of ordinary text: AlphaEdit and UniErase."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from editlib.hparams.base import ClosedFormHyperParams
from editlib.settings import invalid, setting


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
    say_margin: float = setting(4.0, "rows: log-odds of a refusal token where it is wanted, in the first fit (nats)")
    quiet_margin: float = setting(-10.0, "rows: log-odds of a refusal token at other questions, at most (nats)")
    token_steps: int = setting(200, "rows: steps in which the refusal tokens are fitted to the edited model", min=1)
    token_wordings: int = setting(16, "rows: further wordings in which a question is refused", min=0)
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
        return [*self.layers, *([] if self.gate_layer is None else [self.gate_layer])]

    @property
    def neuron_layers(self) -> list[int]:
        return self.layers if self.neurons else []

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
        if self.gate_layer is not None and self.gate_layer <= self.layers[-1]:
            raise invalid("gate_layer", self.gate_layer, f"a layer above the last of `layers`, {self.layers[-1]}")
