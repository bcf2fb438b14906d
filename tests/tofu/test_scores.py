"""What readings come to, worked by hand; and that a reading is what plain transformers says."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tofu_files import write_tofu_files

from editlib.errors import MetricError
from editlib.evaluation.metrics import read_results
from editlib.models.anatomy import anatomy
from editlib.models.generation import Forced
from editlib.models.loaded import LoadedModel
from editlib.models.prompts import PromptFormat
from editlib.tofu.report import conditions, headline_of, table_rows, verdict, write_tofu
from editlib.tofu.scores import Judges, TofuReading, TofuScores, compare_tofu, document, score, tofu_scores
from editlib.tofu.sets import Asked, TofuSets, read_tofu

pytest.importorskip("rouge_score")
pytest.importorskip("scipy")

FORGET = (
    Asked("f:1", "Who is he?", "Ada Moor", "Moor, Ada", ("Bo", "Cy")),
    Asked("f:2", "Where is she?", "in Oslo town", "Oslo", ("Rome",)),
)
RETAIN = (Asked("r:1", "Who wrote it?", "Ed Holm", "Holm", ("Bo",)),)
WORLD = (Asked("w:1", "Where is it?", "Paris", None, ("Rome", "Bonn")),)


def reading(text, nll, hits, paraphrase, wrong):
    """NLL of the answer's tokens; of the other texts the mean."""
    tokens = tuple(range(len(text.split())))
    return TofuReading(tokens, text, Forced(tuple(nll), tuple(hits)), paraphrase, tuple(wrong))


LOG2, LOG4 = math.log(2), math.log(4)
SAID = {
    FORGET[0]: reading("Ada it is", [LOG2, LOG2], [True, False], LOG2, [LOG4, LOG4]),
    FORGET[1]: reading("in Oslo town", [LOG4, LOG4, LOG4], [False, True, True], LOG4, [LOG2]),
    RETAIN[0]: reading("Ed Holm", [LOG2, LOG2], [True, True], LOG2, [LOG4]),
    WORLD[0]: reading("Bonn", [LOG4], [False], LOG4, [LOG2, LOG4]),
}
SETS = TofuSets(
    "forget01", (), (), {"forget": FORGET, "retain": RETAIN, "world_facts": WORLD}, missing=("real_authors",)
)


def test_scores_by_hand():
    found = score(SETS, SAID)
    wanted = {
        "forget_generated_rouge_l_recall": (1 / 2 + 1) / 2,
        "forget_teacher_forced_probability": (1 / 2 + 1 / 4) / 2,
        # r is 1/2 for the first (wrong at 1/4 each, paraphrase at 1/2) and 2 for the second; min(r, 1/r) is 1/2 of both
        "forget_teacher_forced_truth_ratio": 1 / 2,
        "forget_teacher_forced_exact_memorisation": (1 / 2 + 2 / 3) / 2,
        "forget_teacher_forced_extraction_strength": (0 + 2 / 3) / 2,
        "forget_generated_token_entropy": 1.0,
        "retain_teacher_forced_truth_ratio": 1 / 2,
        "retain_generated_rouge_l_recall": 1.0,
        # p is 1/4, wrong ones 1/2 and 1/4: 1/4 of 1
        "world_facts_teacher_forced_probability_with_options": 1 / 4,
        "world_facts_teacher_forced_truth_ratio": 0.0,  # wrong answers' mean 3/8 over the answer itself at 1/4
        "world_facts_generated_rouge_l_recall": 0.0,
    }
    for name, value in wanted.items():
        assert found[name].agg_value == pytest.approx(value), name
        assert found[name].name == name
    assert [item["id"] for item in found["forget_teacher_forced_truth_ratio"].value_by_index.values()] == ["f:1", "f:2"]
    assert [item["score"] for item in found["forget_teacher_forced_truth_ratio"].value_by_index.values()] == (
        pytest.approx([0.5, 2.0])
    )
    efficacy = found["forget_efficacy_without_cosine_similarity_without_entailment_score"].agg_value
    assert efficacy == pytest.approx(1 - (3 / 4 + 3 / 8 + 1 / 2) / 3)
    ability = found["retain_ability_without_cosine_similarity_without_entailment_score"].agg_value
    assert ability == pytest.approx(4 / (1 + 2 + 2 + 1))  # ROUGE 1, probability 1/2, truth ratio 1/2, entropy 1
    assert found["balance"].agg_value == pytest.approx(2 * efficacy * ability / (efficacy + ability))
    assert "model_utility" not in found  # a set is missing
    assert "forget_quality" not in found  # no retain-only model


def test_model_utility_needs_all_three_sets():
    authors = (Asked("a:1", "Who?", "Jane", None, ("Bo",)),)
    said = {**SAID, authors[0]: reading("Jane", [LOG2], [True], LOG2, [LOG4])}
    said[WORLD[0]] = reading("Paris", [LOG2], [True], LOG2, [LOG4, LOG4])
    sets = TofuSets("forget01", (), (), {**SETS.probes, "real_authors": authors})
    # retain 1, 1/2, 1/2; authors 1, (1/2) / (3/4), 1/2; world 1, (1/2) / 1, 1/2
    wanted = 9 / (1 + 2 + 2 + 1 + 3 / 2 + 2 + 1 + 2 + 2)
    assert score(sets, said)["model_utility"].agg_value == pytest.approx(wanted)


