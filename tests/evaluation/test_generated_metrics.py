"""Metrics of generated text, on cases worked by hand and against rouge-score and scipy."""

import math
import re
import sys
import types

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from transformers import BertConfig, BertForSequenceClassification

from editlib.errors import MetricError
from editlib.evaluation.metrics import cosine_similarity, entailment_score, rouge_l_recall, token_entropy
from editlib.version import install_line

WORDS = ["the", "cats", "run", "running", "Paris", "is", "not,", "in", "1956", "Zürich"]
sentences = st.lists(st.sampled_from(WORDS), max_size=8).map(" ".join)
token_rows = st.lists(st.integers(0, 5), max_size=12)


def of_each(result, key="score"):
    return [item[key] for item in result.value_by_index.values()]


def test_rouge_by_hand():
    result = rouge_l_recall(
        ["the cat is on a mat", "mat the on sat cat the", "I do not know.", "He runs", ""],
        ["the cat sat on the mat", "the cat sat on the mat", "Paris", "he was running", "the cat"],
        on="forget",
    )
    # "the cat on mat"; backwards, "the cat the" or "the sat the"; no word; "he run" (stemmed)
    assert of_each(result, "rougeL_recall") == pytest.approx([4 / 6, 3 / 6, 0, 2 / 3, 0])
    assert result.agg_value == pytest.approx((4 / 6 + 3 / 6 + 2 / 3) / 5)
    assert result.value_by_index["2"] == {"rougeL_recall": 0, "ground_truth": "Paris", "generation": "I do not know."}


@given(sentences, sentences)
def test_rouge_is_that_of_the_package(text, reference):
    (score,) = of_each(rouge_l_recall([text], [reference], on="retain"), "rougeL_recall")
    if not reference:
        assert score is None
    else:
        assert score == RougeScorer(["rougeL"], use_stemmer=True).score(reference, text)["rougeL"].recall
        assert rouge_l_recall([reference], [reference], on="retain").agg_value == 1.0


def test_a_reference_that_rouge_cannot_read_is_not_forgotten():
    result = rouge_l_recall(["Москва", "Paris"], ["Москва", "Paris"], on="forget")
    assert (result.agg_value, result.n, of_each(result, "rougeL_recall")) == (1.0, 1, [None, 1.0])
    assert rouge_l_recall(["Москва"], ["Москва"], on="forget").agg_value is None


def test_rouge_says_what_it_cannot_read(caplog):
    references = ["北京在2008年举办了奥运会", "Jaime Vásquez", "Ελλάδα", "1945"]
    result = rouge_l_recall(["2008", "Jaime Vásquez", "Ellada", "1945"], references, on="forget")
    assert of_each(result, "rougeL_recall") == [None, 1.0, None, 1.0]
    assert result.meaning.endswith("2 of 4 references are in a script that it cannot read and do not count")
    assert "2 of 4 references are in another script and do not count; the first is '北京在" in caplog.text
    assert "script" not in rouge_l_recall(["Paris"], ["Paris"], on="forget").meaning


def test_rouge_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(MetricError, match=re.escape(install_line("eval"))):
        rouge_l_recall(["a"], ["a"], on="forget")


def test_entropy_by_hand():
    result = token_entropy([[1, 1, 2, 2], [1, 2, 3, 4], [9] * 5, [7], [], [1, 1, 1, 2]], on="retain")
    # 1 bit of 2; all of 2 bits; none; too short, twice; -(3/4 log2 3/4 + 1/4 log2 1/4) = 0.8113 bits of 2
    assert of_each(result) == pytest.approx([0.5, 1.0, 0.0, 0.0, 0.0, 0.8113 / 2], abs=1e-4)
    assert of_each(result, "tokens") == [4, 4, 5, 1, 0, 4]
    assert result.agg_value == pytest.approx((0.5 + 1 + 0.8113 / 2) / 6, abs=1e-4)


@given(st.permutations(range(8)).flatmap(lambda order: st.tuples(token_rows, st.just(order))))
def test_entropy_is_scipys_and_does_not_see_the_order(case):
    tokens, order = case
    (score,) = of_each(token_entropy([tokens], on="forget"))
    assert 0.0 <= score <= 1.0
    if len(tokens) > 1:
        _, counts = np.unique(tokens, return_counts=True)
        assert score == pytest.approx(scipy.stats.entropy(counts, base=2) / math.log2(len(tokens)), abs=1e-12)
    shuffled = [tokens[i] for i in order if i < len(tokens)] + tokens[8:]
    assert of_each(token_entropy([shuffled], on="forget")) == pytest.approx([score], abs=1e-12)


VECTORS = {"east": [2, 0], "north-east": [3, 3], "west": [-1, 0], "north": [0, 5], "nowhere": [0, 0]}


class FakeEncoder:
    """Vectors by text; knows one name of a model that does not exist."""

    def __init__(self, name=None):
        if name == "missing":
            raise OSError("no such model\nand much more")

    def encode(self, sentences):
        assert isinstance(sentences, list)
        return np.array([VECTORS[text] for text in sentences], dtype=np.float32)


