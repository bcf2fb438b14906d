"""Hyper-parameters: published keys load, everything else is refused by name."""

import json
import logging
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from editlib.errors import HparamsError
from editlib.hparams import ALGORITHMS, HyperParams, UniEraseHyperParams, available, bundled, load_hparams
from editlib.settings import setting

ALPHAEDIT_LLAMA3_8B = {
    "model_name": "Llama3-8B",
    "layers": [4, 5, 6, 7, 8],
    "clamp_norm_factor": 0.75,
    "layer_selection": "all",
    "fact_token": "subject_last",
    "v_num_grad_steps": 25,
    "v_lr": 1e-1,
    "v_loss_layer": 31,
    "v_weight_decay": 0.5,
    "kl_factor": 0.0625,
    "mom2_adjustment": True,
    "mom2_update_weight": 15000,
    "rewrite_module_tmp": "model.layers.{}.mlp.down_proj",
    "layer_module_tmp": "model.layers.{}",
    "mlp_module_tmp": "model.layers.{}.mlp",
    "attn_module_tmp": "model.layers.{}.self_attn",
    "ln_f_module": "model.norm",
    "lm_head_module": "lm_head",
    "mom2_dataset": "wikipedia",
    "mom2_n_samples": 100000,
    "mom2_dtype": "float32",
    "nullspace_threshold": 2e-2,
    "L2": 10,
}


def written(tmp_path: Path, content: object, name: str = "mine.json") -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def bundle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *names: str) -> None:
    (tmp_path / "UniErase").mkdir()
    for name in names:
        written(tmp_path / "UniErase", {"layers": [3]}, f"{name}.json")
    monkeypatch.setattr(bundled, "_folder", lambda algorithm: tmp_path / algorithm)


def test_documented_defaults_fill_what_is_left_out():
    expected = {
        "layers": [4, 5], "model_name": None, "fact_token": "subject_last", "v_num_grad_steps": 25,
        "v_lr": 0.5, "v_loss_layer": None, "v_weight_decay": 0.5, "clamp_norm_factor": 4.0,
        "kl_factor": 0.0625,
        "early_stop_loss": 0.05, "rewrite_module_tmp": None, "layer_module_tmp": None, "mlp_module_tmp": None,
        "mom2_dataset": None, "mom2_n_samples": None, "mom2_dtype": "float32", "notes": "",
        "nullspace_threshold": 0.02, "nullspace_rule": "absolute", "L2": 10.0, "anchors": True,
        "anchor_weight": 1.0, "anchor_positions": "all", "max_anchors": None,
        "anchor_lookup_weight": 0.0, "anchor_known_weight": 0.0, "past_weight": 1.0, "text_weight": 0.0,
    }  # fmt: skip
    given = UniEraseHyperParams.from_dict({"layers": [4, 5]}).to_dict()
    assert {key: given[key] for key in expected} == expected


def test_every_key_has_a_help_text():
    assert [item.name for item in fields(UniEraseHyperParams) if not item.metadata.get("help")] == []


def test_published_alphaedit_file_loads_as_it_is(tmp_path, caplog):
    caplog.set_level(logging.INFO, "editlib.hparams")
    loaded = load_hparams(written(tmp_path, ALPHAEDIT_LLAMA3_8B), "UniErase")
    unused = {"mom2_adjustment", "mom2_update_weight"}
    unused |= {"attn_module_tmp", "ln_f_module", "lm_head_module"}
    assert loaded.unused == {key: ALPHAEDIT_LLAMA3_8B[key] for key in unused}
    for key in ALPHAEDIT_LLAMA3_8B.keys() - unused:
        assert getattr(loaded, key) == ALPHAEDIT_LLAMA3_8B[key], key
    assert isinstance(loaded.L2, float)
    assert len(caplog.records) == 1
    assert all(key in caplog.text for key in unused)


def test_nothing_is_logged_when_all_keys_are_used(caplog):
    caplog.set_level(logging.INFO, "editlib.hparams")
    UniEraseHyperParams.from_dict({"layers": [1]})
    assert caplog.records == []


def test_dict_round_trip_through_json():
    first = UniEraseHyperParams(layers=[2, 9], L2=1, notes={"paper": "é\u2028"}, max_anchors=7, anchors=False)
    assert UniEraseHyperParams.from_dict(json.loads(json.dumps(first.to_dict()))) == first
    assert first != UniEraseHyperParams(layers=[2, 9])


