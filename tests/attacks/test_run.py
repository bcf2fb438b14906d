"""The whole job: columns, control, going on where it was stopped, files, and bad input."""

import json
from dataclasses import replace

import pytest
from scripted import Unit, scripted

import editlib
from editlib import data
from editlib.attacks import ATTACKS, AttackSettings, asking, registry, run_attacks
from editlib.attacks import run as running
from editlib.attacks.control import bundled_control, unknown, usable
from editlib.attacks.outcome import LeakRate
from editlib.errors import AttackError, OutputError, RequestError
from editlib.jobs.attack import cell
from editlib.models.weights import save_model, weights_sha256
from editlib.requests.reading import write_requests
from editlib.requests.request import EditRequest

SETTINGS = AttackSettings(max_new_tokens=6, samples=2, relearn_steps=2, resamples=200)
SOME = ["direct", "banned-token"]


@pytest.fixture
def pair(world):
    """(model, tok) of the base and of the edited model, which refuses behind all subjects."""
    return (world.base().anat.model, world.tok), (world.edited().anat.model, world.tok)


@pytest.fixture
def control(world):
    """Facts that the base does not know (it says other things there), and one that it knows."""
    never = [replace(fact, id=f"n{fact.id}", subject=None, prompt=f"{fact.question}!") for fact in world.facts]
    return [*never, replace(world.facts[0], id="well known")]


def test_columns_are_edited_base_and_control(world, pair, control):
    forgotten = world.facts[1:]
    report = run_attacks(*pair, forgotten, control=control, attacks=SOME[::-1], settings=SETTINGS)
    assert [result.attack for result in report.results] == SOME
    rates = {result.attack: {k: share.rate for k, share in result.shares.items()} for result in report.results}
    assert rates == {
        "direct": {"edited": 0.0, "base": 1.0, "control": 0.0},
        "banned-token": {"edited": 1.0, "base": 1.0, "control": 0.0},
    }
    assert report.results[0].shares["control"].n == 4 and report.left_out["control"] == {"is known": 1}
    json.dumps(report.to_dict())


def test_a_loaded_model_is_attacked_as_its_pair_is(world, pair, control):
    loaded = [world.base(), world.edited()]
    ways = [pair, loaded, (loaded[0], (loaded[1].anat, world.tok))]
    jobs = {"control": control, "attacks": SOME, "settings": SETTINGS, "prompts": loaded[1].prompts}
    reports = [run_attacks(*way, world.facts, **jobs) for way in ways]
    for report in reports:
        assert report.job == reports[0].job
        assert [one.shares for one in report.results] == [one.shares for one in reports[0].results]
    assert run_attacks(*loaded, world.facts, **{**jobs, "prompts": None}).job == reports[0].job


def test_every_attack_runs_and_leaves_both_models_as_they_were(world, pair, control):
    before = [weights_sha256(model) for model, _ in pair]
    report = editlib.run_attacks(*pair, world.facts, control=control[:4], settings=SETTINGS)
    assert [result.attack for result in report.results] == list(ATTACKS)
    assert [weights_sha256(model) for model, _ in pair] == before
    for result in report.results:
        assert {column: len(rows) for column, rows in result.trials.items()} == {"edited": 4, "base": 4, "control": 4}
        assert all(row.skipped or row.outputs for rows in result.trials.values() for row in rows)


def test_one_seed_one_outcome(world, pair, control):
    def outcome(seed):
        names = ["sampling", "relearn-forgotten", "few-shot"]
        found = run_attacks(*pair, world.facts, control=control, attacks=names, settings=SETTINGS, seed=seed)
        return [replace(result, seconds=0) for result in found.results]

    assert outcome(1) == outcome(1) != outcome(2)


def test_facts_that_show_nothing_are_left_out(world, pair, control):
    mute = replace(world.facts[0], id="mute", answer=None)
    told = EditRequest(id="told", prompt="Where is Pxyz city?", answer="Pxyz")
    report = run_attacks(*pair, [mute, told, world.facts[1]], control=control, attacks=["direct"], settings=SETTINGS)
    assert report.left_out["requests"] == {"no answer given": 1, "the answer is in the question": 1}
    assert report.results[0].shares["edited"].n == 1
    with pytest.raises(RequestError, match="none of the 1 requests"):
        run_attacks(*pair, [mute], attacks=["direct"])


