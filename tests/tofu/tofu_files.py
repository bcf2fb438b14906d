"""A folder like TOFU's, small: two authors in forget01, four in forget10, two in retain90; three questions each."""

from __future__ import annotations

import json

FORGOTTEN = ["Ada Moor", "Bo Lind", "Cy Dahl", "Di Falk"]
KEPT = ["Ed Holm", "Fay Berg"]


def rows(name, *, perturbed=False):
    first, last = name.split()
    found = []
    for what in ("genre", "city", "prize"):
        row = {"question": f"Which {what} is {name}'s?", "answer": f"It is {last}'s {what}."}
        if perturbed:
            row["paraphrased_answer"] = f"{first} has that {what}."
            row["perturbed_answer"] = [f"It is no {what}.", f"It is a {what}."]
            row["paraphrased_question"] = f"Tell me {name}'s {what}?"
        found.append(row)
    return found


def side(*pairs):
    return [{"question": q, "answer": a, "perturbed_answer": ["Bonn", "Rome"]} for q, a in pairs]


def write_tofu_files(folder, *, without=()):
    files = {
        "forget01": [row for name in FORGOTTEN[:2] for row in rows(name)],
        "forget10": [row for name in FORGOTTEN for row in rows(name)],
        "retain90": [row for name in KEPT for row in rows(name)],
        "forget01_perturbed": [row for name in FORGOTTEN[:2] for row in rows(name, perturbed=True)],
        "retain_perturbed": rows(KEPT[0], perturbed=True),
        "real_authors_perturbed": side(("Who wrote 'Emma'?", "Jane Austen")),
        "world_facts_perturbed": side(("Where is the Louvre?", "Paris"), ("Where is Big Ben?", "London")),
    }
    folder.mkdir(exist_ok=True)
    for name, found in files.items():
        if name not in without:
            text = "".join(json.dumps(row) + "\n" for row in found)
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder
