"""What the library does with a model leaves nothing on it but changed weights: no attribute, hook, mode or setting."""

import copy

import pytest
import torch

from editlib import EditRequest, ROMEHyperParams, apply_rome_to_model
from editlib.models.anatomy import anatomy
from editlib.models.generation import greedy, perplexity, teacher_forced
from editlib.models.loading import load
from editlib.models.lora import lora_adapter
from editlib.models.precision import cast_params, fp32_params
from editlib.models.prompts import PromptFormat
from editlib.models.quantization import quantized
from editlib.models.residual_path import output_path
from editlib.workbench import Workbench

FACT = EditRequest(id="1", prompt="The capital of {} is", subject="France", target_new="Bonn", answer="Paris")
STEPS = {"v_num_grad_steps": 2, "context_templates": ["{}"]}


def traces(model, tok):
    """All that could be written besides weights: attributes of every module by identity, settings by value."""
    modules = {
        name: {
            key: (dict(value) if key.startswith("_") and isinstance(value, dict) else id(value))
            for key, value in vars(module).items()
            if key not in ("_parameters", "_buffers")
        }
        for name, module in model.named_modules()
    }
    flags = {name: (id(p), p.requires_grad, p.dtype, p.device) for name, p in model.named_parameters()}
    settings = model.config.to_dict(), model.generation_config.to_dict(), set(vars(model.config))
    return (
        copy.copy(modules),
        flags,
        settings,
        set(vars(tok)),
        copy.deepcopy(tok.init_kwargs),
        tok.padding_side,
        len(tok),
    )


def answer(model, tok):
    anat, rows = anatomy(model), [PromptFormat.of(tok, None).encode("The capital of France is")] * 2
    said = greedy(anat, rows, max_new_tokens=3)
    teacher_forced(anat, rows, said)
    perplexity(anat, [[1, 2, 3, 4]])


def look(model, tok):
    anat = anatomy(model)
    assert anat.final_norm is not None
    for layer in range(anat.n_layers):
        output_path(anat, layer)


def edit_and_undo(model, tok):
    hparams = ROMEHyperParams(layers=[1], mom2_adjustment=False, **STEPS)
    apply_rome_to_model(model, tok, [FACT], hparams, progress=False).revert(model)


def workbench(model, tok):
    bench = Workbench.of(model, tok, name="tiny", progress=False)
    assert bench.anat is bench.anat


def narrow_for_a_while(model, tok):
    with quantized(anatomy(model), 8), cast_params(model, torch.bfloat16), fp32_params(model):
        pass


def adapt_for_a_while(model, tok):
    pytest.importorskip("peft")
    with lora_adapter(anatomy(model), rank=2, seed=0):
        pass


@pytest.mark.parametrize(
    "operation",
    [answer, look, edit_and_undo, workbench, narrow_for_a_while, adapt_for_a_while],
    ids=lambda f: f.__name__,
)
def test_nothing_is_written_onto_the_model(tiny_model, tok, operation):
    before = traces(tiny_model, tok)
    operation(tiny_model, tok)
    assert traces(tiny_model, tok) == before


def test_a_loaded_model_is_a_plain_one(folder):
    """Loading through the library adds no attribute to what transformers loads."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded, tok = load(str(folder), progress=False)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    assert {n: set(vars(m)) for n, m in loaded.named_modules()} == {n: set(vars(m)) for n, m in plain.named_modules()}
    assert vars(loaded.config).keys() == vars(plain.config).keys()
    assert vars(tok).keys() == vars(AutoTokenizer.from_pretrained(folder)).keys()
