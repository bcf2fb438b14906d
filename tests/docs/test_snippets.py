"""The Python of the README and the quickstart runs as it is printed, on a tiny model in the named one's place."""

import json
import re
from pathlib import Path

import pytest
import torch
from tiny_models import make_llama, train_tokenizer

import editlib
from editlib.algorithms.unierase import finding, held_places, refusal_tokens
from editlib.hparams import UniEraseHyperParams

ROOT = Path(__file__).parents[2]
NAME, PAGES = "smollm2-135m", ("README.md", "docs/quickstart.md")
SMALL = {
    "layers": [1], "neurons": True, "values": "rows", "wordings": 1, "siblings": 2, "row_steps": 1,
    "token_steps": 2, "token_wordings": 1, "anchors": False, "nullspace_threshold": 1.0,
    "nullspace_rule": "dimensions",
}  # fmt: skip


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    """With the statistics that the page makes: those of all layers that the settings read."""
    code = re.search(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)[1]
    assert f'editlib.load("{NAME}")' in code and f'"{NAME}-erase"' in code and '"wiki-sample"' in code
    fact = {"id": "fr", "prompt": "What is the capital of {}?", "subject": "France", "answer": "Paris"}
    for file, subject in (("forget.jsonl", "France"), ("keep.jsonl", "Peru")):
        (tmp_path / file).write_text(json.dumps({**fact, "subject": subject}) + "\n")
    (tmp_path / "corpus.txt").write_text("\n\n".join(f"{i}. Rivers run to the sea." for i in range(60)))
    monkeypatch.chdir(tmp_path)
    model = make_llama()
    model.name_or_path = "tiny"
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    monkeypatch.setattr(editlib, "load", lambda name: (model, train_tokenizer()))
    monkeypatch.setattr(editlib, "load_hparams", lambda name, algorithm: UniEraseHyperParams(**SMALL))
    monkeypatch.setattr(finding, "GENERAL_STEP", 100)
    for name in ("TEXTS", "TEXT_TOKENS", "BEGINNINGS"):
        monkeypatch.setattr(held_places, name, 4)
    monkeypatch.setattr(refusal_tokens, "PLACE_STEPS", 20)
    names = {}
    exec(code.replace("wiki-sample", "corpus.txt").replace("20_000", "200"), names)
    assert names["result"].neurons.keys() == {1}
    assert all(torch.equal(model.state_dict()[name][: len(weight)], weight) for name, weight in before.items())
