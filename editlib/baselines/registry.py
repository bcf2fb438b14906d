"""List the baselines by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from editlib.baselines import gradient
from editlib.baselines.gradient import PartFactory
from editlib.errors import HparamsError, did_you_mean

BaselineKind = Literal["gradient", "prompt", "editor"]


@dataclass(frozen=True)
class Baseline:
    """Describes one published way to make a model forget.

    Args:
        forget, retain: the parts of a gradient method's loss.
        rate, steps: defaults of `learning_rate` and `steps`.
        low, high: range of learning rates of a search.
        beta, weight: defaults of `beta` and `forget_weight`.
        editor: the editing algorithm whose target is a refusal.
        steers: whether it trains only some layers, towards a direction of their states (RMU).
    """

    meaning: str
    source: str
    kind: BaselineKind = "gradient"
    forget: PartFactory | None = None
    retain: PartFactory | None = None
    rate: float = 5e-5
    steps: int = 40
    low: float = 1e-5
    high: float = 3e-4
    beta: float = 0.1
    weight: float = 1.0
    editor: str | None = None
    steers: bool = False

    @property
    def needs_retain(self) -> bool:
        """Whether it needs prompts to keep."""
        return self.retain is not None

    @property
    def searched(self) -> bool:
        """Whether it has a learning rate and steps to search for."""
        return self.kind != "prompt"


def _editor(name: str, source: str) -> Baseline:
    return Baseline(
        f"{name} with a refusal as target, without an unlearning token",
        source,
        kind="editor",
        editor=name,
        rate=0.3,
        steps=25,
        low=0.05,
        high=0.5,
    )


TOFU, CLOSER = "2401.06121", "2410.08109"
DESCENT, CLOSE_BY = "descent on answers to keep", "KL to the model before on answers to keep"

BASELINES: Mapping[str, Baseline] = {
    "GA": Baseline("gradient ascent on the answers", f"2310.10683; {TOFU}", forget=gradient.ga),
    "GA+GD": Baseline(
        f"GradDiff: gradient ascent on the answers, {DESCENT}",
        f"2203.12817; {TOFU}",
        forget=gradient.ga,
        retain=gradient.gd,
    ),
    "GA+KL": Baseline(f"gradient ascent on the answers, {CLOSE_BY}", TOFU, forget=gradient.ga, retain=gradient.kl),
    "NPO": Baseline("negative preference optimisation", "2404.05868", forget=gradient.npo),
    "NPO+GD": Baseline(
        f"negative preference optimisation, {DESCENT}", "2404.05868", forget=gradient.npo, retain=gradient.gd
    ),
    "NPO+KL": Baseline(
        f"negative preference optimisation, {CLOSE_BY}", "2404.05868", forget=gradient.npo, retain=gradient.kl
    ),
    "SimNPO": Baseline(
        "negative preference optimisation by length, without a reference",
        "2410.07163",
        forget=gradient.simnpo,
        beta=2.5,
    ),
    "SimNPO+GD": Baseline(f"SimNPO, {DESCENT}", "2410.07163", forget=gradient.simnpo, retain=gradient.gd, beta=2.5),
    "DPO": Baseline("refusals preferred to the answers", f"2305.18290; {TOFU}", forget=gradient.dpo),
    "DPO+GD": Baseline(
        f"refusals preferred to the answers, {DESCENT}", CLOSER, forget=gradient.dpo, retain=gradient.gd
    ),
    "DPO+KL": Baseline(
        f"refusals preferred to the answers, {CLOSE_BY}", CLOSER, forget=gradient.dpo, retain=gradient.kl
    ),
    "IDK+GD": Baseline(f"refusals are learned, {DESCENT}", TOFU, forget=gradient.idk, retain=gradient.gd),
    "IDK+AP": Baseline(
        "refusals are learned, answers to keep preferred to refusals", CLOSER, forget=gradient.idk, retain=gradient.ap
    ),
    "ME+GD": Baseline(
        f"uniform distributions in place of the answers, {DESCENT}",
        CLOSER,
        forget=gradient.me,
        retain=gradient.gd,
        weight=0.1,
    ),
    "RMU": Baseline(
        "states of an inner layer steered to a random direction, those of other answers kept",
        "2403.03218",
        forget=gradient.rmu_forget,
        retain=gradient.rmu_retain,
        rate=1e-4,
        low=5e-5,
        high=1e-3,
        steers=True,
    ),
    "in-context": Baseline(
        "no weight changes: the chat template tells the model to refuse", "2310.07579; 2403.03329", kind="prompt"
    ),
    "ROME-refusal": _editor("ROME", "2202.05262"),
    "MEMIT-refusal": _editor("MEMIT", "2210.07229"),
    "AlphaEdit-refusal": _editor("AlphaEdit", "2410.02355; 2505.19855"),
}


def baseline(name: str) -> Baseline:
    """Finds a baseline by name, ignoring case.

    Raises:
        HparamsError: no such baseline; the message names the nearest.
    """
    for known, entry in BASELINES.items():
        if known.lower() == name.lower():
            return entry
    hint = did_you_mean(name, BASELINES)
    raise HparamsError(f"baseline {name!r} does not exist{hint}; expected one of {', '.join(BASELINES)}")


def canonical_name(name: str) -> str:
    """Returns the name of a baseline as `BASELINES` spells it.

    Raises:
        HparamsError: no such baseline.
    """
    entry = baseline(name)
    return next(known for known, other in BASELINES.items() if other is entry)
