"""The maths of a chain: sums that are rounded once, keys that are held, a cost that stays flat."""

import copy
from contextlib import nullcontext

import pytest
import torch
from chain_cases import COMMON, HPARAMS, NULL, RETAIN, A, B, C, fact, hparams_of
from tiny_models import make_gpt2
from torch.utils.flop_counter import FlopCounterMode

from editlib.algorithms.edit import EditState
from editlib.algorithms.low_rank import LowRank
from editlib.algorithms.registry import apply_function
from editlib.algorithms.unierase.apply import apply_unierase_to_model
from editlib.algorithms.unierase.constraints import hold_anchors
from editlib.algorithms.unierase.token import UnlearningToken
from editlib.algorithms.values import Values
from editlib.chain import Chain, editing
from editlib.chain.batch import Batch
from editlib.chain.state import ChainState, digest
from editlib.hparams import AlphaEditHyperParams, MEMITHyperParams
from editlib.models.anatomy import anatomy
from editlib.models.prompts import PromptFormat
from editlib.models.weights import save_model
from editlib.stats.store import find_layers
from editlib.workbench import Workbench

NONE = Values(torch.zeros(32, 0), torch.zeros(32, 0), [], [], [])


def update_of(layer, generator, scale, rank=1):
    left = scale * torch.rand(32, rank, generator=generator)
    keys = torch.rand(64, rank, generator=generator)
    return Batch((), {layer: LowRank(left, keys.T.contiguous())}, {layer: keys}, NONE, (), {})


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_400_updates_equal_one(pristine, kind, name):
    """Each is far below what the dtype resolves: one by one they would be rounded away."""
    anat = anatomy(copy.deepcopy(pristine[name]).to(kind))
    base, generator = anat.weight(2).clone(), torch.Generator().manual_seed(1)
    batches = [update_of(2, generator, 2e-5) for _ in range(400)]
    dense = torch.stack([b.updates[2].left.double() @ b.updates[2].right.double() for b in batches]).sum(0)
    wanted = (base.double() + dense).to(kind)

    hparams = MEMITHyperParams(layers=[2])
    state = start = ChainState.start(anat, hparams, {"2": digest(base)})
    for batch in batches:
        state = state.after(batch)
    state.write(anat)
    naive = base.clone()
    for batch in batches:
        naive += batch.updates[2].dense().to(kind)
    assert float((anat.weight(2) != wanted).float().mean()) < 1e-3  # ties of the last bit of fp64
    assert float((anat.weight(2).double() - wanted.double()).abs().max()) <= float(
        wanted.double().abs().max() * 2 * torch.finfo(kind).eps
    )
    assert not torch.equal(wanted, base)
    error = (anat.weight(2).double() - base.double() - dense).norm()
    if kind != torch.float32:
        assert error < 0.2 * (naive.double() - base.double() - dense).norm()

    lefts, rights = zip(*[(b.updates[2].left, b.updates[2].right) for b in batches], strict=True)
    one = start.after(Batch((), {2: LowRank(torch.cat(lefts, 1), torch.cat(rights))}, {}, NONE, (), {}))
    assert float((one.weights()[2] != state.weights()[2]).float().mean()) < 1e-3
    start.write(anat)
    assert torch.equal(anat.weight(2), base)


def test_past_keys_have_the_gram_matrix_of_all(tiny_llama):
    """Beyond `d_ff` keys a block of `d_ff` columns stands for them."""
    anat = anatomy(tiny_llama)
    state = ChainState.start(anat, MEMITHyperParams(layers=[2]), {"2": digest(anat.weight(2))})
    generator, keys = torch.Generator().manual_seed(1), []
    for _ in range(50):
        batch = update_of(2, generator, 1e-3, rank=3)
        keys.append(batch.keys[2].double())
        state = state.after(batch)
        assert state.past[2].block.shape[1] <= anat.d_ff
    every = torch.cat(keys, dim=1)
    block = state.past[2].block
    assert state.past[2].count == 150 and block.shape == (64, 64)
    torch.testing.assert_close(block @ block.T, every @ every.T)


@pytest.mark.parametrize("name", [name for name in HPARAMS if name != "UniErase gated"])
def test_a_chain_is_the_plain_sequence(start, bench, base, name):
    """`apply_<name>_to_model` after another, with the state handed on, in fp32."""
    hparams, unlearning = hparams_of(name), name.startswith("UniErase")
    chain = start(name, **({"retain": RETAIN} if unlearning else {}))
    state = EditState()
    answers, untouched = {}, anatomy(copy.deepcopy(bench.model))
    stats = find_layers(base / "stats", bench.name, bench.anat, hparams.layers)
    for some in (A, B, C):
        entry = chain.add(some)
        more = {"state": state, "stats": stats, "seed": entry.seed}
        if unlearning:
            batch = chain._session.batch(entry)
            answers |= batch.answers
            kept = [prompt for prompt in RETAIN if prompt.id in batch.anchors]
            kept.sort(key=lambda prompt: batch.anchors.index(prompt.id))
            form = PromptFormat(bench.tok)
            held = hold_anchors(untouched, form, kept, some, hparams, known_answers=answers)
            token = UnlearningToken.load(base / "token.safetensors") if hparams.uses_token else None
            more |= {"token": token, "anchored": held}
            more |= {"retain": kept, "known_answers": answers}
            state = apply_unierase_to_model(bench.model, bench.tok, some, hparams, **more).state
        else:
            state = apply_function(hparams)(bench.model, bench.tok, some, hparams, **more).state
    for layer in hparams.layers:
        found, wanted = chain._session.at_end(chain.record).anat.weight(layer), bench.anat.weight(layer)
        change = (wanted - chain._session.base(chain.record).base[layer]).norm()
        assert float((found - wanted).norm()) < 2e-3 * float(change)


