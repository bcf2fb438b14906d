"""`editlib plan`: sizes counted by hand, costs by hand, and a plan without weights."""

import json
from dataclasses import replace

import pytest
import torch
from tiny_models import make_llama
from transformers import GPT2Config, LlamaConfig
from typer.testing import CliRunner

from editlib.algorithms import costs, rows
from editlib.algorithms.machine import Curve, Machine, measure
from editlib.algorithms.unierase import gated_neurons, held_places, other_subjects, refusal_tokens, subject_neurons
from editlib.algorithms.work import PROBE_TOKENS, Step, Work, forward_pass
from editlib.cli import app
from editlib.errors import EditlibError
from editlib.hparams import load_hparams
from editlib.jobs.plan import plan, readable, settings_job
from editlib.models.size import ModelSize, model_size

TINY = LlamaConfig(
    vocab_size=100,
    hidden_size=16,
    intermediate_size=44,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)
LAYER = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 44 + 2 * 16  # q; k and v of two heads of 4; o; gate, up, down; norms
SIZE = ModelSize(
    n_layers=3, d_model=16, d_ff=44, vocab=100, kv_width=16, layer=LAYER, head=1600, total=3 * LAYER + 3216
)
ROUND = Machine(model=1e9, fast=2e9, product=1e9, wide=5e8, eigen=1e8, bandwidth=1e9, disk=1e8)


def test_parameters_are_counted_by_hand():
    assert model_size(TINY) == SIZE


def test_tied_matrices_count_once():
    tied = LlamaConfig(**{**TINY.to_dict(), "tie_word_embeddings": True})
    assert model_size(tied).total == SIZE.total - 1600


def test_a_model_without_gates():
    size = model_size(GPT2Config(vocab_size=50, n_embd=8, n_layer=2, n_head=2, n_positions=10))
    layer = (8 * 24 + 24) + (8 * 8 + 8) + (8 * 32 + 32) + (32 * 8 + 8) + 4 * 8
    assert (size.d_ff, size.layer, size.total) == (32, layer, 2 * layer + 50 * 8 + 10 * 8 + 2 * 8)


def test_counts_are_those_of_a_model_with_weights():
    model = make_llama()
    assert model_size(model.config).total == sum(parameter.numel() for parameter in model.parameters())


def test_statistics_by_hand():
    step = costs.statistics(SIZE, [0, 1], 1000)
    passes, sums, eigen = step.work
    assert passes.flops == 2 * 1000 * 2 * LAYER
    assert sums.flops == pytest.approx(2 * 1000 * 2 * 44**2 * 36 / 64)  # of 8 x 8 blocks those not below the diagonal
    assert eigen.flops == 9 * 2 * 44**3
    assert step.held >= 2 * 8 * 44**2
    wanted = passes.flops / 2e9 + sums.flops / 1e9 + eigen.flops / 1e8
    assert step.seconds(ROUND) == pytest.approx(wanted)
    assert step.bound(ROUND) == "matrix rate"


def test_values_by_hand():
    job = costs.Job(layers=[0, 1], requests=5, contexts=2, suffix_tokens=4, target_tokens=3, kl_prompts=0, steps=7)
    prefixes, steps, head, states, probes, _ = costs.values(SIZE, job).work
    assert prefixes.flops == 2 * 5 * 2 * job.prompt_tokens * SIZE.n_layers * LAYER  # cached for every layer
    assert steps.flops == 7 * 4 * 5 * 2 * (4 + 2) * 1 * LAYER  # through the one layer above, and back
    assert head.flops == 7 * 4 * 5 * 2 * 3 * 1600
    assert states.flops == 2 * 5 * job.prompt_tokens * 2 * LAYER
    assert (probes.calls, probes.tokens) == (costs.PROBES_VALUES * SIZE.n_layers, PROBE_TOKENS)


def test_requests_of_unlike_length_are_parted_where_few_tokens_fill_a_pass():
    """60 tokens a step are two groups in fp32, whose layer above is called once for each; in bf16 they are one."""
    job = costs.Job(layers=[1], requests=10, suffix_tokens=4, target_tokens=3, kl_prompts=0, steps=7)
    calls = {rate: costs.values(SIZE, replace(job, v_rate=rate)).work[1].calls for rate in ("model", "fast")}
    assert calls == {"model": 7 * 2 * 1, "fast": 7 * 1 * 1}
    many = costs.values(SIZE, replace(job, requests=60))
    assert many.work[1].calls == 7 * costs.FEW_GROUPS