def test_the_bundled_control_is_unknown_in_every_wording(world):
    facts = [fact for fact in data.facts() if fact.relation == "symbol"][:3]
    base, context = world.base(), replace(world.context(), requests=facts)
    found = bundled_control(base, facts, context)
    assert [fact.relation for fact in found] == ["symbol"] * 3 and not set(found) & set(facts)
    assert found == bundled_control(base, facts, context) != bundled_control(base, facts, replace(context, seed=1))
    own = bundled_control(base, [replace(facts[0], relation="mine")] * 4, context)
    assert len({fact.relation for fact in own}) > 1
    world.chain(world.last("!"), "Pxyz")
    knowing = replace(world.facts[0], subject=None, prompt="Say it", paraphrases=("Now!",))
    assert unknown(world.base(), [knowing, replace(knowing, paraphrases=())], context) == [
        replace(knowing, paraphrases=())
    ]
    assert usable([knowing]) == ([knowing], {})


def test_it_goes_on_where_it_was_stopped(world, pair, control, tmp_path, monkeypatch):
    job = {"control": control, "settings": SETTINGS, "out": tmp_path / "out"}
    ran = []

    def watched(name, interrupted=False):
        def run(*given):
            ran.append(name)
            if interrupted:
                raise KeyboardInterrupt
            return registry.direct(*given)

        return replace(ATTACKS[name], run=run)

    monkeypatch.setitem(ATTACKS, "direct", watched("direct"))
    monkeypatch.setitem(ATTACKS, "banned-token", watched("banned-token", interrupted=True))
    with pytest.raises(KeyboardInterrupt):
        run_attacks(*pair, world.facts, attacks=SOME, **job)
    assert ran == ["direct", "direct", "banned-token"]  # edited and base; then stopped
    monkeypatch.setitem(ATTACKS, "banned-token", watched("banned-token"))
    report = run_attacks(*pair, world.facts, attacks=["banned-token"], **job)
    assert ran[3:] == ["banned-token"] * 2
    assert [result.attack for result in report.results] == SOME
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").rglob("*.json")}
    with pytest.raises(OutputError, match=r"another job's attacks.*seed"):
        run_attacks(*pair, world.facts, attacks=SOME, seed=1, **job)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").rglob("*.json")} == files
    run_attacks(*pair, world.facts, attacks=["banned-token"], overwrite=True, **job)
    assert ran[5:] == ["banned-token"] * 2  # the same job, but begun again
    run_attacks(*pair, world.facts, attacks=["direct"], seed=1, overwrite=True, **job)
    assert [path.name for path in (tmp_path / "out" / running.FINISHED).iterdir()] == ["direct.json"]


def test_unknown_attacks_and_settings_are_refused(world, pair, monkeypatch):
    with pytest.raises(AttackError, match=r"'int5' does not exist .did you mean int"):
        run_attacks(*pair, world.facts, attacks=["int5"])
    with pytest.raises(AttackError, match="no attack was named"):
        run_attacks(*pair, world.facts, attacks=[])
    for bad in ({"samples": 0}, {"shots": -1}, {"relearn_rate": float("nan")}):
        with pytest.raises(AttackError, match=next(iter(bad))):
            AttackSettings(**bad)
    monkeypatch.setattr(registry, "peft_missing", lambda: True)
    with pytest.raises(AttackError, match=r"relearn-forgotten needs .*\[lora\]"):
        run_attacks(*pair, world.facts)
    assert registry.choose(["int8"]) == ["int8"]


def test_a_cell_says_which_interval_it_shows():
    some = LeakRate(leaked=1, n=4, agg_value=0.25, interval=(0.0, 0.75), wilson=(0.05, 0.7))
    assert cell(some) == "0.25 (0.00-0.75), 1 of 4"
    assert cell(replace(some, leaked=0, agg_value=0.0)) == "0.00 (0.05-0.70*), 0 of 4"
    assert cell(replace(some, n=0, agg_value=None)) == "-"
    assert cell(some, short=True) == "0.25 (1 of 4)"


@pytest.fixture
def folders(world, tmp_path):
    """The models saved, and files of requests and control."""
    for name, model in (("base", scripted(world.says)), ("edited", world.edited().anat.model)):
        (tmp_path / name).mkdir()
        save_model(model, world.tok, tmp_path / name)
    write_requests(tmp_path / "forget.jsonl", world.facts)
    return tmp_path


