"""Settings for models never seen, from the command line down to an edit of each common architecture."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from models.families import make
from tiny_models import make_llama, train_tokenizer

from editlib import data
from editlib.algorithms.edit import EditState
from editlib.algorithms.unierase import finding as finding_module
from editlib.algorithms.unierase import held_places, refusal_tokens
from editlib.algorithms.unierase.token import TokenHeader, UnlearningToken
from editlib.baselines.refusal_edit import editor_hparams
from editlib.baselines.settings import BaselineSettings
from editlib.comparison.method import General
from editlib.comparison.methods import read_method
from editlib.editing import EditInputs, apply, check_settings
from editlib.errors import HparamsError
from editlib.finding import find_settings, fit_settings, in_words
from editlib.hparams import ALGORITHMS, KNOWN, ModelShape, available, derive, find_hparams, load_hparams
from editlib.models.weights import save_model
from editlib.requests.reading import read_requests, requests_hash
from editlib.requests.request import EditRequest
from editlib.stats.file import LayerStats
from editlib.workbench import Workbench

SIZES = [
    "qwen2.5-0.5b", "qwen2.5-7b", "qwen3-0.6b", "qwen3-8b", "llama-3.2-1b", "llama-3.1-8b", "llama-3.3-70b",
    "gemma3-1b", "gemma3-4b", "phi-4-mini", "olmo2-1b", "olmo2-7b", "mistral-7b", "smollm2-360m", "smollm3-3b",
]  # fmt: skip
ASKED = [
    EditRequest(id=place, prompt="The capital of {} is", subject=place, target_new=" Rome", relation="capital")
    for place in ("France", "Peru")
]
RETAIN = [EditRequest(id="river", prompt="Which river flows through {}?", subject="Bonn", relation="river")]


def tiny(name):
    """A random model of the architecture and depth of a public one, 32 wide."""
    options = {"pad_token_id": 0} if KNOWN[name].model_type == "phi3" else {}
    return make(KNOWN[name].model_type, num_hidden_layers=KNOWN[name].n_layers, **options)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("algorithm", ["UniErase", "MEMIT"])
def test_an_edit_runs_with_the_settings_of_each_public_model(tmp_path, name, algorithm):
    model = tiny(name)
    bench = Workbench.of(model, train_tokenizer(), tmp_path, name=name, progress=False)
    found = fit_settings(bench, derive(algorithm, ModelShape.of(model.config, name)))
    check_settings(bench, found)
    for one in (found, load_hparams(name, algorithm)):
        check_settings(bench, one)
    quick = {"v_num_grad_steps": 2, "context_templates": ["{}"], "kl_subject_prompts": 0, "gate_templates": ["{}"]}
    quick = {key: value for key, value in quick.items() if key in found.to_dict()}
    quick = type(found).from_dict({**found.to_dict(), **quick})
    anat = bench.anat
    stats = {layer: LayerStats(torch.eye(anat.d_ff, dtype=torch.float64), 8, 1) for layer in quick.statistics_layers}
    row = 0.1 * torch.randn(anat.embedding.weight.shape[1], generator=torch.Generator().manual_seed(0))
    token = UnlearningToken(row, row, TokenHeader("[UNL]", "", "", 0, 0, 0))
    before = {layer: anat.weight(layer).clone() for layer in quick.edited_layers}
    given = {"retain": RETAIN} if quick.uses_token else {}
    result = apply(bench, ASKED, quick, EditInputs(stats, token), state=EditState(), **given)
    assert set(result.deltas) <= set(quick.edited_layers) and set(result.deltas) >= set(quick.layers)
    assert all(not torch.equal(bench.anat.weight(layer), before[layer]) for layer in quick.layers)


ARCHITECTURES = [
    "qwen2.5-0.5b", "qwen3-0.6b", "llama-3.2-1b", "gemma3-1b", "phi-4-mini", "olmo2-1b", "mistral-7b", "smollm2-360m",
    "smollm3-3b",
]  # fmt: skip


@pytest.fixture
def little_text(monkeypatch):
    """Refusal tokens are fitted to little text, in few steps: no test here looks at where they are generated."""
    monkeypatch.setattr(finding_module, "GENERAL_STEP", 100)
    for name in ("TEXTS", "TEXT_TOKENS", "BEGINNINGS"):
        monkeypatch.setattr(held_places, name, 4)
    monkeypatch.setattr(refusal_tokens, "PLACE_STEPS", 20)


SHIPPED = [f"{algorithm}/{name}" for algorithm in sorted(ALGORITHMS) for name in available(algorithm)]


@pytest.fixture(scope="module")
def of_form():
    """`of_form(name)`: a workbench with a random model of a public one's form, 32 wide, made once for each form."""
    made = {}

    def of(name, folder):
        shape = KNOWN[name]
        if (key := (shape.model_type, shape.n_layers)) not in made:
            made[key] = tiny(name)
        return Workbench.of(made[key], train_tokenizer(), folder, name=name, progress=False)

    return of


