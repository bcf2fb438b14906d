"""The parts that `anatomy` finds are the ones that the family's own code uses."""

import pytest
import torch
from families import FAMILIES, OPT_350M, SLOW, make
from transformers import GPT2Model, T5Config, T5ForConditionalGeneration

from editlib.errors import ModelError
from editlib.models.anatomy import anatomy
from editlib.models.outline import outline_of
from editlib.models.tracing import hidden_of

ALL = {**FAMILIES, **SLOW}


@pytest.mark.parametrize("family", ALL)
def test_finds_the_matrix_that_writes_the_mlp_into_the_residual_stream(family):
    model = make(family)
    anat = anatomy(model)
    assert anat.mlp_output_names[1] == ALL[family][1]
    assert (anat.n_layers, anat.d_model) == (4, 32)
    seen = []
    hook = model.get_submodule(ALL[family][1]).register_forward_hook(
        lambda _, args, out: seen.append((args[0], out.clone()))
    )
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7]]))
    hook.remove()
    keys, output = seen[0]
    assert keys.shape[-1] == anat.d_ff
    bias = getattr(anat.mlp_output(1), "bias", None)
    by_hand = keys @ anat.weight(1).T + (0 if bias is None else bias)
    torch.testing.assert_close(output, by_hand, rtol=1e-5, atol=1e-5)


def test_weight_is_a_view_that_writes_through(anat):
    assert anat.weight(2).shape == (32, 64)
    with torch.no_grad():
        anat.weight(2)[3, 5] = 7.0
    stored = dict(anat.model.named_parameters())[f"{anat.mlp_output_names[2]}.weight"]
    at = (5, 3) if stored.shape == (64, 32) else (3, 5)
    assert float(stored.detach()[at]) == 7.0


def test_square_mlp_takes_the_matrix_behind_the_up_projection():
    anat = anatomy(make("llama", intermediate_size=32))
    assert anat.mlp_output_names[0] == "model.layers.0.mlp.down_proj"
    anat = anatomy(make("gpt2", n_inner=32))
    assert anat.mlp_output_names[0] == "transformer.h.0.mlp.c_proj"


def test_tied_and_untied_heads(tiny_llama, tiny_llama_untied, tiny_gpt2):
    assert anatomy(tiny_llama).tied
    assert not anatomy(tiny_llama_untied).tied
    assert anatomy(tiny_gpt2).tied


def test_parts_follow_a_resized_vocabulary(tiny_llama):
    anat = anatomy(tiny_llama)
    tiny_llama.resize_token_embeddings(310)
    assert anat.tied
    assert anat.embedding.weight.shape == anat.head.weight.shape == (310, 32)


@pytest.mark.parametrize(("asked", "named"), [([0, 5], "5"), ([-1], "-1"), ([99, 2], "99")])
def test_layers_outside_the_model_are_named(anat, asked, named):
    with pytest.raises(ModelError, match=rf"layer {named} .*0-4"):
        anat.check_layers(asked)
    anat.check_layers([0, 4])


def test_other_kinds_of_models_are_refused(tiny_gpt2, tiny_llama):
    small = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 30}
    with pytest.raises(ModelError, match="encoder-decoder"):
        anatomy(T5ForConditionalGeneration(T5Config(**small)))
    with pytest.raises(ModelError, match="no output head"):
        anatomy(GPT2Model(tiny_gpt2.config))
    tiny_llama.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ModelError, match="quantised"):
        anatomy(tiny_llama)


@pytest.mark.parametrize("family", ["bert", "xlm-roberta", "electra", "roberta"])
def test_a_masked_language_model_is_no_causal_one(family, tmp_path):
    """It loads as one: then tokens attend to later ones. The same model as a decoder can be edited."""
    looks_ahead, causal = (make(family, is_decoder=decoder) for decoder in (False, True))
    for model, same in ((looks_ahead, False), (causal, True)):
        with torch.no_grad():
            first, other = (model(torch.tensor([[5, 6, last]])).logits[0, :2] for last in (7, 8))
        assert torch.allclose(first, other, atol=1e-5) == same
    with pytest.raises(ModelError, match=r"not a causal language model.*is_decoder"):
        anatomy(looks_ahead)
    looks_ahead.config.save_pretrained(tmp_path)  # without weights
    with pytest.raises(ModelError, match="not a causal language model"):
        outline_of(str(tmp_path))
    assert anatomy(causal).n_layers == 4


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("mixtral", {"num_local_experts": 4}),
        ("qwen2_moe", {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 32}),
        ("granitemoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
        ("gpt_oss", {"num_local_experts": 4, "head_dim": 8}),
    ],
)
def test_mixtures_of_experts_are_refused(family, options):
    """The shared expert of Qwen2-MoE is not the MLP's output: most of it comes from the routed ones."""
    with pytest.raises(
        ModelError, match=r"layers\.0 is a mixture-of-experts layer \(.*experts.*\).* use a dense model"
    ):
        anatomy(make(family, **options))