def arguments(folders, *more):
    return ("attack", folders / "base", folders / "edited", "--requests", folders / "forget.jsonl",
            "--out", folders / "out", "--control", folders / "control.jsonl", *more)  # fmt: skip


def test_the_command_writes_json_and_a_table(call, folders, control):
    write_requests(folders / "control.jsonl", control[:4])
    code, out, err = call(*arguments(folders, "--attacks", "banned-token,direct", "--seed", 3))
    assert code == 0, err
    assert "1.00 (4 of 4)" in out
    found = json.loads((folders / "out" / "attacks.json").read_text())
    assert found["job"]["seed"] == 3 and [one["attack"] for one in found["results"]] == SOME
    assert found["results"][1]["trials"]["edited"][0]["outputs"][0]["text"] == "Pxyz"
    lines = (folders / "out" / "table.md").read_text().splitlines()
    assert lines[0].startswith("| attack | edited | base | control |")
    assert lines[3].startswith("| banned-token | 1.00 (0.51-1.00*), 4 of 4 | 1.00 (")
    again = call(*arguments(folders, "--attacks", "int8", "--seed", 3))
    assert again[0] == 0 and "int8" in (folders / "out" / "table.md").read_text()
    assert "banned-token" in (folders / "out" / "table.md").read_text()


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (("--attacks", "guess"), "'guess' does not exist"),
        (("--samples", "0"), "samples is 0"),
        (("--attacks", "direct", "--control", "none.jsonl"), "none.jsonl"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(call, folders, control, more, word):
    write_requests(folders / "control.jsonl", control)
    before = sorted(folders.rglob("*"))
    code, _, err = call(*arguments(folders, *more))
    assert code == 2 and word in err and len(err.strip().splitlines()) == 1
    assert sorted(folders.rglob("*")) == before


def test_a_folder_of_something_else_is_left_alone(call, folders, control):
    write_requests(folders / "control.jsonl", control)
    (folders / "out").mkdir()
    (folders / "out" / "thesis.txt").write_text("mine")
    code, _, err = call(*arguments(folders, "--attacks", "direct"))
    assert code == 2 and "not empty" in err
    assert call(*arguments(folders, "--attacks", "direct", "--overwrite"))[0] == 0
    assert (folders / "out" / "thesis.txt").read_text() == "mine"


def test_the_receipt_names_the_token_and_the_base(call, folders, world, control):
    write_requests(folders / "control.jsonl", control[:4])
    receipt = {"base": {"sha256": weights_sha256(scripted(world.says))}, "token": {"token": "[UNL]"}}
    (folders / "edited" / "editlib.json").write_text(json.dumps(receipt))
    assert call(*arguments(folders, "--attacks", "banned-token"))[0] == 0
    assert json.loads((folders / "out" / "attacks.json").read_text())["job"]["settings"]["token"] == "[UNL]"
    other = scripted(world.says, [Unit(0, [5], {6: 1.0})])
    save_model(other, world.tok, folders / "base")
    code, _, err = call(*arguments(folders, "--attacks", "direct", "--overwrite"))
    assert code == 2 and "edited from another model" in err


@pytest.fixture
def asked(monkeypatch):
    """What `greedy` is asked for: (model, tokens of the prompt, banned tokens) of each prompt."""
    found = []
    plain = asking.greedy

    def greedy(anat, rows, *, banned=(), **more):
        found.extend((id(anat.model), row.ids, tuple(banned)) for row in rows)
        return plain(anat, rows, banned=banned, **more)

    monkeypatch.setattr(asking, "greedy", greedy)
    return found


def test_plain_questions_are_answered_once_for_all_attacks(world, pair, control, asked):
    run_attacks(*pair, world.facts, control=control[:2], attacks=["direct", "prefill-own"], settings=SETTINGS)
    assert len(asked) >= 4 + 4 + 2 + 2  # facts of both models, and the control of both
    assert len(set(asked)) == len(asked)


def test_no_more_facts_are_asked_than_the_control_takes(world, asked):
    facts = [fact for fact in data.facts() if fact.relation == "symbol"][:3]
    base, context = world.base(), replace(world.context(), requests=facts)
    found = bundled_control(base, facts, context)
    wordings = sum(len(fact.filled_paraphrases) for fact in found)
    assert len(found) == 3 and len(asked) == 3 + wordings  # the model knows no symbol: the first three will do
