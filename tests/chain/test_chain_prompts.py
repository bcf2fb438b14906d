"""A chain asks as it was started, whatever day it is."""

import copy
from dataclasses import replace

import pytest
from chain_cases import A, B, hparams_of

from editlib.chain import Chain
from editlib.chain.export import chain_receipt
from editlib.models.prompt_settings import PromptSettings
from editlib.models.prompts import PromptFormat

DATED = (
    "{{ 'Today is ' + strftime_now('%d %B %Y') + '. ' }}{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'So: ' }}{% endif %}"
)


@pytest.fixture
def dated_bench(bench):
    bench.tok.chat_template = DATED

    def on(day):
        copied = copy.deepcopy(bench)
        return replace(copied, prompts=PromptSettings(date=day), today=True)

    return on


@pytest.mark.parametrize("name", ["UniErase", "MEMIT"])
def test_a_batch_of_today_asks_with_the_day_of_the_chain(base, dated_bench, tmp_path, name):
    given = {"token": base / "token.safetensors", "retain": []} if name == "UniErase" else {"chat": True}
    hashes = []
    for day in ("2020-02-03", "2026-07-31"):
        bench = dated_bench("2020-02-03")
        chain = Chain.create(tmp_path / day, bench, hparams_of(name), clock=lambda: "t", **given)
        chain.add(A)
        later = Chain.open(tmp_path / day, dated_bench(day), clock=lambda: "t")
        later.add(B)
        later.verify()
        hashes.append([entry.layers for entry in later.record.batches])
        receipt = chain_receipt(later)
        assert receipt["prompts"]["date"] == "2020-02-03"
        assert receipt["first_prompt"] == "Today is 03 February 2020. What is the capital of France? So: "
    assert hashes[0] == hashes[1]


def test_a_chain_of_before_has_no_prompts_and_asks_as_its_chat_says(start):
    chain = start("MEMIT")
    old = replace(chain.record, prompts={})
    assert old.asking is False
    assert not PromptFormat.of(chain.tok, old.asking).uses_chat
