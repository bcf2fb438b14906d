"""Steps of a search: one change each, all of them settings that a model can have."""

from dataclasses import replace

import pytest

from editlib.hparams import FTHyperParams, UniEraseHyperParams, available, load_hparams
from editlib.hparams.steps import steps

START = UniEraseHyperParams(layers=[1, 2], gate_layer=4, early_stop_loss=0.04)
ROWS = UniEraseHyperParams(layers=[1, 2], values="rows", say=False)


def changes(start, n_layers=5):
    """What each step changes: (field, new value)."""
    before, found = start.to_dict(), []
    for one in steps(start, n_layers):
        changed = [(key, value) for key, value in one.to_dict().items() if value != before.get(key)]
        assert len(changed) == 1
        found += changed
    return found


def values(start, name):
    return {value for key, value in changes(start) if key == name}


def test_steps_change_one_thing_and_fit():
    assert changes(START)
    assert all(one.layers[-1] < 5 and (one.gate_layer or 4) < 5 for one in steps(START, 5))
    assert values(START, "gate_layer") == {3, None}
    assert values(START, "early_stop_loss") == {0.08, 0.02}
    shares = UniEraseHyperParams(layers=[1], nullspace_rule="energy", nullspace_threshold=0.8)
    assert values(shares, "nullspace_threshold") == {0.4}


def test_values_from_rows_have_steps_of_their_own():
    assert values(ROWS, "erase_margin") == {-5.0, -1.0}
    assert values(ROWS, "left_weight") == {30.0}
    assert values(replace(ROWS, left_weight=30.0), "left_weight") == {0.0, 10.0, 90.0}
    assert not {"early_stop_loss", "say_margin", "quiet_margin", "gate_layer"} & {key for key, _ in changes(ROWS)}
    assert values(replace(ROWS, say=True), "say_margin") == {2.0, 6.0}
    assert not {"erase_margin", "left_weight", "say_margin"} & {key for key, _ in changes(START)}


@pytest.mark.parametrize("name", available("UniErase"))
def test_all_that_ships_can_be_searched_from(name):
    start = load_hparams(f"UniErase/{name}")
    found = list(steps(start, 32))
    assert len(found) >= 8 and len(found) == len({str(one.to_dict()) for one in found})


def test_fields_that_an_algorithm_lacks_are_passed_over():
    assert {key for key, _ in changes(FTHyperParams(layers=[2]))} == {"layers", "early_stop_loss"}
