"""What an edit of the MLP output matrix does to the layer's output, against plain passes of the edited model."""

import copy

import pytest
import torch
from families import FAMILIES, OPT_350M, make

from editlib.errors import ModelError
from editlib.models.anatomy import anatomy
from editlib.models.output_path import OutputPath
from editlib.models.residual_path import output_path
from editlib.models.tracing import hidden_of

LAYER = 2
NORMS = {"gemma2", "gemma3_text", "olmo2"}
CASES = {
    **{family: (family, {}) for family in FAMILIES},
    "opt-350m": ("opt", OPT_350M),
    "openai-gpt": ("openai-gpt", {}),
}


def build(case):
    family, options = CASES[case]
    return make(family, **options)


@torch.no_grad()
def observe(model, modules, ids):
    """Input and output of some modules at all positions, `[T, d]`, in the model's own pass."""
    seen = {}
    hooks = [
        module.register_forward_hook(
            lambda _, args, out, key=key: seen.__setitem__(
                key, [x.reshape(-1, x.shape[-1]).clone() for x in (args[0] if args else out, hidden_of(out))]
            )
        )
        for key, module in modules.items()
    ]
    model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_what_stands_behind_the_matrix(case, dtype):
    anat = anatomy(build(case).to(dtype))
    path = output_path(anat, LAYER)
    layer = anat.layers[LAYER]
    assert path.plain == (case not in {*NORMS, "granite", "opt-350m", "openai-gpt"})
    assert output_path(anat, 0).plain == path.plain
    if case in NORMS:
        assert path == OutputPath(layer.post_feedforward_layernorm)
    elif case == "opt-350m":
        assert path == OutputPath(layer.final_layer_norm)
    elif case == "openai-gpt":  # its layers share one activation module
        assert path == OutputPath(layer.ln_2)
    elif case == "granite":
        assert path.post is None
        assert path.scale == pytest.approx(0.22, rel=1e-6 if dtype == torch.float32 else 1e-3)
    else:
        assert path == OutputPath()


@pytest.mark.parametrize("case", CASES)
def test_an_edit_by_what_is_needed_changes_the_layer_by_what_is_wanted(case):
    """The weight gets the low-rank update that maps two keys to what is needed, and is read again."""
    model = build(case)
    anat = anatomy(model)
    path = output_path(anat, LAYER)
    ids, places = torch.tensor([[5, 60, 7, 200, 9]]), [1, 4]
    matrix, layer = anat.mlp_output(LAYER), anat.layers[LAYER]
    watched = {"matrix": matrix, "layer": layer, **({} if path.post is None else {"post": path.post})}
    before = observe(model, watched, ids)
    keys, written = before["matrix"][0][places].T, before["matrix"][1][places].T
    current = before["post"][0][places].T if path.post else written
    if case in NORMS:  # the norm reads W k + b
        torch.testing.assert_close(current, written)
    generator = torch.Generator().manual_seed(4)
    wanted = torch.randn(anat.d_model, 2, generator=generator)
    if path.post:  # a change that can be had: of another state that the norm could read
        with torch.no_grad():
            other = current + 3 * wanted
            wanted = (path.post(other.T) - path.post(current.T)).T
    change = path.invert(current, wanted)
    if path.plain:
        assert change is wanted
    torch.testing.assert_close(path.apply(current, change), wanted, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        anat.weight(LAYER).add_(change @ torch.linalg.pinv(keys))
    after = observe(model, watched, ids)
    moved = (after["layer"][1] - before["layer"][1])[places].T
    bound = 1e-3 if path.post else 1e-5
    assert float((moved - wanted).norm()) < bound * float(wanted.norm())
    # Taking the wish for the matrix's own change, as the published code does, is far off where it is not plain.
    if not path.plain:
        assert float((path.apply(current, wanted) - wanted).norm()) > 0.1 * float(wanted.norm())


@torch.no_grad()
def test_nothing_of_the_model_changes_and_no_one_sees_the_probe():
    model = make("gemma2").train()
    anat = anatomy(model)
    weights, seen = copy.deepcopy(model.state_dict()), []
    handle = anat.mlp_output(LAYER).register_forward_hook(lambda *_: seen.append(1))
    path = output_path(anat, LAYER)
    path.invert(torch.randn(32, 2), torch.randn(32, 2))
    handle.remove()
    assert not seen
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    for name, x in model.state_dict().items():
        assert torch.equal(x, weights[name]), name


def test_half_precision_norms_are_solved_in_full(draw):
    model = make("gemma3_text").to(torch.bfloat16)
    path = output_path(anatomy(model), LAYER)
    current = torch.randn(32, 3, generator=torch.Generator().manual_seed(1))
    twin = copy.deepcopy(path.post).float()
    with torch.no_grad():
        wanted = (twin(current.T + 1) - twin(current.T)).T
    change = path.invert(current, wanted)
    assert change.dtype == torch.float32
    with torch.no_grad():
        got = (twin((current + change).T) - twin(current.T)).T
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_factors_in_front_of_a_norm_and_behind_it():
    """A layer that scales its MLP's output before the norm and its norm's output after it."""
    model = make("olmo2")
    norm = model.model.layers[LAYER].post_feedforward_layernorm
    own = norm.forward

    class Between(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = norm

        def forward(self, x):
            return 0.25 * self.norm(2 * x + 1)

    model.model.layers[LAYER].post_feedforward_layernorm = between = Between()
    path = output_path(anatomy(model), LAYER)
    assert path.post is between  # the outermost module that reads the output
    current, generator = torch.randn(32, 2), torch.Generator().manual_seed(2)
    with torch.no_grad():
        wanted = (between(current.T + torch.randn(2, 32, generator=generator)) - between(current.T)).T
        change = path.invert(current, wanted)
        got = 0.25 * (own(2 * (current + change).T + 1) - own(2 * current.T + 1)).T
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
    # The same factors as the layer's own arithmetic.
    path = OutputPath(norm, scale=0.25, gain=2.0)
    with torch.no_grad():
        wanted = 0.25 * (norm(2 * (current.T + 1)) - norm(2 * current.T)).T
        change = path.invert(2 * current, wanted)
        got = 0.25 * (norm(2 * (current + change).T) - norm(2 * current.T)).T
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


def test_a_gate_behind_the_mlp_is_refused():
    model = make("llama")

    def gated(hidden_states, own=model.model.layers[LAYER].forward, **kwargs):
        return torch.tanh(own(hidden_states, **kwargs))

    model.model.layers[LAYER].forward = gated
    with pytest.raises(ModelError, match=r"layers\.2\.mlp\.down_proj: its output reaches the residual"):
        output_path(anatomy(model), LAYER)
    assert output_path(anatomy(model), LAYER - 1).plain
    with pytest.raises(ModelError, match="reaches the residual stream neither"):
        output_path(anatomy(make("rwkv")), LAYER)  # times a receptance that differs in every direction