def test_cosine_by_hand():
    said = ["east", "north-east", "west", "north", "nowhere"]
    result = cosine_similarity(said, ["east"] * 5, FakeEncoder(), on="forget")
    assert of_each(result) == pytest.approx([1.0, 0.5**0.5, 0.0, 0.0, 0.0])
    assert result.agg_value == pytest.approx((1 + 0.5**0.5) / 5)
    assert cosine_similarity([], [], FakeEncoder(), on="forget").agg_value is None


def test_cosine_with_the_name_of_a_model(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sentence_transformers", types.SimpleNamespace(SentenceTransformer=FakeEncoder))
    assert cosine_similarity(["east"], ["north-east"], tmp_path, on="retain").agg_value == pytest.approx(0.5**0.5)
    with pytest.raises(MetricError, match="cannot load the sentence encoder missing: no such model; give") as error:
        cosine_similarity(["east"], ["east"], "missing", on="retain")
    assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(MetricError, match=re.escape(install_line("similarity"))):
        cosine_similarity(["east"], ["east"], "any", on="retain")


class FakeClassifier:
    """Says "entailment" where every word of the hypothesis stands in the premise; remembers what it was asked."""

    def __init__(self, yes="entailment"):
        self.asked, self.yes = [], yes

    def __call__(self, pairs):
        self.asked += [(pair["text"], pair["text_pair"]) for pair in pairs]
        return [
            {
                "label": self.yes if set(pair["text_pair"].split()) <= set(pair["text"].split()) else "neutral",
                "score": 0.9,
            }
            for pair in pairs
        ]


SAID = ["it is Paris I think", "Paris", "no idea"]
MEANT = ["it is Paris", "it is Paris", "it is Lima"]


@pytest.mark.parametrize(
    ("on", "premise", "scores"),
    [
        ("forget", None, [1, 0, 0]),  # what was said holds the truth
        ("retain", None, [0, 1, 0]),  # what was said follows from the truth
        ("retain", "generated", [1, 0, 0]),
        ("forget", "reference", [0, 1, 0]),
    ],
)
def test_entailment_and_its_premise(on, premise, scores):
    judge = FakeClassifier(yes="ENTAILMENT")
    result = entailment_score(SAID, MEANT, judge, on=on, premise=premise)
    assert of_each(result) == scores
    assert result.agg_value == pytest.approx(1 / 3)
    assert len(judge.asked) == 2  # "no idea" shares no word with the truth: ROUGE-L 0 settles it
    assert of_each(result, "label")[2] is None


def test_entailment_without_the_floor_asks_about_all():
    judge = FakeClassifier()
    entailment_score(SAID, MEANT, judge, on="forget", least_rouge=0.0)
    assert judge.asked == list(zip(SAID, MEANT, strict=True))
    entailment_score(["no idea"], ["it is Lima"], lambda _: pytest.fail("asked"), on="forget")


@pytest.mark.parametrize("answers", [[], [{"score": 1.0}], ["entailment"], [{"label": "entailment"}] * 2])
def test_a_classifier_that_answers_otherwise(answers):
    with pytest.raises(MetricError, match="did not answer each of"):
        entailment_score(["Paris"], ["Paris"], lambda _: answers, on="forget")


@pytest.fixture
def classifier(tmp_path, tok):
    """`save(labels)`: a folder with a tiny classifier that always says the last of `labels`."""

    def save(labels):
        config = BertConfig(
            vocab_size=len(tok), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
            max_position_embeddings=16, id2label=dict(enumerate(labels)), label2id={y: i for i, y in enumerate(labels)},
        )  # fmt: skip
        model = BertForSequenceClassification(config)
        model.classifier.weight.data.zero_()
        model.classifier.bias.data = torch.arange(len(labels), dtype=torch.float32)
        model.save_pretrained(tmp_path)
        tok.model_max_length = 16
        tok.save_pretrained(tmp_path)
        return tmp_path

    return save


def test_entailment_through_transformers(classifier):
    """The pipeline takes premise and hypothesis, and cuts what is too long for the model."""
    folder = classifier(["contradiction", "Entailment"])
    assert entailment_score(["Paris " * 40], ["Paris"], folder, on="forget").agg_value == 1.0
    folder = classifier(["entailment", "neutral"])
    assert entailment_score(["Paris"], ["Paris"], str(folder), on="forget").agg_value == 0.0


def test_a_classifier_of_something_else(classifier, tmp_path):
    folder = classifier(["good", "bad"])
    with pytest.raises(MetricError, match='are good, bad; expected a model with a label "entailment"'):
        entailment_score(["Paris"], ["Paris"], folder, on="forget")
    with pytest.raises(MetricError, match="cannot load the classifier") as error:
        entailment_score(["Paris"], ["Paris"], tmp_path / "none", on="forget")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "call",
    [
        lambda: rouge_l_recall(["a"], ["a", "b"], on="forget"),
        lambda: cosine_similarity(["a"], ["a", "b"], FakeEncoder(), on="forget"),
        lambda: entailment_score(["a"], ["a", "b"], FakeClassifier(), on="forget"),
    ],
)
def test_as_many_answers_as_references(call):
    with pytest.raises(MetricError, match="1 generated, 2 references; expected one of each"):
        call()
