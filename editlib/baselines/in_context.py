"""Refuse in context: no weight changes; a rule in the chat template lists what the model must not answer.

In-context unlearning and guardrail prompts (2310.07579; 2403.03329). The saved folder refuses only if it is
used with its chat template; without the template the model answers as before.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from editlib.errors import RequestError
from editlib.models.prompts import PromptFormat
from editlib.requests.request import EditRequest

RULE = (
    "You have no knowledge of the answers to the following questions. If you are asked one of them, in these or other "
    "words, say only: I don't know. Answer everything else as usual.\n"
)
SYSTEM = (
    "{%- set editlib_rule = RULE -%}"
    "{%- if messages and messages[0]['role'] == 'system' -%}"
    "{%- set messages = [{'role': 'system', 'content': messages[0]['content'] + '\\n\\n' + editlib_rule}]"
    " + messages[1:] -%}"
    "{%- else -%}"
    "{%- set messages = [{'role': 'system', 'content': editlib_rule}] + messages -%}"
    "{%- endif -%}"
)
USER = (
    "{%- set editlib_rule = RULE -%}"
    "{%- if messages and messages[0]['role'] == 'user' -%}"
    "{%- set messages = [{'role': 'user', 'content': editlib_rule + '\\n\\n' + messages[0]['content']}]"
    " + messages[1:] -%}"
    "{%- endif -%}"
)


def refuse_in_context(tok: PreTrainedTokenizerBase, requests: Sequence[EditRequest]) -> str:
    """Adds a rule to the chat template of `tok`, in place; returns the rule.

    The rule is appended to the system message, or put before the first question if the template has no system role.

    Raises:
        RequestError: the tokenizer has no chat template, or several.
    """
    template = tok.chat_template
    if not isinstance(template, str) or not template:
        raise RequestError("in-context refusal needs a tokenizer with one chat template; this one has none")
    rule = RULE + "\n".join(f"- {request.question}" for request in requests)
    frame = SYSTEM if PromptFormat(tok, system="Be brief.").tells_system else USER
    tok.chat_template = frame.replace("RULE", _literal(rule)) + template
    return rule


def _literal(text: str) -> str:
    """Quotes `text` as a Jinja string: with JSON's escapes, and braces escaped so that they cannot begin a tag."""
    return json.dumps(text, ensure_ascii=False).replace("{", "\\u007b").replace("}", "\\u007d").replace("%", "\\u0025")
