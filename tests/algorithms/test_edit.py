"""Writing updates layer by layer, against a dense loop with full forward passes; and taking them back."""

import copy

import pytest
import torch
from models.families import make
from reference.closed_form import alphaedit as dense_alphaedit
from reference.closed_form import moment, projector

from editlib.algorithms.closed_form import alphaedit, exact
from editlib.algorithms.edit import EditResult, Timer, layer_norms, write_layers
from editlib.algorithms.low_rank import LowRank
from editlib.algorithms.null_space import everything, null_space
from editlib.errors import EditError
from editlib.models.anatomy import anatomy

LAYERS = [1, 2, 4]
L2 = 0.5


def bits(model):
    """Every parameter's bytes."""
    return {name: p.detach().clone().contiguous().view(torch.uint8) for name, p in model.named_parameters()}


def alone(rows):
    """Every request in one context, its own question."""
    return [[row] for row in rows]


def changed(model, before):
    return {name for name, raw in bits(model).items() if not torch.equal(raw, before[name])}


@pytest.fixture
def job(anat, draw):
    """Rows, targets, and a second moment a layer with a null space of 3/4 of the dimensions."""
    rows = draw(9, 5, 12)
    generator = torch.Generator().manual_seed(6)
    targets = torch.randn(32, 3, generator=generator) * 3
    moments = {layer: moment(torch.randn(64, 16, generator=generator)) for layer in LAYERS}

    def solve(layer, keys, residual):
        return alphaedit(keys.mean, residual, null_space(moments[layer], 1e-9), l2=L2)

    return anat, rows, targets, moments, solve


@torch.no_grad()
def observe(model, module, row):
    """Input and output of a module in a full forward pass of one row."""
    seen = []
    hook = module.register_forward_hook(
        lambda _, args, out: seen.append((args[0][0].clone(), (out[0] if isinstance(out, tuple) else out)[0].clone()))
    )
    model(torch.tensor([row.ids]), use_cache=False)
    hook.remove()
    return seen[0]


def dense_loop(model, rows, targets, moments):
    """MEMIT's loop with AlphaEdit's formula: everything dense, one row at a time, nothing carried."""
    anat = anatomy(model)
    for i, layer in enumerate(LAYERS):
        module = anat.mlp_output(layer)
        keys = torch.stack([observe(model, module, row)[0][row.lookup] for row in rows], 1).double()
        states = torch.stack([observe(model, anat.layers[LAYERS[-1]], row)[1][row.lookup] for row in rows], 1)
        residual = (targets - states).double() / (len(LAYERS) - i)
        delta = dense_alphaedit(keys, residual, projector(moments[layer], 1e-9), L2)
        stored = dict(model.named_parameters())[f"{anat.mlp_output_names[layer]}.weight"]
        delta = delta if stored.shape == delta.shape else delta.T
        with torch.no_grad():
            stored.copy_((stored.double() + delta).to(stored.dtype))


def test_equals_the_dense_loop(job):
    anat, rows, targets, moments, solve = job
    twin, before = copy.deepcopy(anat.model), bits(anat.model)
    dense_loop(twin, rows, targets, moments)
    written = write_layers(anat, LAYERS, alone(rows), targets, solve)
    deltas, originals = written.deltas, written.originals
    assert changed(anat.model, before) == {f"{anat.mlp_output_names[layer]}.weight" for layer in LAYERS}
    wanted = dict(twin.named_parameters())
    for name, parameter in anat.model.named_parameters():
        torch.testing.assert_close(parameter, wanted[name], rtol=1e-4, atol=1e-4)
    for layer in LAYERS:
        moved = anat.weight(layer) - originals[layer]
        assert float(moved.norm()) > 0.1  # there was something to compare
        torch.testing.assert_close(moved, deltas[layer].dense().float(), rtol=1e-3, atol=1e-5)
        norms = layer_norms(deltas, originals)[layer]
        assert norms["update"] == pytest.approx(float(moved.norm()), rel=1e-4)
        assert norms["ratio"] == pytest.approx(float(moved.norm() / originals[layer].norm()), rel=1e-4)