def test_layers_without_an_mlp_are_refused():
    """A state space model mixes tokens and nothing else."""
    with pytest.raises(ModelError, match=r"backbone\.layers\.0: expected one linear map .* none was found"):
        anatomy(make("mamba", state_size=4))


def test_layers_with_two_candidates_are_refused_by_name():
    model = make("llama")
    model.model.layers[2].adapter = torch.nn.ModuleDict({"up": torch.nn.Linear(64, 32)})
    with pytest.raises(ModelError, match=r"layers\.2: .* 2 were found \(mlp\.down_proj, adapter\.up\)"):
        anatomy(model)


def test_layers_of_different_width_are_refused():
    """`d_ff` is one number."""
    model = make("llama")
    mlp = model.model.layers[2].mlp
    mlp.gate_proj, mlp.up_proj = torch.nn.Linear(32, 48, bias=False), torch.nn.Linear(32, 48, bias=False)
    mlp.down_proj = torch.nn.Linear(48, 32, bias=False)
    with pytest.raises(ModelError, match=r"width|inputs"):
        anatomy(model)


@torch.no_grad()
def read_out(model, anat, ids):
    """Logits and the last layer's states in the model's own pass."""
    seen = []
    hook = anat.layers[-1].register_forward_hook(lambda _, __, out: seen.append(hidden_of(out).clone()))
    logits = model(ids, use_cache=False).logits
    hook.remove()
    return logits, seen[0]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ALL)
def test_the_final_norm_and_the_head_make_the_logits(family, tied):
    """Up to the scaling (Granite: / 3) or capping (Gemma 2: tanh at 30) that the family documents."""
    model = make(family, tie_word_embeddings=tied)
    anat = anatomy(model)
    assert anat.tied == (
        model.lm_head.weight is model.get_input_embeddings().weight if hasattr(model, "lm_head") else tied
    )
    logits, hidden = read_out(model, anat, torch.tensor([[5, 6, 7, 200]]))
    with torch.no_grad():
        own = anat.head(hidden if anat.final_norm is None else anat.final_norm(hidden))
    own = own / 3 if family == "granite" else own
    own = 30 * torch.tanh(own / 30) if family == "gemma2" else own
    torch.testing.assert_close(own, logits, rtol=1e-5, atol=1e-5)
    assert (anat.final_norm is None) == (family == "openai-gpt")
    if anat.final_norm is not None:
        assert anat.tail == (anat.final_norm,)
        path = next(name for name, module in model.named_modules() if module is anat.final_norm)
        assert not any(path.startswith(name) for name in anat.layer_names)


def test_embeddings_narrower_than_the_residual_stream():
    """OPT-350m projects in and out and has no final norm."""
    model = make("opt", **OPT_350M)
    anat = anatomy(model)
    assert (anat.d_model, anat.embedding.weight.shape[1]) == (32, 16)
    assert anat.mlp_output_names[1] == "model.decoder.layers.1.fc2"
    assert anat.weight(1).shape == (32, 64)
    assert anat.final_norm is None
    assert anat.tail == (model.model.decoder.project_out,)
    logits, hidden = read_out(model, anat, torch.tensor([[5, 6, 7]]))
    torch.testing.assert_close(anat.head(anat.tail[0](hidden)), logits)


def test_finding_the_norm_does_not_reach_those_who_watch(anat):
    """Hooks that a caller has set see no pass of ours, and are there afterwards."""
    seen = []
    handle = anat.head.register_forward_pre_hook(lambda _, args: seen.append(args))
    assert anat.final_norm is not None
    anatomy(anat.model)
    assert not seen
    anat.model(torch.tensor([[5]]))
    assert len(seen) == 1
    handle.remove()
    assert not anat.head._forward_pre_hooks


def test_dtype_is_no_matter():
    for family in FAMILIES:
        whole, half = anatomy(make(family)), anatomy(make(family).to(torch.bfloat16))
        assert whole.mlp_output_names == half.mlp_output_names
        assert type(whole.final_norm) is type(half.final_norm)
