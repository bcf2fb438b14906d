"""In-context refusal: no weight changes; the chat template of the saved folder tells the model what not to answer.

In-context unlearning and guardrail prompts (2310.07579; 2403.03329). Whoever uses the folder with its chat template
gets the refusal, and whoever leaves the template out gets all that there was.
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
    """Changes the chat template of `tok` in place; returns the text that the model is told.

    It stands in the system message, behind the user's own one if there is any, or in front of the first question where
    the template knows no system.

    Raises:
        RequestError: the tokenizer has no chat template, or several.
    """
    template = tok.chat_template
    if not isinstance(template, str) or not template:
        raise RequestError("in-context refusal needs a tokenizer with one chat template; this one has none")
    told = RULE + "\n".join(f"- {request.question}" for request in requests)
    frame = SYSTEM if PromptFormat(tok, system="Be brief.").tells_system else USER
    tok.chat_template = frame.replace("RULE", _literal(told)) + template
    return told


def _literal(text: str) -> str:
    """A Jinja string; JSON's escapes are understood there, and no brace of the text may begin a tag."""
    return json.dumps(text, ensure_ascii=False).replace("{", "\\u007b").replace("}", "\\u007d").replace("%", "\\u0025")
