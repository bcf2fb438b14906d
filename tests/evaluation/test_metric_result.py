"""Results as JSON in open-unlearning's shape."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from editlib import attacks, comparison
from editlib.errors import MetricError
from editlib.evaluation.forget_set import Scores
from editlib.evaluation.metrics import (
    MetricResult,
    exact_memorisation,
    extraction_strength,
    probability,
    probability_with_options,
    read_results,
    rouge_l_recall,
    token_entropy,
    truth_ratio,
    write_results,
)

numbers = st.floats(allow_nan=False, allow_infinity=False)
items = st.dictionaries(st.text(max_size=3), st.none() | numbers | st.text(max_size=5), max_size=3)
results = st.builds(
    MetricResult,
    name=st.text(max_size=8),
    agg_value=st.none() | numbers,
    value_by_index=st.dictionaries(st.integers(0, 99).map(str), items, max_size=3),
    kind=st.sampled_from(["generated", "teacher_forced", "combined", None]),
    higher_is_better=st.sampled_from([True, False, None]),
    n=st.none() | st.integers(0, 99),
    meaning=st.text(max_size=8),
    interval=st.none() | st.tuples(numbers, numbers),
)


def test_the_shape():
    assert probability([0.0, float("nan")], on="forget").to_dict() == {
        "forget_teacher_forced_probability": {
            "agg_value": 1.0,
            "higher_is_better": False,
            "kind": "teacher_forced",
            "n": 1,
            "meaning": "probability of the true answer to the question, per token (geometric mean)",
            "value_by_index": {"0": {"prob": 1.0, "avg_loss": 0.0}, "1": {"prob": None, "avg_loss": None}},
        }
    }


@given(results)
def test_there_and_back_through_json(result):
    assert MetricResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_directions_and_names_say_what_was_measured():
    """Knowing more is bad on a forget set and good on a retain set; truth ratio and entropy are good both times."""
    calls = {
        "generated_rouge_l_recall": lambda on: rouge_l_recall(["a"], ["a"], on=on),
        "generated_token_entropy": lambda on: token_entropy([[1, 2]], on=on),
        "teacher_forced_probability": lambda on: probability([1.0], on=on),
        "teacher_forced_probability_with_options": lambda on: probability_with_options([1.0], [[1.0]], on=on),
        "teacher_forced_truth_ratio": lambda on: truth_ratio([1.0], [[1.0]], on=on),
        "teacher_forced_exact_memorisation": lambda on: exact_memorisation([[True]], on=on),
        "teacher_forced_extraction_strength": lambda on: extraction_strength([[True]], on=on),
    }
    good_both_times = {"generated_token_entropy", "teacher_forced_truth_ratio"}
    for name, call in calls.items():
        for on in ("forget", "retain"):
            result = call(on)
            assert result.name == f"{on}_{name}"
            assert result.name.startswith(f"{on}_{result.kind}_")
            assert result.higher_is_better is (on == "retain" or name in good_both_times)
            assert result.meaning
        with pytest.raises(MetricError, match="on='all'; expected one of forget, retain"):
            call("all")


def test_nothing_to_score_is_no_zero():
    result = token_entropy([], on="forget")
    assert (result.agg_value, result.n, result.value_by_index) == (None, 0, {})


def test_files(tmp_path):
    path = tmp_path / "results.json"
    some = [probability([0.5], on="forget"), probability([0.25], on="retain")]
    write_results(path, some)
    assert read_results(path) == {result.name: result for result in some}
    before = path.read_bytes()
    with pytest.raises(MetricError, match="two results are named 'forget_teacher_forced_probability'"):
        write_results(path, [some[0], some[0]])
    assert path.read_bytes() == before


def test_a_file_of_open_unlearning(tmp_path):
    path = tmp_path / "TOFU_EVAL.json"
    path.write_text(
        '{"forget_truth_ratio": {"agg_value": 0.5, "value_by_index": {"0": {"score": 0.25}, "3": {"score": null}}},'
        ' "model_utility": {"agg_value": 0.625}}',
        encoding="utf-8",
    )
    found = read_results(path)
    assert found["forget_truth_ratio"].values() == [0.25]
    assert found["forget_truth_ratio"].higher_is_better is None
    assert found["model_utility"] == MetricResult("model_utility", 0.625)
    with pytest.raises(MetricError, match="'forget_truth_ratio': its items have no 'prob'; they hold score"):
        found["forget_truth_ratio"].values("prob")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[1]", r"holds \[1\]; expected an object"),
        ("{", "cannot read results"),
        ('{"a": 1}', "'a': expected an object with \"agg_value\", got 1"),
        ('{"a": {"agg_value": NaN}}', "must be a number or null, got nan"),
        ('{"a": {"agg_value": "1"}}', "must be a number or null, got '1'"),
        ('{"a": {"agg_value": true}}', "must be a number or null, got True"),
        ('{"a": {"agg_value": 1, "value_by_index": [1]}}', "must map an index to an object"),
        ('{"a": {"agg_value": 1, "value_by_index": {"0": 1}}}', "must map an index to an object"),
        ('{"a": {"agg_value": 1, "kind": "guessed"}}', "generated, teacher_forced, combined, got 'guessed'"),
        ('{"a": {"agg_value": 1, "higher_is_better": "yes"}}', "true, false or null, got 'yes'"),
        ('{"a": {"agg_value": 1, "n": "two"}}', "whole number or null, got 'two'"),
        ('{"a": {"agg_value": 1, "interval": [0]}}', r"two numbers or null, got \[0\]"),
        ('{"a": {"agg_value": 1, "interval": [0, true]}}', "two numbers or null"),
        ('{"a": {"agg_value": 1, "interval": "01"}}', "two numbers or null, got '01'"),
    ],
)
def test_damaged_files_are_met_with_a_line(tmp_path, text, complaint):
    path = tmp_path / "results.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(MetricError, match=complaint) as error:
        read_results(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_comparison_keeps_a_number_in_the_form_of_earlier_versions():
    """`Scores.to_dict` of 0.1: five keys in this order, a number that is not finite counted as none."""
    told = MetricResult("kept", 0.5, {"0": {"score": 1.0}}, "generated", False, 4, "what is kept", (0.25, 0.75))
    scores = Scores(told, MetricResult("none", float("nan")), {"kept": told}, [{"id": "a"}])
    kept = {"value": 0.5, "meaning": "what is kept", "higher_is_better": False, "n": 4, "interval": [0.25, 0.75]}
    none = {"value": None, "meaning": "", "higher_is_better": True, "n": None, "interval": None}
    wanted = {"forget": kept, "retain": none, "measures": {"kept": kept}, "items": [{"id": "a"}]}
    assert json.dumps(scores.to_dict()) == json.dumps(wanted)


def test_names_of_earlier_versions_are_still_found():
    with pytest.warns(DeprecationWarning, match="MetricResult"):
        old = comparison.Measure(0.5, "kept", n=3, interval=(0.0, 1.0))
    assert old.summary() == {
        "value": 0.5,
        "meaning": "kept",
        "higher_is_better": True,
        "n": 3,
        "interval": (0.0, 1.0),
    }
    with pytest.warns(DeprecationWarning, match="Benchmark"):
        assert comparison.Protocol is comparison.Benchmark
    with pytest.warns(DeprecationWarning, match="LeakRate"):
        assert attacks.Share is attacks.LeakRate
    for package in (comparison, attacks):
        with pytest.raises(AttributeError, match="no attribute 'Shore'"):
            package.Shore  # noqa: B018


def test_one_metric_at_a_time():
    with pytest.raises(MetricError, match="expected one metric"):
        MetricResult.from_dict({"a": {"agg_value": 1}, "b": {"agg_value": 1}})


def test_no_file(tmp_path):
    with pytest.raises(MetricError, match="cannot read results"):
        read_results(tmp_path / "none.json")