def test_values_from_rows_by_hand():
    """Five requests in two further wordings, with four siblings each; three of seven steps read a Jacobian."""
    job = costs.Job(layers=[0, 1], requests=5, suffix_tokens=4, steps=7, wordings=2, siblings=4)
    asked, decoded, _, prefixes, slopes, slope_head, readings, reading_head = costs.row_values(SIZE, job).work
    prompts, kept = 5 * 3 + 5 * 4, costs.KEPT_TOKENS
    assert asked.flops == prefixes.flops == 2 * prompts * job.prompt_tokens * SIZE.n_layers * LAYER
    assert decoded.flops == 2 * prompts * job.answer_tokens * SIZE.n_layers * LAYER
    tokens = prompts * 4 + 5 * 4 * (kept - 1)
    assert slopes.flops == 3 * 4 * tokens * LAYER
    assert readings.flops == (7 + 1 - 3) * 2 * tokens * LAYER
    scored = 5 * 3 + 5 * 4 * kept
    assert (slope_head.flops, reading_head.flops) == (3 * 4 * scored * 1600, 5 * 2 * scored * 1600)


def test_rows_behind_examples_are_counted_by_hand():
    """Two wordings of each of five requests are erased behind three questions with short answers as well."""
    plain = costs.Job(layers=[0, 1], requests=5, prompt_tokens=10, suffix_tokens=4, steps=7, wordings=2, siblings=4)
    shown = replace(plain, examples=2)
    assert (plain.shot_tokens, shown.shot_tokens) == (0, 4 * 10 + 3 * costs.EXAMPLE_ANSWER)
    before, after = costs.row_values(SIZE, plain), costs.row_values(SIZE, shown)
    more = [new.flops - old.flops for old, new in zip(before.work, after.work, strict=True)]
    rows = 5 * 2
    fronts = 2 * rows * shown.shot_tokens * SIZE.n_layers * LAYER
    slopes, readings = 3 * 4 * rows * 4 * LAYER, 5 * 2 * rows * 4 * LAYER
    # Nothing is generated for them; their prefixes, their tokens from the subject on and their logits are read.
    assert more == [0, 0, 0, fronts, slopes, 3 * 4 * rows * 1600, readings, 5 * 2 * rows * 1600]
    assert after.held > before.held
    keys = [costs.solve(SIZE, job).work[0].flops for job in (plain, shown)]
    assert keys[1] / keys[0] == pytest.approx((10 + shown.shot_tokens) / 10)  # one more context of each request


def test_refusal_tokens_by_hand():
    """One request in three wordings, with four siblings: every prompt and text that is run, counted once."""
    job = costs.Job(layers=[1], requests=1, prompt_tokens=10, answer_tokens=6, wordings=1, siblings=4, anchors=7)
    step = costs.refusal_tokens(SIZE, job, steps=20, wordings=3, general=11, others=9)
    asked, said, _, began, written, _, read, read_head, trained, trained_head, read_out = step.work
    layers = 2 * SIZE.n_layers * LAYER
    assert (asked.flops, said.flops) == (11 * 10 * layers, 11 * 48 * layers)  # general questions and their answers
    assert (began.flops, written.flops) == (320 * layers, 320 * 48 * layers)  # texts, from one token each
    ends = 1 + 3 + 1 + 2 * (7 + 9)  # wordings of the request; two further ones of each retain prompt and other subject
    answers = 7 + 9 + 4
    positions = ends + answers * 6 + (11 + 320) * 48 + 400
    # Answers run with their questions, those to general questions, too; sampled texts and single tokens by themselves.
    # They are read twice: when values erase, and when these were moved for the tokens.
    assert read.flops == 2 * ((ends + answers + 11) * 10 + answers * 6 + (11 + 320) * 48 + 400) * layers
    assert read_head.flops == 2 * 2 * 1600 * positions
    # A step has sixteen refusals: the relation's token, [UNL], ten tokens.
    assert trained.flops == 2 * layers * 20 * 16 * 12
    assert trained_head.flops == 4 * 1600 * 20 * 16 * 12
    assert read_out.flops == 320 * 4 * positions * 16 * 2  # two tokens, forwards and back, in each step
    assert read_out.moved == 320 * 2 * positions * 16 * 4


def test_values_that_tokens_read_are_found_in_a_second_round():
    """Two more rows of each wording, one of each further wording; all others are read again."""
    job = costs.Job(layers=[0, 1], requests=5, prompt_tokens=10, suffix_tokens=4, steps=7, wordings=2, siblings=4)
    plain, twice = costs.row_values(SIZE, job).work, costs.row_values(SIZE, job, said=7).work
    fronts, slopes, slope_head, readings, reading_head = twice[len(plain) :]
    more = 2 * 5 * 3 + 7 * 5
    assert fronts.flops - plain[3].flops == 2 * more * 10 * SIZE.n_layers * LAYER
    assert slopes.flops - plain[4].flops == 3 * 4 * more * 4 * LAYER
    assert slope_head.flops - plain[5].flops == 3 * 4 * more * 1600
    assert readings.flops - plain[6].flops == 5 * 2 * more * 4 * LAYER
    assert reading_head.flops - plain[7].flops == 5 * 2 * more * 1600


