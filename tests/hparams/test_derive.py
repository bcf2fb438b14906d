"""Settings that are carried over to another form of model."""

import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from editlib.errors import HparamsError, ModelError
from editlib.hparams import ALGORITHMS, KNOWN, ModelShape, derive, find_hparams, load_hparams

SHAPES = st.builds(
    ModelShape,
    st.just("mine"),
    st.sampled_from(["qwen2", "llama", "gemma3_text", "olmo2", "new"]),
    st.integers(1, 200),
    st.sampled_from([64, 896, 4096]),
)
ABOUT = {"notes", "model_name", "rewrite_module_tmp", "layer_module_tmp", "mlp_module_tmp"}


def origin(found):
    """The bundled settings that these were carried over from."""
    return found.notes["from"].partition(".json")[0]


@given(SHAPES, st.sampled_from(sorted(ALGORITHMS)), st.none() | st.integers(0, 199))
def test_whatever_the_model_settings_fit_it(shape, algorithm, read_at):
    found = derive(algorithm, shape, read_at=read_at and min(read_at, shape.n_layers - 1))
    found.check_depth(shape.n_layers)  # the checks of the class itself ran as it was made
    assert found.algorithm == algorithm and found.model_name == "mine" and found.unused == {}
    reference = load_hparams(origin(found))
    depth = KNOWN[origin(found).partition("/")[2]].n_layers
    assert len(found.layers) <= 1.5 * len(reference.layers)
    if read_at is None:
        for mine, theirs in ((found.layers[0], reference.layers[0]), (found.layers[-1], reference.layers[-1])):
            assert abs(mine - theirs / (depth - 1) * (shape.n_layers - 1)) <= 0.5


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_fields_that_do_not_count_layers_are_copied(algorithm):
    cls = ALGORITHMS[algorithm]
    found = derive(algorithm, ModelShape("mine", "qwen2", 24, 896))
    reference = load_hparams(origin(found))
    moved = {*cls.depth_fields(), "nullspace_rule", "nullspace_threshold", *ABOUT}
    own = set(vars(cls).get("__annotations__", {})) if type(reference) is not cls else set()
    default = cls(layers=[1]).to_dict()
    for key, value in found.to_dict().items():
        if key not in moved:
            assert value == (default[key] if key in own else reference.to_dict()[key]), key


def test_a_24_layer_qwen_by_hand():
    """3 to 8 and 25 of 29 are .103, .276 and .862 of the depth: 2.4, 6.3 and 19.8 of 23."""
    found = derive("UniErase", ModelShape("mine", "qwen2", 24, 896))
    assert (found.layers, found.gate_layer) == ([2, 3, 4, 5, 6], 20)
    assert (found.nullspace_rule, found.nullspace_threshold) == ("energy", 0.3)
    assert set(found.notes) >= {"layers", "gate_layer", "nullspace_threshold", "from", "measured"}
    assert "8 of 30" in found.notes["layers"] and "1.00" in found.notes["measured"]
    assert "not on this model" in derive("MEMIT", ModelShape("mine", "qwen2", 24, 896)).notes["measured"]
    deep = derive("UniErase", ModelShape("mine", "llama", 80, 8192))
    assert deep.layers == [8, 11, 14, 16, 19, 22]  # as many as there were, not 15 matrices


def test_settings_that_erase_are_carried_over_too():
    """8 of 29 is 6.3 of 23; all else is relative to the model's own states, and stays."""
    found = derive("UniErase", ModelShape("mine", "qwen2", 24, 896), values="rows")
    reference = load_hparams("UniErase/smollm2-135m-erase")
    assert (found.values, found.neurons, found.layers, found.gate_layer) == ("rows", True, [6], None)
    assert (found.nullspace_rule, found.nullspace_threshold) == ("dimensions", 1.0)  # ordinary text is held by weight
    moved = {"layers", *ABOUT}
    kept = {key: value for key, value in reference.to_dict().items() if key not in moved}
    assert kept == {key: value for key, value in found.to_dict().items() if key not in moved}
    assert "8 of 30" in found.notes["layers"] and "nullspace_threshold" not in found.notes
    assert found.notes["all else"] == "as in UniErase/smollm2-135m-erase.json"
    assert "not on this model" in found.notes["measured"]  # what was measured is for values by descent
    assert derive("UniErase", ModelShape("mine", "qwen2", 24, 896), read_at=10, values="rows").layers < found.layers


