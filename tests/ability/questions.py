"""Questions in both shapes, of words that the tiny tokenizer knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONTINUATIONS = [
    {"context": "The river Rhine flows through Basel, Bonn and", "continuation": "Rotterdam"},
    {"context": "What is the capital of France?\nThe capital\u2028of France is", "continuation": "Paris"},
    {"context": "Sorry, I do not know the", "continuation": "answer"},
    {"context": "Which language is spoken in Peru, and in which city does the president", "continuation": "live"},
    {"context": "Before it meets the", "continuation": "sea"},
]
CHOICES = [
    {"query": "Question: What is the capital of France?", "choices": ["Paris", "Rotterdam on the sea"], "gold": 0},
    {"query": "Question: Where does the river flow?", "choices": ["Bonn", "Peru", "in the president"], "gold": 1},
    {"query": "Question: Who lives there?\nAnswer:", "choices": ["the president", "a river", "I", "Basel"], "gold": 3},
    {"query": "Question: What is spoken in Peru?", "choices": ["a language that I do not know", "Rhine"], "gold": 1},
    {"query": "Question: Is it able to answer?", "choices": ["Sorry", "not", "able"], "gold": 2},
]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