def test_the_states_come_near_their_targets(job):
    """With a small ridge the last layer makes up the whole way."""
    anat, rows, targets, moments, _ = job

    def solve(layer, keys, residual):
        return alphaedit(keys.mean, residual, null_space(moments[layer], 1e-9), l2=1e-6)

    write_layers(anat, LAYERS, alone(rows), targets, solve)
    for i, row in enumerate(rows):
        reached = observe(anat.model, anat.layers[LAYERS[-1]], row)[1][row.lookup]
        torch.testing.assert_close(reached, targets[:, i], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("error", [EditError, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_error_puts_the_weights_back(job, error, dtype):
    anat, rows, targets, _, solve = job
    anat.model.to(dtype)
    before, seen = bits(anat.model), []

    def fails(layer, *args):
        seen.append(changed(anat.model, before))
        if layer == LAYERS[-1]:
            raise error("inside")
        return solve(layer, *args)

    with pytest.raises(error, match="inside"):
        write_layers(anat, LAYERS, alone(rows), targets, fails)
    assert len(seen[-1]) == 2  # two layers were written by then
    assert changed(anat.model, before) == set()


@pytest.mark.parametrize("part", ["left", "right"])
def test_an_update_that_is_not_finite_is_refused(job, part):
    anat, rows, targets, _, solve = job
    before = bits(anat.model)

    def damaged(layer, *args):
        delta = solve(layer, *args)
        if layer == LAYERS[-1]:
            getattr(delta, part)[0, 0] = float("inf")
        return delta

    with pytest.raises(EditError, match=r"layer 4 .*model is unchanged"):
        write_layers(anat, LAYERS, alone(rows), targets, damaged)
    assert changed(anat.model, before) == set()


def test_an_update_too_large_for_the_weights_dtype_is_refused(job):
    """Finite in fp64, but infinite once rounded to fp16."""
    anat, rows, targets, _, _ = job
    anat.model.to(torch.float16)
    before = bits(anat.model)

    def huge(layer, keys, residual):
        return LowRank(residual * 0 + 1e4, keys.mean.T * 0 + 10.0)

    with pytest.raises(EditError, match="model is unchanged"):
        write_layers(anat, [1], alone(rows), targets, huge)
    assert changed(anat.model, before) == set()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_revert_is_bit_for_bit(job, dtype):
    anat, rows, targets, _, solve = job
    anat.model.to(dtype)
    before = bits(anat.model)
    written = write_layers(anat, LAYERS, alone(rows), targets, solve)
    result = EditResult(written.deltas, written.originals)
    assert len(changed(anat.model, before)) == 3
    result.revert(anat.model)
    assert changed(anat.model, before) == set()
    assert all(p.dtype == dtype for p in anat.model.parameters())


def test_revert_works_on_a_copy_of_the_edited_model(job):
    anat, rows, targets, _, solve = job
    before = bits(anat.model)
    written = write_layers(anat, LAYERS, alone(rows), targets, solve)
    result = EditResult(written.deltas, written.originals)
    other = copy.deepcopy(anat.model)
    result.revert(other)
    assert changed(other, before) == set()
    assert len(changed(anat.model, before)) == 3


def test_training_mode_does_not_matter(tiny_gpt2, draw):
    rows, targets = draw(9, 5), torch.zeros(32, 2)
    seen = []

    def look(layer, keys, residual):
        seen.append((keys.mean, residual))
        return LowRank(residual * 0, keys.mean.T)

    write_layers(anatomy(tiny_gpt2), [3], alone(rows), targets, look)
    write_layers(anatomy(tiny_gpt2.train()), [3], alone(rows), targets, look)
    torch.testing.assert_close(seen[0], seen[1])


def test_timer_adds_up(monkeypatch):
    clock = iter([0.0, 1.5, 10.0, 10.25, 20.0, 24.0])
    monkeypatch.setattr("editlib.algorithms.edit.time.perf_counter", lambda: next(clock))
    timer = Timer()
    for name in ("keys", "keys"):
        with timer(name):
            pass
    with pytest.raises(RuntimeError), timer("solve"):
        raise RuntimeError
    assert timer.seconds == {"keys": 1.75, "solve": 4.0}


def test_keys_of_several_contexts_are_averaged(anat, draw):
    """The key of a request is the mean over its contexts; its state is that of the first one."""
    first, second, third = draw(9, 7, 5)
    seen = {}

    def look(layer, keys, residual):
        seen[layer] = keys.mean, residual, keys.plain
        return LowRank(residual * 0, keys.mean.T)

    targets = torch.zeros(32, 2)
    write_layers(anat, [1], [[first, second], [third]], targets, look)
    module = anat.mlp_output(1)
    mean = (
        observe(anat.model, module, first)[0][first.lookup] + observe(anat.model, module, second)[0][second.lookup]
    ) / 2
    torch.testing.assert_close(seen[1][0][:, 0].float(), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen[1][0][:, 1].float(), observe(anat.model, module, third)[0][third.lookup])
    state = observe(anat.model, anat.layers[1], first)[1][first.lookup]
    torch.testing.assert_close(seen[1][1][:, 0].float(), -state, rtol=1e-4, atol=1e-5)
    plain = observe(anat.model, module, first)[0][first.lookup]
    torch.testing.assert_close(seen[1][2][:, 0].float(), plain, rtol=1e-4, atol=1e-5)


def test_contexts_may_weigh_differently_in_the_key(anat, draw):
    rows = draw(9, 7, 5)
    seen = []

    def look(layer, keys, residual):
        seen.append(keys.mean)
        return LowRank(residual * 0, keys.mean.T)

    write_layers(anat, [1], [rows], torch.zeros(32, 1), look, weights=[[0.5, 0.3, 0.2]])
    each = [observe(anat.model, anat.mlp_output(1), row)[0][row.lookup] for row in rows]
    wanted = 0.5 * each[0] + 0.3 * each[1] + 0.2 * each[2]
    torch.testing.assert_close(seen[0][:, 0].float(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["granite", "gemma3_text", "olmo2"])
def test_a_scaled_branch_and_a_norm_behind_the_mlp_are_allowed_for(draw, family):
    """The published code adds the residual at the matrix, wherever that ends up: a state that can be had was missed."""
    model = make(family)
    anat, rows = anatomy(model), draw(9, 5, 12)
    matrix, generator = anat.mlp_output(2), torch.Generator().manual_seed(7)
    wish = 2 * torch.randn(3, 32, generator=generator)

    targets = []
    for row, change in zip(rows, wish, strict=True):  # the states that come of some change at the matrix
        moved = torch.zeros(1, len(row), 32)
        moved[0, row.lookup] = change
        hook = matrix.register_forward_hook(lambda _, args, out, moved=moved: out + moved)
        targets.append(observe(model, anat.layers[2], row)[1][row.lookup])
        hook.remove()

    def solve(layer, keys, residual):
        return exact(alphaedit(keys.mean, residual, everything(keys.mean), l2=1e-3), keys.mean)

    write_layers(anat, [2], alone(rows), torch.stack(targets, 1), solve)
    for row, target in zip(rows, targets, strict=True):
        got = observe(model, anat.layers[2], row)[1][row.lookup]
        torch.testing.assert_close(got, target, rtol=1e-3, atol=1e-3)


def test_a_timer_says_which_step_of_how_many_begins(caplog):
    caplog.set_level("INFO", "editlib")
    timer = Timer(["anchors", "values"])
    for name in ("anchors", "gate", "values", "values"):
        with timer(name):
            pass
    told = [record.getMessage() for record in caplog.records]
    assert told == ["edit, step 1 of 2: anchors", "edit, step 2 of 2: values"]
    assert list(timer.seconds) == ["anchors", "gate", "values"]
