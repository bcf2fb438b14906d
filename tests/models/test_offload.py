"""Models that accelerate has spread over devices, CPU memory and disk."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from families import make
from test_forward import check, state_of, through_the_parts
from tiny_models import make_llama

from editlib.algorithms.memit import apply_memit_to_model
from editlib.errors import ModelError
from editlib.hparams import MEMITHyperParams
from editlib.models.anatomy import anatomy
from editlib.models.forward import forward
from editlib.models.prompts import pad
from editlib.models.residual_path import output_path
from editlib.models.vocabulary import write_rows
from editlib.requests.request import EditRequest
from editlib.stats.file import LayerStats

IDS = torch.tensor([[5, 60, 7]])


def spread(model, folder, **places):
    """Everything on the CPU but the named layers, whose weights accelerate fetches for each pass."""
    anat = anatomy(model)
    device_map = {name: "cpu" for name, _ in model.named_modules() if name in (*anat.layer_names, "lm_head")}
    device_map |= {f"model.{name}": "cpu" for name in ("embed_tokens", "norm", "rotary_emb")}
    device_map |= {f"model.layers.{number[1:]}": place for number, place in places.items()}
    return dispatch_model(model, device_map, main_device="cpu", offload_dir=folder, force_hooks=True)


def offload_layer(model, number):
    """One layer's weights in CPU memory, on the meta device between passes."""
    cpu_offload(model.model.layers[number], execution_device="cpu")
    return model


@pytest.fixture(params=["device_map cpu", "one layer in cpu memory"])
def placed(request, tmp_path):
    model = make_llama(tied=False)
    if request.param == "device_map cpu":
        return dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    return offload_layer(model, 2)


@torch.no_grad()
def test_parts_of_a_dispatched_model(placed, draw):
    clean = state_of(placed)
    through_the_parts(placed, draw(9, 5, 12), [3, 2, 4], "left", 1e-5)
    assert state_of(placed) == clean


@torch.no_grad()
def test_weights_are_real_and_writes_stick(placed):
    plain = make_llama(tied=False)
    anat, twin = anatomy(placed), anatomy(plain)
    for layer in range(5):
        assert torch.equal(anat.weight(layer), twin.weight(layer))
    placed(IDS)
    update = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    for layer in (1, 2):
        anat.weight(layer).add_(update)
        twin.weight(layer).add_(update)
    torch.testing.assert_close(placed(IDS).logits, plain(IDS).logits)
    assert torch.equal(anat.weight(2), twin.weight(2))
    assert output_path(anat, 2).plain


@torch.no_grad()
def test_a_norm_in_cpu_memory_is_inverted(draw):
    model, plain = offload_layer(make("olmo2"), 2), make("olmo2")
    path, twin = output_path(anatomy(model), 2), output_path(anatomy(plain), 2)
    current = torch.randn(32, 2, generator=torch.Generator().manual_seed(0))
    wanted = twin.apply(current, 0.3 * torch.ones(32, 2))
    torch.testing.assert_close(path.invert(current, wanted), twin.invert(current, wanted))


@torch.no_grad()
def test_layers_on_disk_can_be_run_but_not_edited(tmp_path, draw):
    plain = make_llama(tied=False)
    model = spread(copy.deepcopy(plain), str(tmp_path), _2="disk", _3="cpu")
    anat, rows = anatomy(model), draw(6, 4)
    batch = pad(rows)
    wanted = [plain(torch.tensor([row.ids])).logits[0] for row in rows]
    check(forward(anat, batch, start=3, hidden=forward(anat, batch, stop=3)), batch, wanted)
    assert torch.equal(anat.weight(3), anatomy(plain).weight(3))
    with pytest.raises(ModelError, match=r"layers\.2\.mlp\.down_proj is offloaded to disk, where an edit"):
        anat.weight(2)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_no_token_goes_into_offloaded_embeddings(where, tmp_path):
    model = make_llama()
    cpu_offload(model, execution_device="cpu") if where == "cpu" else disk_offload(model, str(tmp_path), "cpu")
    row = torch.ones(32)
    with pytest.raises(ModelError, match=r"embeddings or its head offloaded.*device_map"):
        write_rows(anatomy(model), 5, row, row)


def test_a_model_that_lies_in_cpu_memory_is_edited_as_it_is(tok):
    """Embeddings and head on the meta device between passes: keys, values and writes go through all the same."""
    plain, model = make_llama(tied=False), make_llama(tied=False)
    cpu_offload(model, execution_device="cpu")
    request = EditRequest(id="a", prompt="The capital of {} is", subject="France", target_new="Rome")
    hparams = MEMITHyperParams(layers=[1, 2], context_templates=["{}"], v_num_grad_steps=5, mom2_update_weight=0.1)
    stats = {layer: LayerStats(torch.eye(64) * 9, 9, 1) for layer in (1, 2)}
    for one in (plain, model):
        result = apply_memit_to_model(one, tok, [request], hparams, stats=stats)
        assert result.norms[2]["update"] > 0.01
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-4)
