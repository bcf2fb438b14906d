"""Places and texts of an edit: what is read of them, by plain passes of the model."""

import pytest
import torch

from editlib.algorithms.unierase import held_places, held_rows
from editlib.algorithms.unierase.held_places import HeldPlaces
from editlib.algorithms.unierase.refusal_places import Place, RefusalPlaces
from editlib.models.anatomy import anatomy
from editlib.models.prompts import TokenRow


@pytest.fixture(autouse=True)
def few_texts(monkeypatch):
    for name, value in (("TEXTS", 3), ("TEXT_TOKENS", 5), ("BEGINNINGS", 2)):
        monkeypatch.setattr(held_places, name, value)


@torch.no_grad()
def test_places_inside_answers_are_run_once_and_alike(tiny_llama, monkeypatch):
    anat = anatomy(tiny_llama)
    first, second = TokenRow((3, 4, 5, 6), 1), TokenRow((3, 4, 9, 8, 7), 1)
    inner, other = first.followed_by((11, 12)), TokenRow((3, 4, 2), 1)
    kept = [Place(row, None) for row in (second, inner, other, first, second)]
    places = RefusalPlaces((None,), kept=kept, answers=[(first, (11, 12, 13)), (second, (14,))])
    runs, plain = [], held_rows.forward
    monkeypatch.setattr(
        held_rows, "forward", lambda *args, **kwargs: runs.append(args[1].input_ids) or plain(*args, **kwargs)
    )
    held = HeldPlaces.of(anat, places)
    assert not runs
    _, at_kept, inside = held.final_states()
    assert sum(map(len, runs)) == 3 + 3 + 2  # two answers, the one question without an answer, and texts
    logits = [tiny_llama(torch.tensor([place.row.ids])).logits[0, -1] for place in kept]
    torch.testing.assert_close(at_kept.log_sums, torch.stack(logits).logsumexp(1), rtol=0, atol=1e-5)
    assert len(inside.states) == 4 + 2 + sum(rows.count for rows in held.texts)
    torch.testing.assert_close(anat.head(at_kept.states), torch.stack(logits), rtol=0, atol=1e-5)


@torch.no_grad()
def test_texts_are_what_the_model_writes(tiny_llama):
    """General answers are the greedy ones, read from the end of their question; no text but single tokens is alike."""
    anat = anatomy(tiny_llama)
    question = TokenRow((3, 4, 5), 1)
    held = HeldPlaces.of(anat, RefusalPlaces((None,), general=[question]), seed=1)
    answers, written, beginnings = held.texts
    ids = torch.tensor([question.ids])
    end = tiny_llama.generation_config.eos_token_id
    said = tiny_llama.generate(ids, attention_mask=ids.ne(-1), max_new_tokens=5, do_sample=False, pad_token_id=end)
    said = said[:, :-1] if said[0, -1] == end else said
    expected = tiny_llama(said).logits[0, len(question) - 1 :]
    torch.testing.assert_close(anat.head(answers.final_states().states), expected, rtol=0, atol=1e-5)
    assert 3 < written.count <= 3 * 6 and beginnings.count == 2
    again = HeldPlaces.of(anat, RefusalPlaces((None,), general=[question]), seed=1).texts[1]
    assert torch.equal(again.final_states().states, written.final_states().states)
    other = HeldPlaces.of(anat, RefusalPlaces((None,), general=[question]), seed=2).texts[1]
    assert other.count != written.count or not torch.equal(other.final_states().states, written.final_states().states)
    parts = held.final_states()[2].states
    assert len(parts) == sum(rows.count for rows in held.texts)
