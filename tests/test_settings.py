"""Settings that are made in Python or from options: a wrong value is one line with the field, when they are made."""

from dataclasses import fields
from typing import get_args, get_type_hints

import pytest

from editlib.algorithms.unierase.token_learning import TokenHyperParams
from editlib.attacks.settings import AttackSettings
from editlib.baselines.settings import BaselineSettings, Budget
from editlib.errors import AttackError, HparamsError, TokenError
from editlib.jobs.finetune import FinetuneSettings
from editlib.training.settings import TrainSettings

ERRORS = {
    AttackSettings: AttackError,
    BaselineSettings: HparamsError,
    Budget: HparamsError,
    TrainSettings: HparamsError,
    FinetuneSettings: HparamsError,
    TokenHyperParams: TokenError,
}
FIELDS = [pytest.param(kind, item.name, id=f"{kind.__name__}.{item.name}") for kind in ERRORS for item in fields(kind)]
REFUSED = [
    (AttackSettings, "samples", 0, "at least 1"),
    (AttackSettings, "relearn_rate", float("inf"), "at least 0"),
    (BaselineSettings, "learning_rate", 0.0, "more than 0"),
    (BaselineSettings, "steps", 2.5, "a whole number or null"),
    (Budget, "high", 1e300, "more than 0 and at most 1000"),
    (Budget, "rates", True, "a whole number"),
    (TrainSettings, "decay", "square", '"constant" or "linear" or "cosine"'),
    (TrainSettings, "max_grad_norm", 0, "more than 0"),
    (FinetuneSettings, "keep", 1.5, "at least 0 and at most 1"),
    (FinetuneSettings, "epochs", 0, "at least 1"),
    (TokenHyperParams, "memory", 1.0, "at least 0 and less than 1"),
    (TokenHyperParams, "layers", (1, "2"), "a list of whole numbers"),
    (TokenHyperParams, "guard_every", 0, "at least 1"),
    (TokenHyperParams, "precision", "half", '"fast" or "model"'),
]


@pytest.mark.parametrize(("kind", "name"), FIELDS)
def test_no_field_takes_a_value_of_another_type(kind, name):
    hint = get_type_hints(kind)[name]
    texts = [] if str in (hint, *get_args(hint)) else ["\n"]
    for value in (*texts, {}, [None], float("nan"), object()):
        with pytest.raises(ERRORS[kind]) as error:
            kind(**{name: value})
        assert str(error.value).startswith(name) and "; expected " in str(error.value)
        assert "\n" not in str(error.value) and len(str(error.value)) < 200


@pytest.mark.parametrize(("kind", "name", "value", "expected"), REFUSED)
def test_a_value_out_of_range_is_told_with_the_range(kind, name, value, expected):
    with pytest.raises(ERRORS[kind], match=f"^{name}.* is .*; expected {expected}$"):
        kind(**{name: value})


def test_values_are_kept_in_the_type_of_their_field():
    assert type(BaselineSettings(learning_rate=1).learning_rate) is float
    assert TokenHyperParams(layers=[1, 3]).layers == (1, 3)
    assert BaselineSettings(steps=None).steps is None