def test_a_list_changed_later_does_not_reach_in():
    layers = [1, 2]
    made = UniEraseHyperParams(layers=layers)
    layers.append(0)
    made.to_dict()["layers"].append(0)
    assert made.layers == [1, 2]


BAD_VALUES = [
    ("layers", [], "at least one"),
    ("layers", [5, 4], "rising"),
    ("layers", [4, 4], "none twice"),
    ("layers", [-1, 4], "at least 0"),
    ("layers", [4, 5.0], "a list of whole numbers"),
    ("layers", [True], "a list of whole numbers"),
    ("layers", "4-8", "a list of whole numbers"),
    ("layers", 4, "a list of whole numbers"),
    ("layers", None, "a list of whole numbers"),
    ("fact_token", "subject_middle", '"subject_last" or "last" or "subject_first"'),
    ("v_num_grad_steps", 0, "at least 1"),
    ("v_num_grad_steps", 25.0, "a whole number"),
    ("v_num_grad_steps", True, "a whole number"),
    ("v_lr", 0, "more than 0"),
    ("v_lr", "0.1", "a number"),
    ("v_lr", float("nan"), "more than 0"),
    ("v_lr", float("inf"), "more than 0"),
    ("v_lr", 10**400, "a number"),
    ("v_loss_layer", -1, "at least 0"),
    ("v_weight_decay", -0.5, "at least 0"),
    ("clamp_norm_factor", 0.0, "more than 0"),
    ("kl_factor", None, "a number"),
    ("early_stop_loss", -1, "at least 0"),
    ("nullspace_threshold", -0.02, "at least 0"),
    ("nullspace_rule", "relative", '"absolute" or "energy" or "dimensions"'),
    ("L2", -1, "at least 0"),
    ("L2", False, "a number"),
    ("anchor_weight", -1, "at least 0"),
    ("anchor_lookup_weight", -1, "at least 0"),
    ("anchor_known_weight", -1, "at least 0"),
    ("past_weight", -1, "at least 0"),
    ("text_weight", -0.5, "at least 0"),
    ("anchor_positions", "last", '"all" or "subject_last"'),
    ("anchors", 1, "true or false"),
    ("max_anchors", 0, "at least 1"),
    ("max_anchors", "all", "a whole number or null"),
    ("mom2_n_samples", 0, "at least 1"),
    ("mom2_dtype", "float16", '"float32"'),
    ("mom2_dataset", ["wikipedia"], "a string"),
    ("rewrite_module_tmp", "model.layers.mlp", 'one "{}"'),
    ("mlp_module_tmp", "{}.{}", 'one "{}"'),
    ("layer_module_tmp", 3, "a string or null"),
    ("notes", 3, "an object or a string"),
]


@pytest.mark.parametrize(("key", "value", "allowed"), BAD_VALUES)
def test_bad_value_is_quoted_with_what_is_allowed(key, value, allowed):
    with pytest.raises(HparamsError) as caught:
        UniEraseHyperParams.from_dict({"layers": [4], key: value}, where="mine.json")
    message = str(caught.value)
    assert message.startswith(f'mine.json: key "{key}": ')
    assert repr(value)[:60] in message
    assert allowed in message.split("expected", 1)[1]
    assert "\n" not in message


@pytest.mark.parametrize("rule", ["energy", "dimensions"])
def test_threshold_is_a_share_unless_the_rule_is_absolute(rule):
    assert UniEraseHyperParams(layers=[1], nullspace_threshold=1.5).nullspace_threshold == 1.5
    assert UniEraseHyperParams(layers=[1], nullspace_threshold=1, nullspace_rule=rule).nullspace_threshold == 1
    with pytest.raises(HparamsError, match=rf'"nullspace_threshold": 1\.5; expected a share .*"{rule}"'):
        UniEraseHyperParams(layers=[1], nullspace_threshold=1.5, nullspace_rule=rule)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("v_num_grad_step", '"v_num_grad_steps"'),
        ("l2", '"L2"'),
        ("nullspace_treshold", '"nullspace_threshold"'),
        ("clamp_norm", '"clamp_norm_factor"'),
        ("mom2_adjustmnt", '"mom2_adjustment"'),
        ("zzz", "one of layers, "),
        ("unused", "one of layers, "),
    ],
)
def test_unknown_key_names_the_nearest(tmp_path, key, nearest):
    path = written(tmp_path, {"layers": [4], key: 1})
    with pytest.raises(HparamsError) as caught:
        UniEraseHyperParams.from_json(path)
    assert str(caught.value).startswith(f'{path}: key "{key}": unknown; expected {nearest}')


