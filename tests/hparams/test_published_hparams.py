"""The JSON files that people already have, as published, and ours for the same models."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from editlib.editing import same_model
from editlib.errors import HparamsError
from editlib.hparams import ALGORITHMS, algorithm_of, available, load_hparams

GPT2 = {
    "layer_module_tmp": "transformer.h.{}",
    "mlp_module_tmp": "transformer.h.{}.mlp",
    "attn_module_tmp": "transformer.h.{}.attn",
    "ln_f_module": "transformer.ln_f",
    "mom2_dataset": "wikipedia",
    "mom2_n_samples": 100000,
    "mom2_dtype": "float32",
}
LLAMA = {
    "layer_module_tmp": "model.layers.{}",
    "mlp_module_tmp": "model.layers.{}.mlp",
    "attn_module_tmp": "model.layers.{}.self_attn",
    "ln_f_module": "model.norm",
    "lm_head_module": "lm_head",
    "mom2_dataset": "wikipedia",
    "mom2_n_samples": 100000,
    "mom2_dtype": "float32",
}
VALUES = {"fact_token": "subject_last", "v_lr": 5e-1, "v_weight_decay": 0.5, "kl_factor": 0.0625}
PUBLISHED = {
    "ROME/gpt2-xl": {
        "layers": [17], **VALUES, "v_num_grad_steps": 20, "v_loss_layer": 47, "clamp_norm_factor": 4,
        "mom2_adjustment": True, "context_template_length_params": [[5, 10], [10, 10]],
        "rewrite_module_tmp": "transformer.h.{}.mlp.c_proj", "lm_head_module": "transformer.wte", **GPT2,
    },
    "ROME/EleutherAI_gpt-j-6B": {
        "layers": [5], **VALUES, "v_num_grad_steps": 20, "v_loss_layer": 27, "clamp_norm_factor": 4,
        "mom2_adjustment": True, "context_template_length_params": [[5, 10], [10, 10]],
        "rewrite_module_tmp": "transformer.h.{}.mlp.fc_out", "lm_head_module": "lm_head", **GPT2,
    },
    "MEMIT/gpt2-xl": {
        "layers": [13, 14, 15, 16, 17], **VALUES, "v_num_grad_steps": 20, "v_loss_layer": 47,
        "clamp_norm_factor": 0.75, "layer_selection": "all", "mom2_adjustment": True, "mom2_update_weight": 20000,
        "rewrite_module_tmp": "transformer.h.{}.mlp.c_proj", "lm_head_module": "transformer.wte", **GPT2,
    },
    "AlphaEdit/Llama3-8B": {
        "model_name": "Llama3-8B", "layers": [4, 5, 6, 7, 8], **VALUES, "v_lr": 1e-1, "v_num_grad_steps": 25,
        "v_loss_layer": 31, "clamp_norm_factor": 0.75, "layer_selection": "all", "mom2_adjustment": True,
        "mom2_update_weight": 15000, "rewrite_module_tmp": "model.layers.{}.mlp.down_proj", **LLAMA,
        "nullspace_threshold": 2e-2, "L2": 10,
    },
    "AlphaEdit/gpt2-xl": {
        "model_name": "gpt2-xl", "layers": [13, 14, 15, 16, 17], **VALUES, "v_num_grad_steps": 20, "v_loss_layer": 47,
        "clamp_norm_factor": 0.75, "layer_selection": "all", "mom2_adjustment": True, "mom2_update_weight": 20000,
        "rewrite_module_tmp": "transformer.h.{}.mlp.c_proj", "lm_head_module": "lm_head", **GPT2,
        "nullspace_threshold": 2e-2, "L2": 10,
    },
}  # fmt: skip
EASYEDIT = {
    "alg_name": "AlphaEdit", "stats_dir": "./data/stats", "P_loc": "./null_space_project.pt", "device": 0,
    "model_parallel": False, "fp16": False, "batch_size": 1, "max_length": 40,
}  # fmt: skip


def written(folder, name, content):
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_load_as_they_are(tmp_path, name):
    path = written(tmp_path, name, PUBLISHED[name])
    loaded = load_hparams(path)
    assert loaded.algorithm == name.partition("/")[0] == algorithm_of(path)
    for key, value in PUBLISHED[name].items():
        assert (loaded.unused[key] if key in loaded.unused else getattr(loaded, key)) == value
    assert set(loaded.unused) <= {"attn_module_tmp", "ln_f_module", "lm_head_module"} | (
        {"mom2_adjustment", "mom2_update_weight"} - {"mom2_adjustment" if loaded.algorithm == "ROME" else ""}
    )


def test_easyedits_extra_keys_load(tmp_path):
    path = written(tmp_path, "anywhere", {**PUBLISHED["AlphaEdit/Llama3-8B"], **EASYEDIT})
    loaded = load_hparams(path)
    assert loaded.algorithm == "AlphaEdit"
    assert loaded.unused.keys() >= EASYEDIT.keys()


@pytest.mark.parametrize("name", ["MEMIT_seq", "RECT", "PRUNE", "EMMET", "NAS"])
def test_memits_files_serve_its_relatives(tmp_path, name):
    path = written(tmp_path, "MEMIT/gpt2-xl", PUBLISHED["MEMIT/gpt2-xl"])
    loaded = load_hparams(path, name)
    assert (loaded.algorithm, loaded.layers, loaded.mom2_update_weight) == (name, [13, 14, 15, 16, 17], 20000)


def test_a_file_that_does_not_say_its_algorithm(tmp_path):
    path = written(tmp_path, "mine", {"layers": [1]})
    with pytest.raises(HparamsError, match=r"mine\.json: names no algorithm.*--algorithm"):
        load_hparams(path)
    assert load_hparams(path, "rome").layers == [1]
    with pytest.raises(HparamsError, match=r"ROMEE.*unknown"):
        load_hparams(written(tmp_path, "other", {"layers": [1], "alg_name": "ROMEE"}))


YAML = """\
# EasyEdit's form
alg_name: "AlphaEdit"
model_name: "Qwen/Qwen2.5-7B-Instruct"
stats_dir: "./data/stats"
P_loc: "./null_space_project.pt"
device: 0
layers: [4, 5, 6, 7, 8]
clamp_norm_factor: 4
fact_token: "subject_last"
v_num_grad_steps: 25
v_lr: 5e-1
v_loss_layer: 27
v_weight_decay: 1e-3
kl_factor: 0.0625
mom2_adjustment: true
rewrite_module_tmp: "model.layers.{}.mlp.down_proj"
nullspace_threshold: 2e-2
L2: 1
"""


def text_file(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["qwen2.5-7b.yaml", "Ordner für Modelle/ключ.YML"])
def test_yaml_loads_as_json_does(tmp_path, name):
    loaded = load_hparams(text_file(tmp_path, name, YAML))
    assert loaded.algorithm == "AlphaEdit" and loaded.layers == [4, 5, 6, 7, 8]
    assert (loaded.v_lr, loaded.v_weight_decay, loaded.nullspace_threshold, loaded.L2) == (0.5, 1e-3, 0.02, 1.0)
    assert loaded.model_name == "Qwen/Qwen2.5-7B-Instruct" and set(loaded.unused) == {
        "alg_name", "stats_dir", "P_loc", "device", "mom2_adjustment",
    }  # fmt: skip


@given(value=st.floats(1e-30, 1e30), text=st.sampled_from(["{:e}", "{:g}", "{:.0e}", "{!r}"]))
def test_every_way_to_write_a_number_in_yaml(tmp_path_factory, value, text):
    number = text.format(value)
    path = text_file(tmp_path_factory.mktemp("yaml"), "a.yaml", f"layers: [1]\nv_lr: {number}\n")
    assert load_hparams(path, "MEMIT").v_lr == float(number)


def test_a_name_that_begins_like_a_number_stays_a_name(tmp_path):
    path = text_file(tmp_path, "a.yaml", "layers: [1]\nmodel_name: 7e2b-model\n")
    assert load_hparams(path, "MEMIT").model_name == "7e2b-model"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("layers: [1\n", r"not YAML at line 2 column 1"),
        ("- 1\n", r"\[1\]; expected a file with one flat YAML object"),
        ("", "None; expected"),
        ("layers: [1]\nvlr: 1\n", r'key "vlr": unknown; expected "v_lr"; rename it, or remove it'),
        ("layers: [1]\n3: 1\n", 'key "3": unknown'),
        ("layers: !!python/object:os.system [1]\n", "not YAML"),
    ],
)
def test_bad_yaml_is_one_line(tmp_path, text, said):
    with pytest.raises(HparamsError, match=said) as caught:
        load_hparams(text_file(tmp_path, "a.yaml", text), "MEMIT")
    assert str(caught.value).count("\n") == 0


FASTEDIT = {
    **LLAMA, "layers": [5], **VALUES, "v_num_grad_steps": 20, "v_lr": 0.1, "v_loss_layer": 31, "v_weight_decay": 0.001,
    "clamp_norm_factor": 4, "mom2_adjustment": False, "rewrite_module_tmp": "model.layers.{}.mlp.down_proj",
    "mom2_dtype": "float16",
}  # fmt: skip
EASYEDIT_FT = {
    "alg_name": "FT", "model_name": "./hugging_cache/Qwen2.5-7B", "device": 1, "layers": [27], "num_steps": 25,
    "batch_size": 1, "max_length": 40, "lr": 5e-4, "weight_decay": 0, "kl_factor": 0, "norm_constraint": False,
    "objective_optimization": "prompt_last", "rewrite_module_tmp": "model.layers.{}.mlp.down_proj.weight",
    "model_parallel": False,
}  # fmt: skip
PIECES = {**PUBLISHED["AlphaEdit/Llama3-8B"], "fact_token": "last", "window_size": 50, "overlap": 0}
NSE = {**PUBLISHED["MEMIT/gpt2-xl"], "alpha": 35, "upper_bound": 150, "max_iterations": 3, "neuron_threshold": 1.0}


def test_fastedits_statistics_say_nothing(tmp_path):
    loaded = load_hparams(written(tmp_path, "llama-7b", FASTEDIT), "ROME")
    assert loaded.mom2_adjustment is False and loaded.unused["mom2_dtype"] == "float16"
    with pytest.raises(HparamsError, match='mom2_dtype": \'float16\'; expected "float32"'):
        load_hparams(written(tmp_path, "used", {**FASTEDIT, "mom2_adjustment": True}), "ROME")


def test_easyedits_ft_has_no_limit_and_names_the_weight(tmp_path):
    loaded = load_hparams(written(tmp_path, "ft", EASYEDIT_FT))
    assert loaded.norm_constraint is None and loaded.rewrite_module_tmp == "model.layers.{}.mlp.down_proj"


@pytest.mark.parametrize(
    ("folder", "content", "ours", "idle"),
    [("AlphaEdit_ARE", PIECES, "AlphaEdit", "window_size"), ("NSE", NSE, "MEMIT", "neuron_threshold")],
)
def test_relatives_say_which_algorithm_their_settings_load_for(tmp_path, folder, content, ours, idle):
    path = written(tmp_path, f"{folder}/llama", content)
    for each in (path, written(tmp_path, "named", {**content, "alg_name": folder})):
        with pytest.raises(HparamsError, match=rf"{folder}.*not available.*--algorithm {ours}$"):
            load_hparams(each)
        assert idle in load_hparams(each, ours).unused


def test_alphaedits_own_command_names_l2_in_full(tmp_path):
    content = {**PUBLISHED["AlphaEdit/Llama3-8B"], "l2_regularization": 3.0}
    del content["L2"]
    assert load_hparams(written(tmp_path, "AlphaEdit/qwen", content)).L2 == 3.0


def test_easyedits_chat_keys_are_kept_aside(tmp_path, caplog):
    content = {**EASYEDIT_FT, "use_chat_template": True, "enable_thinking": False}
    with caplog.at_level("INFO"):
        loaded = load_hparams(written(tmp_path, "ft", content))
    assert loaded.unused["use_chat_template"] is True and "use_chat_template, enable_thinking" in caplog.text


def test_a_weight_decay_by_the_number_of_edits_is_told(tmp_path):
    content = {"layers": [21], "num_steps": 25, "lr": 5e-4, "weight_decay": False, "wd_power_law": [-0.87, 0.16]}
    with pytest.raises(HparamsError, match=r'FT/wd\.json: key "wd_power_law": .*expected "weight_decay" as a number'):
        load_hparams(written(tmp_path, "FT/wd", content))


@pytest.mark.parametrize("name", ["unke_ARE", "EAMET", "GRACE", "WISE"])
def test_settings_of_other_algorithms_are_one_line(tmp_path, name):
    for path in (
        written(tmp_path, f"{name}/llama", {"layers": [7], "optim_num_step": 50}),
        written(tmp_path, "named", {"layers": [7], "alg_name": name}),
    ):
        with pytest.raises(HparamsError, match=r"not available; expected one of FT, ROME.*UniErase$"):
            load_hparams(path)


@pytest.mark.parametrize(("theirs", "ours"), [("MEMIT_rect", "RECT"), ("MEMIT_prune", "PRUNE")])
def test_other_names_of_our_algorithms(tmp_path, theirs, ours):
    path = written(tmp_path, f"{theirs}/gpt2-xl", PUBLISHED["MEMIT/gpt2-xl"])
    assert load_hparams(path).algorithm == load_hparams(path, theirs).algorithm == ours


MODELS = ("gpt2-xl", "gpt-j-6b", "llama-3-8b", "llama-3.1-8b", "llama-3.2-1b", "llama-3.2-3b", "qwen2.5-7b")
DEPTHS = dict(zip(MODELS, (48, 28, 32, 32, 16, 28, 28), strict=True))


@pytest.mark.parametrize("algorithm", ["ROME", "MEMIT", "AlphaEdit"])
def test_ours_ship_and_say_where_their_figures_come_from(algorithm):
    assert set(available(algorithm)) >= {*MODELS, "smollm2-135m", "gemma3-270m"}
    for name in available(algorithm):
        loaded = load_hparams(f"{algorithm}/{name}")
        assert loaded.algorithm == algorithm and loaded.model_name == name and loaded.unused == {}
        assert set(loaded.notes) == {"published", "measured"} and all(loaded.notes.values())
        if name in DEPTHS:
            assert loaded.v_loss_layer == DEPTHS[name] - 1 and max(loaded.layers) < DEPTHS[name] / 2


@pytest.mark.parametrize(("name", "lr", "clamp"), [("llama-3.1-8b", 0.1, 0.75), ("llama-3.2-3b", 0.5, 4)])
def test_unierases_published_settings_ship(name, lr, clamp):
    loaded = load_hparams(f"UniErase/{name}")
    assert (loaded.layers, loaded.v_num_grad_steps, loaded.v_lr, loaded.clamp_norm_factor) == (
        [4, 5, 6, 7, 8], 10, lr, clamp,
    )  # fmt: skip
    assert (loaded.kl_factor, loaded.nullspace_threshold, loaded.L2, loaded.v_weight_decay) == (0.0625, 0.02, 10, 0.5)
    assert loaded.gate_layer is None and loaded.solve == "ridge" and loaded.unused == {}
    assert loaded.v_loss_layer == DEPTHS[name] - 1 and set(loaded.notes) == {"published", "measured"}


@pytest.mark.parametrize("name", ["ROME/gpt2-xl", "MEMIT/gpt2-xl", "AlphaEdit/gpt2-xl", "AlphaEdit/Llama3-8B"])
def test_ours_hold_the_published_values(tmp_path, name):
    theirs = load_hparams(written(tmp_path, name, PUBLISHED[name])).to_dict()
    ours = load_hparams(name.replace("Llama3-8B", "llama-3-8b")).to_dict()
    free = {"model_name", "notes", "layer_module_tmp", "mlp_module_tmp"}  # ours leave out what is found in the model
    free |= {"mom2_dataset", "mom2_n_samples"}  # and take whatever statistics there are
    assert {key: value for key, value in ours.items() if key not in free} == {
        key: value for key, value in theirs.items() if key not in free
    }


def test_every_algorithm_can_be_asked_for_in_any_case():
    for name in ALGORITHMS:
        assert available(name.lower()) == available(name)


@pytest.mark.parametrize(
    ("called", "name", "same"),
    [
        ("Llama3-8B", "meta-llama/Meta-Llama-3-8B", True),
        ("llama-3-8b", "meta-llama/Meta-Llama-3-8B", True),
        ("llama-3-8b", "meta-llama/Llama-3.1-8B", False),
        ("gpt2-xl", "openai-community/gpt2-xl", True),
        ("EleutherAI_gpt-j-6B", "EleutherAI/gpt-j-6b", True),
        ("gpt2-xl", "gpt2", False),
        ("smollm2-135m", "smollm2-135m", True),
        ("qwen2.5-7b", "Qwen/Qwen2.5-7B-Instruct", False),
    ],
)
def test_settings_know_their_model_by_many_spellings(called, name, same):
    assert same_model(called, name) == same