@pytest.mark.parametrize("name", SHIPPED)
def test_a_whole_edit_runs_with_every_file_that_ships(tmp_path, little_text, of_form, name):
    """On a model of the file's own architecture and depth, as read from the file but for the length of its searches.
    The file's layers alone change, and `revert` brings every weight back."""
    algorithm, file = name.split("/")
    bench = of_form(re.sub(r"-(erase|many)$", "", file), tmp_path)
    settings = load_hparams(name)
    check_settings(bench, settings)
    quick = {
        "v_num_grad_steps": 2, "num_steps": 2, "context_templates": ["{}"], "kl_subject_prompts": 0,
        "gate_templates": ["{}"], "erase_margin": -30.0, "row_steps": 1, "siblings": 1, "wordings": 0, "token_steps": 2,
        "token_wordings": 0,
    }  # fmt: skip
    quick = {key: value for key, value in quick.items() if key in settings.to_dict()}
    settings = type(settings).from_dict({**settings.to_dict(), **quick})
    anat = bench.anat
    # Like a real moment's, the eigenvalues span four orders of magnitude: some are below any published threshold.
    moment = torch.logspace(-3, 1, anat.d_ff, dtype=torch.float64).diag()
    stats = {layer: LayerStats(8 * moment, 8, 1) for layer in settings.statistics_layers if settings.uses_statistics}
    row = 0.1 * torch.randn(anat.embedding.weight.shape[1], generator=torch.Generator().manual_seed(0))
    token = UnlearningToken(row, row, TokenHeader("[UNL]", "", "", 0, 0, 0)) if settings.uses_token else None
    before = {layer: anat.weight(layer).clone() for layer in range(anat.n_layers)}
    given = {"state": EditState()} | ({"retain": RETAIN} if settings.takes_retain else {})
    asked = [replace(one, answer="Rome") for one in ASKED]
    result = apply(bench, asked, settings, EditInputs(stats, token), **(given if algorithm != "FT" else {}))
    changed = {layer for layer in before if not torch.equal(anat.weight(layer), before[layer])}
    assert set(settings.layers) <= changed <= set(settings.edited_layers)
    result.revert(bench.model)
    assert all(torch.equal(anat.weight(layer), before[layer]) for layer in before)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_answer_is_erased_with_the_settings_of_each_architecture(tmp_path, little_text, name):
    model = tiny(name)
    bench = Workbench.of(model, train_tokenizer(), tmp_path, name=name, progress=False)
    found = fit_settings(bench, derive("UniErase", ModelShape.of(model.config, name), values="rows"))
    check_settings(bench, found)
    assert found.values == "rows" and found.layers == derive("UniErase", KNOWN[name], values="rows").layers
    # A random model knows no answer: one is erased that is rarer than any.
    quick = {"erase_margin": -30.0, "row_steps": 1, "siblings": 1, "wordings": 0, "token_steps": 2, "token_wordings": 0}
    quick = type(found).from_dict({**found.to_dict(), **quick})
    anat = bench.anat
    stats = {layer: LayerStats(torch.eye(anat.d_ff, dtype=torch.float64), 8, 1) for layer in quick.statistics_layers}
    before = {layer: anat.weight(layer).clone() for layer in quick.layers}
    asked = [replace(one, answer="Rome") for one in ASKED]
    result = apply(bench, asked, quick, EditInputs(stats), state=EditState(), retain=RETAIN)
    assert all(not torch.equal(bench.anat.weight(layer), before[layer]) for layer in quick.layers)
    assert result.token.names[0] == "[UNL]" and all("rows" in one for one in result.diagnostics)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_file_of_settings_for_each_architecture(call, tmp_path, name):
    """Each number has a note, and the file reads itself, for both ways to find values."""
    (tmp_path / "model").mkdir()
    save_model(tiny(name), train_tokenizer(chat=True), tmp_path / "model")
    for values in ("descent", "rows"):
        path = tmp_path / f"{values}.json"
        code, _, err = call("hparams", "new", tmp_path / "model", "--values", values, "--out", path)
        assert code == 0, err
        written, read = json.loads(path.read_text()), load_hparams(path)
        assert (read.algorithm, read.values) == ("UniErase", values)
        assert {"alg_name": "UniErase", **read.to_dict()} == written
        assert set(written["notes"]) >= {"from", "layers", "templates", "all else", "measured"}
        # Settings that erase take no null space, whose threshold would be another model's.
        assert ("nullspace_threshold" in written["notes"]) == (values == "descent")
        descent = "2-5 of 18" if "gemma" in name else "3-8 of 30"
        reference = descent if values == "descent" else "8 of 30"
        assert written["notes"]["layers"].startswith(f"{reference} layers, by share of depth")
        read.check_depth(KNOWN[name].n_layers)
        for file in (tmp_path / "model").glob("*.safetensors"):
            file.rename(file.with_suffix(".away"))
        code, said, err = call("hparams", "new", tmp_path / "model", "--values", values, "--no-trace")
        for file in (tmp_path / "model").glob("*.away"):
            file.rename(file.with_suffix(".safetensors"))
        assert code == 0 and json.loads(said)["layers"] == written["layers"], err


