"""Questions behind examples: what they show, and what an edit reads and writes there."""

import pytest
import torch

from editlib.algorithms.unierase import apply_unierase_to_model
from editlib.algorithms.unierase.catalogue import Catalogue
from editlib.algorithms.unierase.examples import few_shot_format
from editlib.algorithms.unierase.subject_rows import by_subject, subject_rows
from editlib.hparams import UniEraseHyperParams
from editlib.models.anatomy import anatomy
from editlib.models.prompts import PromptFormat
from editlib.requests.request import EditRequest
from editlib.stats.file import LayerStats

FRANCE = EditRequest(id="fr", prompt="What is the capital of {}?", subject="France", answer="Paris", relation="capital")


def fact(question, subject, answer, relation="currency"):
    return EditRequest(id=subject, prompt=question, subject=subject, answer=answer, relation=relation)


RETAIN = [
    fact("What is the money of {}?", "Japan", "yen"),
    fact("What is the money of {}?", "Peru", "sol"),
    fact("What is the money of {}?", "France", "euro"),
    fact("Where is the mayor of {}?", "Lyon", "in Paris", "mayor"),
    fact("What is the capital of {}?", "Spain", "Madrid", "capital"),
    fact("What is the opposite of {}?", "hot", "cold", "opposite"),
    fact("What is said of {}?", "rain", "a sentence that is far too long for a name", "saying"),
]


@pytest.mark.parametrize("seed", range(5))
def test_examples_ask_for_something_else_and_tell_nothing(tok, seed):
    form = few_shot_format(PromptFormat(tok), FRANCE, RETAIN, seed)
    assert sorted(form.shots) == sorted(
        [
            ("What is the money of Japan?", "yen"),
            ("What is the money of Peru?", "sol"),
            ("What is the opposite of hot?", "cold"),
        ]
    )
    assert few_shot_format(PromptFormat(tok), FRANCE, RETAIN, seed) == form


def test_too_few_facts_give_no_examples(tok):
    assert few_shot_format(PromptFormat(tok), FRANCE, RETAIN[:1]) is None
    assert few_shot_format(PromptFormat(tok), FRANCE, []) is None


def test_rows_in_few_shot_prompts_read_where_the_bare_answer_begins(tiny_llama, tok):
    anat, form = anatomy(tiny_llama), PromptFormat(tok)
    made = [
        subject_rows(
            anat,
            form,
            [FRANCE],
            RETAIN,
            by_subject([FRANCE]),
            siblings=0,
            examples=examples,
            catalogue=Catalogue.bundled(),
        ).rows
        for examples in (0, 1)
    ]
    (row,) = made[1][len(made[0]) :]
    text = few_shot_format(form, FRANCE, RETAIN).render(FRANCE.question)
    assert row.ids == tuple(tok(text, add_special_tokens=False)["input_ids"])
    assert text.index("hot") < text.index("France") and "cold" in text
    assert row.columns == (len(row.ids) - 1,) and row.targets == form.answer_ids("Paris")[:1]
    # The subject's last token is the changed one.
    assert tok.decode(row.ids[: row.places[0] + 1]).endswith("France")


@pytest.mark.parametrize("examples", [0, 1])
def test_the_key_of_a_request_is_the_mean_over_its_prompts(tiny_llama, tok, examples):
    """By plain passes through the model before the edit, at the first of the layers."""
    anat = anatomy(tiny_llama)
    options = {"layers": [0], "values": "rows", "say": False, "siblings": 1, "nullspace_threshold": 1.0}
    hparams = UniEraseHyperParams(**options, nullspace_rule="dimensions", anchors=False, example_wordings=examples)
    form = PromptFormat(tok)
    forms = [form, few_shot_format(form, FRANCE, RETAIN)][: 1 + examples]
    keys = []
    handle = anat.mlp_output(0).register_forward_pre_hook(lambda _, args: keys.append(args[0][0].double()))
    with torch.no_grad():
        for one in forms:
            row = one.encode(FRANCE.question, "France")
            tiny_llama(torch.tensor([row.ids]))
            keys[-1] = keys[-1][row.lookup]
    handle.remove()
    stats = {0: LayerStats(torch.eye(anat.d_ff, dtype=torch.float64), 8, 1)}
    result = apply_unierase_to_model(tiny_llama, tok, [FRANCE], hparams, retain=RETAIN, stats=stats)
    torch.testing.assert_close(result.keys[0][:, 0].double(), torch.stack(keys).mean(0), rtol=1e-4, atol=1e-4)