def test_one_neuron_for_each_subject_by_hand():
    job = costs.Job(layers=[0, 1], requests=5, contexts=2, prompt_tokens=10, answer_tokens=6, anchors=700)
    step = costs.neurons(SIZE, job, itemsize=2)
    read, moment, spared, *_ = step.work
    others = 512 * 16
    assert read.flops == (5 * 2 * 10 + others) * 2 * 2 * LAYER
    assert moment.flops == 2 * SIZE.d_ff**2 * others
    assert spared.flops == SIZE.d_ff**3 + 25 * SIZE.d_ff + 2 * 3 * 5 * SIZE.d_model * SIZE.d_ff
    assert step.held == 3 * 8 * SIZE.d_ff**2 + 3 * 2 * SIZE.d_model * SIZE.d_ff


def test_the_counts_of_refusal_tokens_are_those_of_the_code():
    assert (costs.TEXTS, costs.TEXT_TOKENS) == (held_places.TEXTS, held_places.TEXT_TOKENS)
    assert (costs.BEGINNINGS, costs.PLACE_STEPS) == (held_places.BEGINNINGS, refusal_tokens.PLACE_STEPS)
    assert (costs.TOKEN_BATCH, costs.OTHER_ROWS) == (refusal_tokens.BATCH, subject_neurons.MOST_ROWS)
    assert costs.SUBJECTS == rows.TOGETHER
    assert costs.COMPARED == gated_neurons.MOST_COMPARED
    lists = costs.RELATION_LISTS, costs.LISTS, costs.MOST_NAMES
    assert lists == (other_subjects.LISTS, other_subjects.MOST_LISTS, other_subjects.MOST_NAMES)


def test_other_subjects_are_named_and_asked_about_while_values_are_found():
    job = costs.Job(layers=[1], requests=2, prompt_tokens=10, answer_tokens=6)
    plain, naming = costs.row_values(SIZE, job).work, costs.row_values(SIZE, job, others=9).work
    listed, went_on, _, asked, answered, _ = naming[len(plain) :]
    layers = 2 * SIZE.n_layers * LAYER
    assert (listed.flops, went_on.flops) == (2 * 32 * 10 * layers, 2 * 32 * 48 * layers)
    assert (asked.flops, answered.flops) == (2 * 9 * 10 * layers, 2 * 9 * 6 * layers)


def test_a_plan_counts_the_examples_of_its_settings():
    settings = load_hparams("UniErase/smollm2-135m-erase")
    assert settings.example_wordings == 2
    assert settings_job(settings, 5, 16, SIZE).examples == 2
    assert settings_job(replace(settings, example_wordings=9, wordings=1), 5, 16, SIZE).examples == 2
    assert settings_job(replace(settings, example_wordings=0), 5, 16, SIZE).examples == 0


def test_bf16_passes_of_fp32_weights_hold_a_second_copy():
    fast, slow = costs.token(SIZE, steps=1, batch=1), costs.solve(SIZE, costs.Job(layers=[1], requests=5))
    assert costs.with_copy(fast, SIZE).held - fast.held == 2 * SIZE.total
    assert costs.with_copy(slow, SIZE) == slow


def test_passes_take_what_a_layer_was_measured_to_take():
    curve = Curve((1, 101), (0.5, 2.5))
    assert [curve.at(tokens) for tokens in (1, 51, 201)] == pytest.approx([0.5, 1.5, 4.5])
    machine = replace(ROUND, layer={("model", "text"): curve})
    work = forward_pass(SIZE, 102, 3, "model", passes=2)  # 51 tokens a pass
    assert work.seconds(machine) == pytest.approx(2 * 3 * 1.5)
    assert work.seconds(machine.scaled(flops=2 * ROUND.fast, bandwidth=None)) == pytest.approx(2 * 3 * 0.75)


def test_the_solve_by_hand():
    job = costs.Job(layers=[1], requests=5, past=2, kept_out=6)
    keys, system, _, probes, _ = costs.solve(SIZE, job).work
    assert probes.calls == costs.PROBES_LAYER * SIZE.n_layers
    assert keys.flops == 2 * 5 * job.prompt_tokens * (1 + 3) * LAYER
    gram, factor, right = 2 * 44 * 7**2, 7**3 / 3 + 2 * 7**2 * 5, 2 * 44 * 7 * 5
    assert system.flops == pytest.approx(gram + factor + right + 4 * 44 * 6 * 7 + 2 * 16 * 44 * 5)