def test_settings_that_erase_ship_for_the_form_that_they_were_measured_on():
    tuned = ModelShape("my-fine-tuned-copy", "llama", 30, 576)
    assert find_hparams("UniErase", tuned, values="rows").source == "UniErase/smollm2-135m-erase.json"
    assert find_hparams("unierase", tuned, values="descent").source == "UniErase/smollm2-135m.json"
    with pytest.raises(HparamsError, match="'row': expected one of descent, rows"):
        find_hparams("UniErase", tuned, values="row")
    with pytest.raises(HparamsError, match=r"MEMIT finds none in this way; expected UniErase"):
        derive("memit", tuned, values="rows")


@given(SHAPES, st.none() | st.integers(0, 199))
def test_settings_that_erase_fit_whatever_the_model(shape, read_at):
    found = derive("UniErase", shape, read_at=read_at and min(read_at, shape.n_layers - 1), values="rows")
    found.check_depth(shape.n_layers)
    assert found.values == "rows" and found.gate_layer is None and len(found.layers) <= 9


def test_a_trace_moves_the_layers_with_the_reading():
    same = derive("UniErase", KNOWN["smollm2-135m"], read_at=22)
    assert (same.layers, same.gate_layer) == ([3, 4, 5, 6, 7, 8], 25)
    shape = ModelShape("mine", "qwen2", 30, 896)
    lasts = [derive("UniErase", shape, read_at=read).layers[-1] for read in range(5, 28)]
    assert lasts == sorted(lasts) and lasts[0] < 8 < lasts[-1]
    early = derive("UniErase", shape, read_at=11)  # half of 22, and 3 of 7 layers above it become 8 of 18
    assert (early.layers, early.gate_layer) == ([2, 3, 4], 19)
    assert "layer 11" in early.notes["layers"]


def test_no_gate_where_it_has_no_place():
    assert derive("UniErase", KNOWN["olmo2-7b"]).gate_layer is None
    assert "norm" in derive("UniErase", KNOWN["olmo2-7b"]).notes["gate_layer"]
    assert derive("UniErase", KNOWN["qwen3-4b"], gated=False).gate_layer is None
    assert "too few" in derive("UniErase", ModelShape("flat", "llama", 1, 64)).notes["gate_layer"]


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_every_public_model_has_settings_by_its_name_and_by_its_form(algorithm, name):
    shape = KNOWN[name]
    by_name = load_hparams(f"{algorithm}/{name}")
    by_form = find_hparams(algorithm, shape)
    assert by_form.source == by_name.source and by_form.to_dict() == by_name.to_dict()
    by_name.check_depth(shape.n_layers)
    again = ALGORITHMS[algorithm].from_dict(json.loads(json.dumps(by_name.to_dict())))
    assert again == by_name and again.notes == by_name.notes and by_name.notes


def test_a_file_is_for_a_form_not_for_a_name():
    tuned = ModelShape("my-fine-tuned-copy", "llama", 30, 576)
    assert find_hparams("UniErase", tuned).source == "UniErase/smollm2-135m.json"
    assert (
        find_hparams("ROME", ModelShape("org_Meta-Llama-3-8B-Instruct", "llama", 32, 4096)).model_name == "llama-3-8b"
    )
    assert find_hparams("ROME", ModelShape("Llama-3.1-8B", "llama", 32, 4096)).model_name == "llama-3.1-8b"
    other = ModelShape("smollm2-135m", "qwen2", 24, 896)
    assert find_hparams("UniErase", other).source.startswith("derived from UniErase/smollm2-135m.json")


def test_a_configuration_without_layers_is_one_line():
    config = SimpleNamespace(model_type="odd", get_text_config=lambda decoder: config)
    with pytest.raises(ModelError, match=r"mine: its configuration \(odd\) lacks the number of layers.*--hparams"):
        ModelShape.of(config, "mine")


def test_settings_for_another_depth_are_refused_without_a_model():
    found = load_hparams("UniErase/smollm2-135m")
    found.check_depth(30)
    with pytest.raises(HparamsError, match=r'"gate_layer": layer 25 .* layers 0-23'):
        found.check_depth(24)
    with pytest.raises(HparamsError, match="v_loss_layer is 31"):
        load_hparams("ROME/llama-3-8b").check_depth(80)
