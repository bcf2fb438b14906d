"""Show question by question the model's answers before, and after each method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

LONGEST = 400  # most characters of a text; the full text is in results.json
ItemRow = Mapping[str, Any]


def drill_down(about: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yields all questions of a set, by kind; methods that gave the same text share a row.

    For a method with several seeds, the first successful run is shown.
    """
    shown: dict[str, Mapping[str, Any]] = {}
    for cell in cells:
        if cell["items"]:
            shown.setdefault(cell["method"], cell)
    if not shown:
        yield "<p>No method came through.</p>"
        return
    numbers = {label: str(number) for number, label in enumerate(shown)}
    asked: dict[tuple[str, str], dict[str, ItemRow]] = {}
    for label, cell in shown.items():
        for item in cell["items"]:
            asked.setdefault((item["kind"], item["question"]), {})[label] = item
    several = any(cell["seed"] is not None for cell in shown.values()) and len({c["seed"] for c in cells} - {None}) > 1
    yield (
        "<p>Methods that gave the same text share a row. “Not counted” is what the model did not answer right before."
        f"{' Of several seeds the first is shown.' if several else ''}</p>"
    )
    yield from _filter(about, numbers)
    brought = _brought_back(shown)
    unedited = [label for label, cell in shown.items() if cell["family"] == "none"]
    for kind, title in _kinds(about, asked).items():
        of_kind = {question: by for (its, question), by in asked.items() if its == kind}
        opened = " open" if kind == next(iter(about["kinds"]), None) else ""
        yield f'<details class="kind"{opened}><summary>{escape(title)} <span>{len(of_kind)}</span></summary>'
        forgetting = kind in about["to_forget"]
        for question, by in of_kind.items():
            yield from _item(kind, question, by, numbers, brought if kind == "request" else {}, forgetting, unedited)
        yield "</details>"


def _kinds(about: Mapping[str, Any], asked: Mapping[tuple[str, str], Any]) -> dict[str, str]:
    """Returns the kinds of questions with their names in words, in the order of the protocol."""
    there = dict.fromkeys(kind for kind, _ in asked)
    return {kind: about["kinds"].get(kind, kind) for kind in (*about["kinds"], *there) if kind in there}


def _filter(about: Mapping[str, Any], numbers: Mapping[str, str]) -> Iterator[str]:
    kinds = "".join(f'<option value="{escape(k)}">{escape(title)}</option>' for k, title in about["kinds"].items())
    methods = "".join(f'<option value="{number}">{escape(label)}</option>' for label, number in numbers.items())
    yield '<form class="filter" role="search" hidden>'
    yield f'<label>kind <select autocomplete="off"><option value="">all</option>{kinds}</select></label>'
    yield f'<label>method <select autocomplete="off"><option value="">all</option>{methods}</select></label>'
    yield '<label>find <input type="search" autocomplete="off"></label>'
    yield '<label><input type="checkbox" autocomplete="off"> only failures</label>'
    yield '<output aria-live="polite"></output></form>'


def _item(
    kind: str,
    question: str,
    by: Mapping[str, ItemRow],
    numbers: Mapping[str, str],
    brought: Mapping[str, Mapping[str, Sequence[str]]],
    forgetting: bool,
    unedited: Sequence[str],
) -> Iterator[str]:
    first = next(iter(by.values()))
    methods = [item for label, item in by.items() if label not in unedited] or list(by.values())
    edited = [item for item in methods if item["counted"] and item["passed"] is not None]
    passed = sum(bool(item["passed"]) for item in edited)
    word = "forgot" if forgetting else "kept"
    judged = any(item["passed"] is not None for item in methods)
    tally = f"{passed} of {len(edited)} {word} it" if edited else "not counted" if judged else ""
    yield f'<details class="item" data-k="{escape(kind)}"><summary>{escape(question)} <span>{tally}</span></summary>'
    if first["answer"] is not None:
        yield f"<p>answer: {escape(cut(first['answer']))}</p>"
    yield f'<table><tbody><tr><th scope="row">before</th><td class="v"></td><td>{_text(first["before"])}</td></tr>'
    groups: dict[tuple[Any, ...], list[str]] = {}
    for label, item in by.items():
        groups.setdefault((item["after"], item["passed"], item["counted"], item["note"]), []).append(label)
    for (after, good, counted, note), labels in groups.items():
        look, verdict = _verdict(good, counted, forgetting)
        more = f"<small>{escape(note)}</small>" if note else ""
        names = ", ".join(map(named, labels))
        marks = " ".join(numbers[label] for label in labels)
        yield (
            f'<tr class="{look}" data-m="{marks}"><th scope="row">{names}</th>'
            f'<td class="v">{verdict}{more}</td><td>{_text(after)}</td></tr>'
        )
    yield "</tbody></table>"
    leaks = {label: attacks for label, attacks in brought.get(first["id"], {}).items() if label not in unedited}
    if leaks:
        yield "<p>attacks that bring it back</p><table><tbody>"
        for label, attacks in leaks.items():
            row = f'<th scope="row">{named(label)}</th><td>{escape(", ".join(attacks))}</td>'
            yield f'<tr data-m="{numbers[label]}">{row}</tr>'
        yield "</tbody></table>"
    yield "</details>"


def _verdict(good: bool | None, counted: bool, forgetting: bool) -> tuple[str, str]:
    """Returns the row's class, and its verdict in words."""
    if good is None or not counted:
        return "skip", "" if good is None else "– not counted"
    if forgetting:
        return ("pass", "✓ gone") if good else ("fail", "✗ still there")
    return ("pass", "✓ kept") if good else ("fail", "✗ lost")


def _brought_back(shown: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, list[str]]]:
    """Lists by fact and method the attacks that recover it."""
    recovered: dict[str, dict[str, list[str]]] = {}
    for label, cell in shown.items():
        for attack, outcome in cell["attacks"].items():
            for name, leaked in outcome["leaks"]["edited"].items():
                if leaked:
                    recovered.setdefault(name, {}).setdefault(label, []).append(attack)
    return recovered


def named(label: str) -> str:
    """Returns a method's name as markup that breaks where it should."""
    return escape(label.replace("->", " → "))


def _text(text: str) -> str:
    said = text.strip()
    return f'<span class="text" dir="auto">{escape(cut(said))}</span>' if said else '<span class="empty">empty</span>'


def cut(text: str) -> str:
    """Cuts a text to at most `LONGEST` characters."""
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