@pytest.fixture
def unseen(tmp_path):
    """A folder with a 24-layer Qwen2."""
    path = tmp_path / "qwen"
    path.mkdir()
    save_model(tiny("qwen2.5-0.5b"), train_tokenizer(chat=True), path)
    return path


def test_settings_are_found_before_a_weight_is_read(unseen, caplog):
    for file in unseen.glob("*.safetensors"):
        file.unlink()
    with caplog.at_level("INFO"):
        found = find_settings(str(unseen), "UniErase")
    assert (found.layers, found.gate_layer) == ([2, 3, 4, 5, 6], 20)
    assert [record.message for record in caplog.records] == [
        f"settings for qwen (qwen2, 24 layers, width 32): {found.source}"
    ]
    with pytest.raises(HparamsError, match=r'"gate_layer": layer 25 .* layers 0-23.*leave --hparams out'):
        find_settings(str(unseen), "UniErase", "smollm2-135m")


def test_packaged_models_need_not_be_here(monkeypatch):
    monkeypatch.setattr("editlib.models.source.fetch", None)
    assert find_settings("smollm2-135m", None).source == "UniErase/smollm2-135m.json"
    assert find_settings("gemma3-270m", "memit").source == "MEMIT/gemma3-270m.json"


def test_an_adapter_has_its_bases_settings(tmp_path):
    adapter = {"base_model_name_or_path": "smollm2-135m", "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    assert find_settings(str(tmp_path), "UniErase").source == "UniErase/smollm2-135m.json"


def test_a_copy_under_another_name_is_no_other_model(tmp_path, caplog, monkeypatch):
    """What was found for a model of this very form is meant for it, whatever its folder is called."""
    model = make_llama()
    bench = Workbench.of(model, train_tokenizer(), tmp_path, name="mine", progress=False)
    found = type(load_hparams("MEMIT/smollm2-135m"))(layers=[1], model_name="twin")
    check_settings(bench, found)
    assert "these settings were found for twin" in caplog.text
    caplog.clear()
    monkeypatch.setitem(KNOWN, "twin", ModelShape.of(model.config, "twin"))
    check_settings(bench, found)
    assert not caplog.text


def test_only_derived_settings_are_fitted(tmp_path, unseen):
    bench = Workbench.load(str(unseen), tmp_path, progress=False)
    given = find_hparams("UniErase", KNOWN["smollm2-135m"])
    assert fit_settings(bench, given) is given
    # A trace that this model would not have by itself: it knows nothing.
    found = fit_settings(bench, derive("UniErase", ModelShape("q", "qwen2", 24, 32)))
    assert found.source.startswith("derived") and found.layers == [2, 3, 4, 5, 6]


def test_a_norm_that_no_list_names_takes_the_gate_out(tmp_path):
    bench = Workbench.of(make("olmo2"), train_tokenizer(), tmp_path, name="o", progress=False)
    found = fit_settings(bench, derive("UniErase", ModelShape("o", "new", 4, 32)))
    assert found.gate_layer is None
    check_settings(bench, found)


@pytest.fixture
def traced(monkeypatch):
    """A model whose answers are read up to layer 14 by its trace."""
    calls = []

    def trace(*given):
        calls.append(given)
        return SimpleNamespace(read_at=14)

    monkeypatch.setattr("editlib.workbench.causal_trace", trace)
    return calls


def test_the_trace_is_made_once(tmp_path, unseen, traced):
    bench = Workbench.load(str(unseen), tmp_path, progress=False)
    shape = ModelShape.of(bench.model.config, "qwen")
    for algorithm in ("MEMIT", "UniErase", "AlphaEdit"):
        assert fit_settings(bench, derive(algorithm, shape)) == derive(algorithm, shape, read_at=14)
    assert len(traced) == 1


def test_a_comparison_and_a_baseline_take_the_trace_over(tmp_path, unseen, traced):
    """As `unlearn` and `edit` do; single settings of the config stay."""
    bench = Workbench.load(str(unseen), tmp_path, progress=False)
    shape = ModelShape.of(bench.model.config, "qwen")
    general = General(model=str(unseen))
    for name, algorithm in (("UniErase", "UniErase"), ("MEMIT-refusal", "MEMIT")):
        by_depth = find_settings(str(unseen), algorithm)
        method = read_method({"method": name, "settings": {"v_num_grad_steps": 3}}, "here", general)
        assert method.hparams.layers == by_depth.layers and method.hparams.v_num_grad_steps == 3
        method.fit(bench)
        fitted = derive(algorithm, shape, read_at=14)
        assert method.hparams.to_dict() == {**fitted.to_dict(), "v_num_grad_steps": 3, "model_name": "qwen"}
        assert fitted.layers != by_depth.layers
    assert editor_hparams("MEMIT", bench, BaselineSettings()).layers == derive("MEMIT", shape, read_at=14).layers


def test_the_file_is_complete_and_reads_itself(call, unseen, tmp_path):
    path = tmp_path / "mine.json"
    code, said, err = call("hparams", "new", unseen, "--out", path)
    assert code == 0 and "mine.json" in said, err
    written = json.loads(path.read_text())
    read = load_hparams(path)
    assert {"alg_name": "UniErase", **read.to_dict()} == written
    assert written["notes"]["layers"].startswith("3-8 of 30") and read.algorithm == "UniErase"
    code, said, _ = call("hparams", "new", unseen, "--algorithm", "EMMET", "--no-trace")
    assert code == 0 and json.loads(said)["emmet_lambda"] == 0.1
    code, said, _ = call("hparams", "new", "smollm2-135m", "--algorithm", "ROME")
    assert json.loads(said)["notes"]["from"] == "ROME/smollm2-135m.json"
    for args, words in ((("--algorithm", "ROMEE"), '"ROME"'), (("--out", path), "exists")):
        code, _, err = call("hparams", "new", unseen, *args)
        assert code == 2 and words in err and err.count("\n") == 1


def test_an_unseen_model_is_made_to_forget_by_erasing(call, little_text, tmp_path):
    unseen = tmp_path / "qwen"
    unseen.mkdir()
    save_model(make("qwen2", num_hidden_layers=8), train_tokenizer(chat=True), unseen)
    path, asked, corpus = tmp_path / "rows.json", tmp_path / "ask.jsonl", tmp_path / "text.txt"
    fact = {"id": "q", "prompt": "What is the capital of {}?", "subject": "France", "answer": "Paris"}
    asked.write_text(json.dumps(fact) + "\n")
    corpus.write_text("\n\n".join(f"The river {i} flows through Basel and Bonn." for i in range(60)))
    assert call("hparams", "new", unseen, "--values", "rows", "--no-trace", "--out", path)[0] == 0
    quick = {"row_steps": 1, "siblings": 1, "wordings": 0, "token_steps": 2, "token_wordings": 0}
    path.write_text(json.dumps({**json.loads(path.read_text()), **quick}))
    common = ["--stats-dir", tmp_path / "stats", "--corpus", corpus]
    kept = tmp_path / "keep.jsonl"
    kept.write_text(json.dumps({"id": "k", "prompt": "Which river flows through {}?", "subject": "Bonn"}) + "\n")
    given = ("--requests", asked, "--retain", kept, "--hparams", path, "--out", tmp_path / "out")
    code, _, err = call("unlearn", unseen, *given, *common)
    assert code == 0 and "found for" not in err, err
    receipt = json.loads((tmp_path / "out" / "editlib.json").read_text())
    assert (receipt["hparams"]["values"], receipt["hparams"]["layers"]) == ("rows", [2])
    assert receipt["neurons"].keys() == {"2"}
    code, _, err = call("hparams", "new", unseen, "--algorithm", "ROME", "--values", "rows")
    assert code == 2 and "ROME finds none in this way" in err and err.count("\n") == 1


def test_unlearning_needs_no_settings(call, unseen, tmp_path, monkeypatch):
    """It took SmolLM2's for every model, and stopped on one with fewer layers."""
    asked, corpus = tmp_path / "ask.jsonl", tmp_path / "text.txt"
    asked.write_text(json.dumps({"id": "q", "prompt": "What is the capital of France?"}) + "\n")
    corpus.write_text("\n\n".join(f"The river {i} flows through Basel and Bonn." for i in range(60)))
    few = data.facts()[::40]  # of a thousand
    monkeypatch.setattr(data, "facts", lambda: few)
    call("token", unseen, "--steps", 3, "--stats-dir", tmp_path / "stats")
    common = ["--stats-dir", tmp_path / "stats", "--corpus", corpus]
    code, _, err = call("unlearn", unseen, "--requests", asked, "--out", tmp_path / "out", *common)
    assert code == 0, err
    receipt = json.loads((tmp_path / "out" / "editlib.json").read_text())
    assert receipt["hparams_source"].startswith("derived from UniErase/smollm2-135m.json")
    assert receipt["guessed_subjects"] == {"q": "France"}
    assert receipt["requests_sha256"] == requests_hash(read_requests(asked))  # later commands read the file as it is
    assert receipt["hparams"]["layers"] == [2, 3, 4, 5, 6] and "3-8 of 30" in receipt["hparams"]["notes"]["layers"]
    code, _, err = call("chain", "init", tmp_path / "chain", "--model", unseen, *common)
    assert code == 0, err
    record = json.loads((tmp_path / "chain" / "chain.json").read_text())
    assert record["hparams_source"] == receipt["hparams_source"] and record["hparams"]["gate_layer"] == 20
    code, _, err = call("edit", unseen, "--requests", asked, "--out", tmp_path / "no")
    assert code == 2 and "--algorithm" in err and err.count("\n") == 1


@pytest.mark.parametrize("answers", [["Paris", "Lima"], ["Paris", None]])
def test_answers_are_erased_where_every_request_has_one(call, caplog, unseen, tmp_path, answers):
    """Without settings; a request without an answer is named, and all are refused as published."""
    asked = tmp_path / "ask.jsonl"
    rows = [
        {"id": place, "prompt": "What is the capital of {}?", "subject": place} | ({"answer": a} if a else {})
        for place, a in zip(("France", "Peru"), answers, strict=True)
    ]
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    caplog.set_level("INFO", "editlib.finding")
    code, said, err = call("unlearn", unseen, "--requests", asked, "--show-rows")
    if None in answers:
        assert code == 2 and "descent" in err and 'ask.jsonl:2 has no "answer" to erase' in caplog.text
    else:
        assert code == 0 and "Peru" in said and "to erase" not in caplog.text
        assert "derived from UniErase/smollm2-135m-erase.json" in caplog.text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("UniErase/smollm2-135m", ["smollm2-135m", "layers 3, ", "hidden"]),
        ("UniErase/smollm2-135m-erase", ["smollm2-135m-erase", "erased"]),
        ("MEMIT/smollm2-135m", ["MEMIT", "replaced"]),
    ],
)
def test_given_settings_are_told_in_one_line(name, words):
    said = in_words(load_hparams(name))
    assert "\n" not in said and len(said) < 200
    for word in words:
        assert word in said, said