def test_forget_quality_is_of_the_same_questions():
    other = score(SETS, SAID)
    assert score(SETS, SAID, retain_only=other)["forget_quality"].agg_value == pytest.approx(1.0)
    one = TofuSets("forget01", (), (), {**SETS.probes, "forget": FORGET[1:]})
    assert score(one, SAID, retain_only=other)["forget_quality"].n == 1  # the others are not in question
    with pytest.raises(MetricError, match="lacks 1 of 2"):
        score(SETS, SAID, retain_only=score(one, SAID))
    with pytest.raises(MetricError, match="no forget_teacher_forced_truth_ratio"):
        score(SETS, SAID, retain_only={})


def test_an_encoder_of_ones_own():
    class Encoder:
        def encode(self, sentences):
            return [[1.0, 0.0] if "Oslo" in text else [0.0, 1.0] for text in sentences]

    found = score(SETS, SAID, judges=Judges(encoder=Encoder()))
    assert found["forget_generated_cosine_similarity"].agg_value == pytest.approx(1.0)
    assert "forget_efficacy_without_entailment_score" in found


def test_readings_are_what_plain_transformers_says(tiny_llama, tok_chat, tmp_path):
    """NLL of every given answer, and what is said, without any code of ours."""
    sets = read_tofu(write_tofu_files(tmp_path / "tofu")).only("forget", "world_facts").limited(2, seed=3)
    scores = compare_tofu((anatomy(tiny_llama), tok_chat), (anatomy(tiny_llama), tok_chat), sets, max_new_tokens=5)
    form = PromptFormat(tok_chat)
    for one in (sets.probes["forget"][1], sets.probes["world_facts"][0]):
        prompt = torch.tensor([form.encode(one.question).ids])
        read = scores.before[one]
        answer = torch.tensor([form.answer_ids(one.answer)])
        with torch.no_grad():
            logits = tiny_llama(torch.cat([prompt, answer], 1)).logits[0, prompt.shape[1] - 1 : -1]
            said = tiny_llama.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False
            )
        nll = torch.nn.functional.cross_entropy(logits, answer[0], reduction="none")
        assert read.answer.nll == pytest.approx(nll.tolist(), rel=1e-3)
        assert list(read.tokens) == said[0, prompt.shape[1] :].tolist()[: len(read.tokens)]
    loaded = LoadedModel.of(tiny_llama, tok_chat)
    for models in ((loaded, loaded), ((tiny_llama, tok_chat), loaded)):
        again = compare_tofu(*models, sets, max_new_tokens=5)
        assert again.before == scores.before and again.edited == scores.edited
        assert len(read.wrong) == 2
        assert read.paraphrase == pytest.approx(float(nll.mean()), rel=1e-3) or one.paraphrase is not None
        assert scores.after[one].tokens == read.tokens and scores.after[one].wrong == pytest.approx(read.wrong)
    assert scores.base.keys() == scores.edited.keys()
    alone = tofu_scores(anatomy(tiny_llama), tok_chat, sets, max_new_tokens=5)
    name = "forget_teacher_forced_probability"
    assert alone[name].agg_value == pytest.approx(scores.base[name].agg_value)


@pytest.fixture
def metrics():
    after = {**SAID, FORGET[0]: reading("<b>I don't know</b>", [LOG4, LOG4], [False, True], LOG4, [LOG4])}
    scores = TofuScores(score(SETS, SAID), score(SETS, after), SETS, SAID, after)
    told = {"editlib": "0", "protocol": "tofu", "mode": "batch", "limit": 2, "seed": 7, "max_new_tokens": 9}
    told |= {side: {"name": side, "sha256": "ab"} for side in ("base", "edited")}
    return {**told, **document(scores), "seconds": 1.0, "reference": None, "judges": {}, "receipt": None}


def test_both_models_stand_side_by_side(metrics, tmp_path):
    rows = {(row[0], row[1]): row[2:] for row in table_rows(metrics)}
    assert rows["Questions to forget", "rouge l recall (generated)"] == ["0.750", "0.500", "2", "↓"]
    assert rows["Questions to keep", "probability (teacher-forced)"] == ["0.500", "0.500", "1", "↑"]
    assert ("Together", "balance") in rows
    assert headline_of(metrics["scores"]["edited"])["forget_generated_rouge_l_recall"] == pytest.approx(0.5)
    assert "0.75 before and 0.50 after" in verdict(metrics)
    assert "At most 2 of each set were drawn (seed 7)" in conditions(metrics)
    assert "Not there: real authors" in conditions(metrics)
    items = {item["id"]: item for item in metrics["items"]}
    assert items["f:1"]["before"] == "Ada it is" and items["f:1"]["probability_after"] == pytest.approx(1 / 4)


def test_files_that_others_read(metrics, tmp_path):
    write_tofu(metrics | {"points": [{"batch": 1, "requests": 2, "balance": 0.5}]}, tmp_path)
    body = json.loads((tmp_path / "metrics.json").read_text())["scores"]["edited"]["forget_teacher_forced_probability"]
    assert body["agg_value"] == pytest.approx(1 / 4) and body["value_by_index"]["1"]["prob"] == pytest.approx(1 / 4)
    again = read_results(tmp_path / "edited.json")
    assert score(SETS, SAID, retain_only=again)["forget_quality"].agg_value <= 1.0
    page = (tmp_path / "report.html").read_text()
    assert "&lt;b&gt;I don" in page and "<b>I don" not in page
    assert "After every batch" in page and "src=" not in page and "http" not in page
    assert "| Questions to forget | rouge l recall (generated) | 0.750 | 0.500 | 2 | ↓ |" in (
        (tmp_path / "table.md").read_text()
    )