def test_layers_have_no_default():
    with pytest.raises(HparamsError, match=r'^mine: key "layers": missing'):
        UniEraseHyperParams.from_dict({}, where="mine")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not JSON at line 1 column 1"),
        (b'{"layers": [4],\n "L2": }', "not JSON at line 2 column 8"),
        (b"[4]", "[4]; expected a file with one flat JSON object"),
        (b"layers:\n- 4\n", "not JSON at line 1"),
        (b'{"notes": "\xff"}', "not UTF-8"),
        (b'{"L2": ' + b"1" * 5000 + b"}", "5000"),
        (b"[" * 100_000, "one flat JSON object"),
    ],
)
def test_file_that_is_no_json_object(tmp_path, content, said):
    path = written(tmp_path, content)
    with pytest.raises(HparamsError) as caught:
        load_hparams(path, "UniErase")
    assert str(caught.value).startswith(f"{path}: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_file_that_is_not_there_or_a_directory(tmp_path):
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(HparamsError, match="check the path"):
            load_hparams(path, "UniErase")


def test_byte_order_mark_is_fine(tmp_path):
    assert load_hparams(written(tmp_path, b'\xef\xbb\xbf{"layers": [4]}'), "UniErase").layers == [4]


def test_bundled_settings_are_found_by_name(monkeypatch, tmp_path):
    bundle(monkeypatch, tmp_path, "smollm2-135m", "llama-3.2-1b")
    assert available("unierase") == ["llama-3.2-1b", "smollm2-135m"]
    loaded = load_hparams("llama-3.2-1b", "UniErase")
    assert isinstance(loaded, UniEraseHyperParams)
    assert loaded.layers == [3]
    with pytest.raises(HparamsError, match=r'smollm-135m: no bundled hparams .* "smollm2-135m"'):
        load_hparams("smollm-135m", "UniErase")
    with pytest.raises(HparamsError, match=r'HuggingFaceTB/SmolLM2-135M: no bundled hparams .* "smollm2-135m"'):
        load_hparams("HuggingFaceTB/SmolLM2-135M", "UniErase")


def test_a_folder_named_like_bundled_settings_is_no_trap(monkeypatch, tmp_path):
    bundle(monkeypatch, tmp_path, "smollm2-135m")
    (tmp_path / "smollm2-135m").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_hparams("smollm2-135m", "UniErase").layers == [3]


def test_all_bundled_settings_load():
    for algorithm in ALGORITHMS:
        for name in available(algorithm):
            assert load_hparams(name, algorithm).unused == {}, name


def test_unknown_algorithm_names_the_nearest():
    with pytest.raises(HparamsError, match='"UniErase"'):
        load_hparams("smollm2-135m", "UnErase")


def test_another_algorithm_is_a_few_lines():
    @dataclass(frozen=True, kw_only=True)
    class Other(HyperParams):
        share: float = setting(0.5, "a share", min=0, max=1)

    assert Other.from_dict({"layers": [1], "share": 1, "L2": 3}).unused == {"L2": 3}
    with pytest.raises(HparamsError, match=r'"share": 2\.0; expected at least 0 and at most 1'):
        Other(layers=[1], share=2)


def test_a_whole_number_too_big_for_a_float_is_no_traceback():
    assert UniEraseHyperParams(layers=[1], max_anchors=10**400).max_anchors == 10**400


TRAITS = ("chainable", "has_target", "uses_token", "takes_batches", "values_first", "refits_totals", "uses_statistics")


def test_what_is_asked_of_an_algorithm():
    made = {name: kind(layers=[2]) for name, kind in ALGORITHMS.items()}
    odd = {trait: {name for name, one in made.items() if not getattr(one, trait)} for trait in TRAITS}
    assert odd["chainable"] == odd["uses_statistics"] == {"FT"}
    assert odd["has_target"] == set(ALGORITHMS) - odd["uses_token"] == {"UniErase"}
    assert odd["takes_batches"] == {"ROME"} and odd["values_first"] == {"FT", "ROME"}
    assert set(ALGORITHMS) - odd["refits_totals"] == {"PRUNE"}
    assert not ALGORITHMS["ROME"](layers=[2], mom2_adjustment=False).uses_statistics
    gated = UniEraseHyperParams(layers=[2, 3], gate_layer=5, anchors=False)
    assert gated.edited_layers == [2, 3, 5] and not gated.holds_anchors and made["UniErase"].holds_anchors
    assert all(one.edited_layers == [2] for one in made.values())