def test_a_dense_system_is_held_once():
    job = costs.Job(layers=[0, 1], requests=5, kept_out=0, dense=True)
    plain = costs.solve(SIZE, replace(job, dense=False)).held
    # The matrix in fp64, and one block of its columns twice: of so small a matrix, all of them.
    assert costs.solve(SIZE, job).held - plain == 3 * 44 * 44 * 8
    large = ModelSize(n_layers=1, d_model=4096, d_ff=14336, vocab=9, kv_width=9, layer=9, head=9, total=9)
    more = [costs.solve(large, replace(job, layers=[0], dense=dense)).held for dense in (True, False)]
    assert more[0] - more[1] == (14336 + 2 * 1024) * 14336 * 8
    half = costs.solve(SIZE, job, itemsize=2).held  # weights to go back to, of two layers
    assert costs.solve(SIZE, job).held - half == 2 * 16 * 44 * 2
    assert costs.with_statistics(costs.solve(SIZE, job), SIZE).held - costs.solve(SIZE, job).held == 44 * 44 * 4


def test_what_is_saved_is_the_weights():
    assert costs.save(SIZE, 2).seconds(ROUND) == pytest.approx(2 * SIZE.total / 1e8)
    assert costs.save(SIZE, 2).bound(ROUND) == "disk"


def test_little_work_takes_what_its_bytes_take():
    work = Work("model", flops=1e6, moved=1e9)
    assert work.seconds(ROUND) == pytest.approx(1.0)
    assert Step("", [work]).bound(ROUND) == "memory"


def test_another_machine_is_this_one_scaled():
    other = ROUND.scaled(flops=2e10, bandwidth=None)
    assert (other.model, other.fast, other.bandwidth) == (1e10, 2e10, 1e9)


def test_a_machine_is_measured():
    machine = measure(TINY, torch.float32, torch.device("cpu"))
    assert min(machine.model, machine.fast, machine.product, machine.wide, machine.eigen) > 0
    assert min(machine.bandwidth, machine.disk, machine.call) > 0


def test_a_plan_needs_a_configuration_alone(tmp_path, monkeypatch):
    path = tmp_path / "any-name.json"
    path.write_text(json.dumps(TINY.to_dict()))
    monkeypatch.setattr("editlib.jobs.plan.measure", lambda *_: ROUND)
    made = plan(str(path), 10, algorithm="AlphaEdit")
    assert [step.name for step in made.steps] == ["statistics", "values", "solve", "save"]
    hiding = plan(str(path), 10, algorithm="UniErase")
    assert [step.name for step in hiding.steps][:2] == ["statistics", "token"]
    # What `editlib unlearn` does with requests that have answers.
    erasing = plan(str(path), 10)
    assert [step.name for step in erasing.steps] == ["statistics", "anchors", "values", "solve", "tokens", "save"]
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps({"layers": [0], "values": "rows"}))
    steps = [step.name for step in plan(str(path), 10, hparams=str(rows), algorithm="UniErase").steps]
    assert steps == ["statistics", "anchors", "values", "solve", "tokens", "save"]
    more = plan(str(path), 100, algorithm="AlphaEdit")
    assert more.steps[1].work[1].flops == pytest.approx(10 * made.steps[1].work[1].flops)
    found = CliRunner().invoke(app, ["plan", str(path), "--requests", "10", "--algorithm", "AlphaEdit"])
    assert found.exit_code == 0, found.output
    assert "statistics" in found.output and "matrix rate" in found.output


def test_a_file_that_is_no_configuration(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{}")
    with pytest.raises(EditlibError, match=r"config\.json"):
        plan(str(path), 1)


@pytest.mark.parametrize("wrong", [{"dtype": "float12"}, {"device": "abacus"}])
def test_what_is_not_there_is_named(wrong):
    with pytest.raises(EditlibError, match=next(iter(wrong.values()))):
        plan("smollm2-135m", 1, **wrong)


@pytest.mark.parametrize("content", ["5", "null", "true", "[1]", '"x"', "{}", "[" * 100_000, ""])
def test_a_configuration_that_is_none_is_one_line(call, tmp_path, content):
    path = tmp_path / "config.json"
    path.write_text(content)
    code, _, err = call("plan", path)
    assert code == 2 and err.count("\n") == 1 and "config.json" in err


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0 s"),
        (0.0123, "0.012 s"),
        (9.96, "10 s"),
        (99.4, "99 s"),
        (99.6, "2 min"),
        (1530, "26 min"),
        (6000, "1.7 h"),
    ],
)
def test_times_are_readable(seconds, said):
    assert readable(seconds) == said
