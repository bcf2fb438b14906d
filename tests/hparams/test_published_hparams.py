"""The JSON files that people already have, as published, and ours for the same models."""

import json

import pytest

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
    with pytest.raises(HparamsError, match=r"mine\.json: does not say which algorithm.*--algorithm"):
        load_hparams(path)
    assert load_hparams(path, "rome").layers == [1]
    with pytest.raises(HparamsError, match=r"ROMEE.*unknown"):
        load_hparams(written(tmp_path, "other", {"layers": [1], "alg_name": "ROMEE"}))


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
