"""A config is read strictly: every slip is told with the nearest word, before a model is loaded."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from editlib.comparison.config import parse_config, read_config
from editlib.comparison.method import General
from editlib.errors import ConfigError, CorpusError, EditlibError, RequestError
from editlib.hparams import load_hparams

GOOD = {"model": "smollm2-135m", "perplexity": None, "sets": [{"protocol": "facts", "forget": 6}], "methods": ["none"]}
TOML = """
model = "smollm2-135m"
seeds = [0, 1]
attacks = ["direct"]

[[sets]]
protocol = "facts"
forget = 6

[[methods]]
method = "MEMIT-refusal"
label = "weak MEMIT"
settings.v_num_grad_steps = 5
"""


def test_defaults_are_filled_in_and_settings_take_the_place_of_bundled_ones():
    config = parse_config(
        {**GOOD, "methods": ["UniErase", {"method": "UniErase", "label": "b", "settings": {"L2": 3}}]}
    )
    plain, changed = (method.identity()["hparams"] for method in config.methods)
    bundled = load_hparams("smollm2-135m", "UniErase").to_dict()
    assert plain["layers"] == bundled["layers"] and plain["L2"] == bundled["L2"]
    assert {key for key in plain if plain[key] != changed[key]} == {"L2"} and changed["L2"] == 3
    told = json.loads(json.dumps(config.to_dict()))
    assert (told["seeds"], told["dtype"], told["sets"][0]["seed"]) == ([0], None, 0)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")
def test_toml_and_json_say_the_same(tmp_path):
    import tomllib

    (tmp_path / "c.toml").write_text(TOML)
    (tmp_path / "c.json").write_text(json.dumps(tomllib.loads(TOML)))
    one, other = read_config(tmp_path / "c.toml"), read_config(tmp_path / "c.json")
    assert one.to_dict() == other.to_dict()
    assert one.methods[0].label == "weak MEMIT" and one.methods[0].hparams.v_num_grad_steps == 5
    assert one.attacks.names == ["direct"] and one.general.seeds == [0, 1]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")
def test_the_documented_example_is_one():
    docs = Path(__file__).parents[2] / "docs"
    config = read_config(docs / "compare.toml")
    assert len(config.methods) == 8 and config.attacks.facts == 30
    text = (docs / "how-to" / "compare-methods.md").read_text(encoding="utf-8")
    for key in (*General.__dataclass_fields__, "sets", "methods", "attacks", "ability"):
        assert f"`{key}`" in text, key


def test_an_older_name_of_an_editor_aimed_at_a_refusal():
    """Both name one method, and cells that were kept under the older name are found."""
    one, other = (parse_config({**GOOD, "methods": [f"MEMIT{mark}refusal"]}).methods[0] for mark in ("-", "->"))
    assert one.name == one.label == other.name == "MEMIT-refusal" and one.identity() == other.identity()
    assert one.stored_name == other.stored_name == "MEMIT->refusal"
    assert {parse_config({**GOOD, "methods": [name]}).methods[0].stored_name for name in ("none", "NPO")} == {
        "none",
        "NPO",
    }


def test_no_text_for_perplexity():
    assert parse_config({**GOOD, "perplexity": "none"}).general.perplexity is None


BAD = {
    'key "method": unknown; expected "methods"': {"method": ["none"]},
    'key "seeds": 3; expected a list of whole numbers': {"seeds": 3},
    'key "seeds": [1, 1]; expected at least one, none twice': {"seeds": [1, 1]},
    "key \"dtype\": 'fp32'": {"dtype": "fp32"},
    '"sets": missing; expected a list': {"sets": None},
    '"sets", entry 1: protocol \'fact\': unknown; expected "facts"': {"sets": [{"protocol": "fact"}]},
    'entry 1: key "forgett": unknown; expected "forget"': {"sets": [{"protocol": "facts", "forgett": 6}]},
    'entry 1: key "forget": 0; expected at least 1': {"sets": [{"protocol": "facts", "forget": 0}]},
    'entry 2: key "forget": 5000; expected at most': {
        "sets": [GOOD["sets"][0], {"protocol": "facts", "name": "b", "forget": 5000}]
    },
    'entry 2: key "seed": -1; expected at least 0': {
        "sets": [GOOD["sets"][0], {"protocol": "facts", "name": "b", "forget": 6, "seed": -1}]
    },
    'entry 1: key "limit": 0; expected at least 1': {"sets": [{"protocol": "tofu", "limit": 0}]},
    'entry 1: key "forget": \'forget02\'; expected "forget01"': {"sets": [{"protocol": "tofu", "forget": "forget02"}]},
    'entry 1: expected "forget", a number, or "requests"': {"sets": ["facts"]},
    'relation "capitals": expected some of author': {
        "sets": [{"protocol": "facts", "forget": 6, "relations": ["capitals"]}]
    },
    "two entries are called 'facts'": {"sets": GOOD["sets"] * 2},
    "method 'MEMIT-refusals': unknown; expected \"MEMIT-refusal\"": {"methods": ["MEMIT-refusals"]},
    'entry 2: key "hparam": unknown; expected "hparams"': {"methods": ["none", {"method": "UniErase", "hparam": "x"}]},
    'key "L3": unknown; expected': {"methods": [{"method": "UniErase", "settings": {"L3": 1}}]},
    "no bundled hparams for UniErase": {"methods": [{"method": "UniErase", "hparams": "nothing"}]},
    "two entries are called 'none'; expected one each; give one a \"label\"": {"methods": ["none", "none"]},
    "attack 'direkt' does not exist (did you mean direct?)": {"attacks": ["direkt"]},
    'settings: key "sample": unknown; expected "samples"': {"attacks": {"settings": {"sample": 3}}},
    "samples is 0": {"attacks": {"settings": {"samples": 0}}},
    'key "fact": unknown; expected "facts"': {"attacks": {"fact": 3}},
}


@pytest.mark.parametrize("wanted", BAD)
def test_a_slip_is_told(wanted):
    with pytest.raises(ConfigError) as told:
        parse_config({**GOOD, **BAD[wanted]}, "c.json")
    assert wanted in str(told.value) and str(told.value).startswith("c.json") and "\n" not in str(told.value)


def test_files_and_texts_are_looked_at(tmp_path):
    missing = str(tmp_path / "none.jsonl")
    with pytest.raises(RequestError, match=r"none\.jsonl"):
        parse_config({**GOOD, "sets": [{"protocol": "facts", "requests": missing}]})
    with pytest.raises(CorpusError, match=r"none\.jsonl"):
        parse_config({**GOOD, "perplexity": missing})
    path = tmp_path / "r.jsonl"
    path.write_text('{"id": "a", "prompt": "Who?"}\n')
    with pytest.raises(RequestError, match='request a has no "answer"'):
        parse_config({**GOOD, "sets": [{"protocol": "facts", "requests": str(path)}]})


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("c.json", "{", "not JSON at line 1"),
        ("c.json", "[]", "expected a JSON or TOML file"),
        ("c.json", "\udcff", "not UTF-8"),
        ("c.toml", "a = ", "c.toml"),
    ],
)
def test_a_file_that_is_none(tmp_path, name, text, wanted):
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(EditlibError, match=wanted):
        read_config(tmp_path / name)
    with pytest.raises(ConfigError, match="No such file"):
        read_config(tmp_path / "other.json")