def test_held_keys_keep_what_earlier_batches_said(start):
    """AlphaEdit's later updates do not move the outputs at the keys of the earlier batches; MEMIT's do."""
    moved = {}
    for name in ("AlphaEdit", "MEMIT"):
        chain = start(name, name)
        for some in (A, B, C):
            chain.add(some)
        first, *rest = [chain._session.batch(entry) for entry in chain.batches]
        own, later = (0.0, 0.0)
        for layer, keys in first.keys.items():
            own += float((first.updates[layer] @ keys).norm())
            later += sum(float((batch.updates[layer] @ keys).norm()) for batch in rest)
        moved[name] = later / own
    assert moved["AlphaEdit"] < 0.7 * moved["MEMIT"]


def many(count):
    places = [f"{a}{b}" for a in "BDFGKLMNPRST" for b in ("asel", "onn", "eru", "ome", "had")]
    return [fact(place, "What is the capital of {}?", place, " Rome", "capital") for place in places[:count]]


def test_batch_25_costs_what_batch_2_does(start, monkeypatch):
    """Counted in floating point operations, since a clock would count the machine's other work."""
    monkeypatch.setitem(HPARAMS, "UniErase", {**HPARAMS["UniErase"], "v_num_grad_steps": 2})
    read, genuine = 0, editing.hold_anchors

    def hold_anchors(*given, **more):
        nonlocal read
        read += 1
        return genuine(*given, **more)

    monkeypatch.setattr(editing, "hold_anchors", hold_anchors)
    chain, counted, sizes = start("UniErase", retain=RETAIN), [], []
    for i, request in enumerate(many(25)):
        with FlopCounterMode(display=False) if i in (1, 24) else nullcontext() as counter:
            entry = chain.add([request])
        counted += [counter.get_total_flops()] if counter else []
        sizes.append(chain._store.size(entry))
    assert read < 4  # the anchors' keys are the base model's, and stay
    assert len(chain.batches) == 25 and counted[0] > 1e6
    assert counted[1] < 1.5 * counted[0]
    assert max(sizes) < 1.2 * sizes[1]


def test_the_updates_of_a_chain_are_its_whole_change(start, algorithm):
    chain = start(algorithm, **({"retain": RETAIN} if algorithm.startswith("UniErase") else {}))
    for some in (A, B):
        chain.add(some)
    updates, anat = chain.updates(), chain._session.at_end(chain.record).anat
    base = chain._session.base(chain.record).base
    assert sorted(updates) == sorted(base)
    for layer, update in updates.items():
        torch.testing.assert_close(base[layer] + update.dense().float(), anat.weight(layer), rtol=0, atol=1e-6)
    assert (chain.token is not None) == algorithm.startswith("UniErase")


def test_a_bf16_chain_of_single_requests(tmp_path, tok):
    """Batches of one in bf16 come to the same weights as their sum rounded once, and a gpt2 keeps its orientation."""
    model = make_gpt2(seed=2).to(torch.bfloat16)
    (tmp_path / "gpt2").mkdir()
    save_model(model, tok, tmp_path / "gpt2")
    bench = Workbench.load(str(tmp_path / "gpt2"), tmp_path / "stats", progress=False)
    assert bench.model.dtype == torch.bfloat16
    base = {layer: bench.anat.weight(layer).clone() for layer in (1, 2)}
    hparams = AlphaEditHyperParams(**{**COMMON, **NULL, "context_templates": None})
    corpus = tmp_path / "c.txt"
    corpus.write_text("\n\n".join(f"The river {i} flows through Basel and Bonn." for i in range(40)))
    chain = Chain.create(tmp_path / "chain", bench, hparams, corpus=str(corpus), stats_tokens=400, chat=False)
    assert len(chain.record.templates) == 6  # MEMIT's five and the plain prompt
    for request in [*A, *B, *C]:
        chain.add([request])
    factors = [chain._session.batch(entry).updates for entry in chain.batches]
    for layer, weight in base.items():
        dense = sum(one[layer].left.double() @ one[layer].right.double() for one in factors)
        wanted = (weight.double() + dense).to(torch.bfloat16)
        found = bench.anat.weight(layer)
        assert not torch.equal(found, weight)
        assert torch.equal(found, wanted)
    Chain.open(tmp_path / "chain").verify()
