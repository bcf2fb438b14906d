"""The page and the tables: whole, escaped, self-contained, the same every time."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from editlib.comparison.report.page import page
from editlib.comparison.report.plane import Box, plane
from editlib.comparison.report.tables import attack_table, cost_table, main_table, markdown
from editlib.comparison.results import mark_front, summary

HOSTILE = '<script>alert(1)</script></details><img src="http://evil.example" onerror=alert(2)> & $title | \u202e"\''
VOID = {"meta", "input", "br", "img", "link", "path", "circle", "polygon"}


def measure(value):
    return {"value": value, "meaning": "a share", "higher_is_better": True, "n": 4, "interval": [0.1, 0.9]}


def item(kind, question, passed, after):
    told = {"id": question, "kind": kind, "question": question, "answer": "Paris", "before": "It is Paris."}
    return {**told, "after": after, "passed": passed, "counted": True, "note": "refused"}


def cell(method, family, forget, retain, seed=0, after="I don't know."):
    leaks = {"edited": {"Q1": True, "Q2": False}, "base": {"Q1": True, "Q2": True}, "control": {"c": False}}
    cost = {"seconds": 12.0, "search_seconds": 0.0, "prepared": {}, "more_mb": 10.0, "accelerator_mb": None}
    row = {"task": "arc", "metric": "acc", "value": 0.5, "stderr": 0.01, "base": 0.6, "higher_is_better": True}
    return {
        "set": "facts",
        "method": method,
        "family": family,
        "seed": seed,
        "key": f"{method}{seed}",
        "failed": None,
        "weights_sha256": "ab" * 32,
        "cost": {**cost, "touched": {"weights": 10, "of": 1000, "tensors": 1, "bytes": 40}, "update_bytes": 2000},
        "notes": {},
        "search": None,
        "forget": measure(forget),
        "retain": measure(retain),
        "measures": {"gone": measure(forget)},
        "perplexity": {"before": 50.0, "after": 55.0, "ratio": 1.1},
        "ability": [{"rows": [row]}],
        "attacks": {"direct": {"meaning": "asked", "shares": {}, "leaks": leaks, "seconds": 1.0}},
        "items": [item("request", "Q1", True, after), item("neighbour", "Q2", False, after)],
    }


def gathered(*cells):
    methods = dict.fromkeys((one["method"], one["family"]) for one in cells)
    summaries = [summary(name, family, [c for c in cells if c["method"] == name]) for name, family in methods]
    mark_front(summaries)
    about = {
        "protocol": "facts",
        "model": "smollm2-135m",
        "identity": {"model": "cd" * 32},
        "forget": 2,
        "retain": 3,
        "attacked": 2,
        "axes": ["gone", "kept"],
        "kinds": {"request": "questions to forget", "neighbour": "neighbours"},
        "to_forget": ["request"],
        "measures": {"gone": {"meaning": "a share", "higher_is_better": True}},
        "methods": summaries,
    }
    return {
        "format": 1,
        "editlib": "0.1.0",
        "config": {"model": "smollm2-135m", "seeds": [0]},
        "config_sha256": "ef" * 32,
        "machine": {"python": "3.11", "threads": 2},
        "sets": {"facts": about},
        "cells": list(cells),
    }


@pytest.fixture
def results():
    failed = {**cell("RMU", "fine-tuning", 0.0, 0.0), "failed": HOSTILE, "cost": None, "forget": None, "retain": None}
    failed |= {"measures": {}, "attacks": {}, "items": [], "perplexity": None, "ability": []}
    return gathered(
        cell("none", "none", 0.0, 1.0, seed=None),
        cell("UniErase", "closed form", 0.95, 0.9, after=HOSTILE),
        cell("UniErase", "closed form", 0.85, 0.8, seed=1),
        cell("MEMIT-refusal", "closed form, refusal", 0.88, 0.5),
        failed,
    )


class Whole(HTMLParser):
    """Every element that is opened is closed, in order."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parsed(text):
    parser = Whole()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return parser


def test_the_page_is_whole_and_fetches_nothing(results):
    text = page(results)
    parser = parsed(text)
    assert parser.tags.count("script") == 1 and "img" not in parser.tags and "link" not in parser.tags
    for name, value in parser.attributes:
        assert not name.startswith("on") and "http" not in value, (name, value)
    assert "$" not in text.replace("$title |", "")
    assert page(results) == text


def test_what_a_model_wrote_stands_escaped(results):
    text = page(results)
    assert "<script>alert" not in text and "onerror=alert(2)&gt;" in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&lt;/details&gt;" in text


def test_methods_with_one_text_share_a_row_and_the_filter_finds_each(results):
    rows = re.findall(r'<tr class="(\w+)" data-m="([\d ]+)"><th scope="row">(.*?)</th>', page(results))
    assert ("pass", "0 2", "none, MEMIT-refusal") in rows and ("pass", "1", "UniErase") in rows
    assert ("fail", "1", "UniErase") in rows  # the neighbour that was lost


def test_verdict_and_failures_are_told(results):
    text = page(results)
    assert "than this one does: UniErase (forget 0.90, retain 0.85)." in text
    assert "1 of 5 runs failed" in text and "RMU (0 of 1 runs)" in text


def test_tables(results):
    assert main_table(results, "facts")[1][:4] == ["UniErase", "0.90", "0.85", "yes"]
    assert main_table(results, "facts")[-1][:3] == ["RMU (0 of 1 runs)", "-", "-"]
    assert attack_table(results, "facts")[1] == ["direct", *["0.50 (0.00-1.00)"] * 3]
    assert cost_table(results, "facts")[1] == ["UniErase", "-", "12.0", "0.0", "10.0", "10", "1.00 %", "2.0"]
    lines = markdown(results).splitlines()
    for above, line in pairwise(lines):
        if above.startswith("|") and line.startswith("|"):
            assert line.replace("\\|", "").count("|") == above.replace("\\|", "").count("|")
    assert any("onerror" in line and "\\|" in line for line in lines)


def test_sixty_facts_and_twenty_methods_make_a_small_page():
    def many(number):
        one = cell(f"method {number}", "fine-tuning", 0.5, 0.5)
        said = [f"What method {number} says of question {i}, at some length: " + "words " * 10 for i in range(300)]
        return {**one, "items": [item("request", f"Question {i}?", i % 2 == 0, said[i]) for i in range(300)]}

    assert len(page(gathered(*map(many, range(20))))) < 3_000_000


def test_numbers_beside_points_cover_nothing():
    crowd = [cell(f"m{i}", "fine-tuning", 0.9 + 0.002 * i, 0.9 - 0.001 * i) for i in range(15)]
    drawn = plane(gathered(*crowd)["sets"]["facts"]["methods"], ["gone", "kept"])
    parsed(drawn)
    labels = re.findall(r'class="number" x="([\d.]+)" y="([\d.]+)" text-anchor="middle">(\d+)<', drawn)
    assert [int(text) for *_, text in labels] == list(range(1, 16))
    boxes = [Box(float(x) - 5, float(y) - 9, float(x) + 5, float(y) + 1) for x, y, _ in labels]
    assert not any(one.meets(other) for i, one in enumerate(boxes) for other in boxes[:i])
