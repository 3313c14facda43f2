"""The body of a request, checked before anything is done with it.

What is not understood is refused by name: a field that were passed over in silence would give another answer than the
one that was asked for. Nothing here imports torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from sparsify.backends.serve.refusal import Refusal, another_model
from sparsify.files.json_text import parse_json

_CONTENT = ("text", "input_text", "output_text")
# Seeds as OpenAI's schema has them.
_SEEDS = 1 << 63
_MOST_STOPS, _LONGEST_STOP = 16, 256


def parse(data: bytes) -> dict[str, Any]:
    """Raises:
    Refusal: it is no JSON object.
    """
    try:
        body = parse_json(data)
    except ValueError as error:
        raise Refusal(f"The body is not JSON that can be read: {error}") from None
    if not isinstance(body, dict):
        raise Refusal(f"The body is {_kind(body)}, not a JSON object")
    return body


def check_completion(body: dict[str, Any], name: str) -> None:
    """A body of ``/v1/completions``; a prompt in a list of one is taken out of it.

    Raises:
        Refusal: it cannot be answered as it asks.
    """
    _check(body, name, _COMPLETION)
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
        prompt = body["prompt"] = prompt[0]
    if not isinstance(prompt, str):
        raise Refusal(
            f"prompt is {_kind(prompt)}: write one text; send several in requests of their own", param="prompt"
        )


def check_chat(body: dict[str, Any], name: str) -> None:
    """A body of ``/v1/chat/completions``.

    Raises:
        Refusal: it cannot be answered as it asks.
    """
    _check(body, name, _CHAT)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refusal("messages is no list with a message in it", param="messages")
    for number, message in enumerate(messages):
        _check_message(message, f"messages[{number}]")


def _check(body: Mapping[str, Any], name: str, fields: Mapping[str, _Field]) -> None:
    asked = body.get("model")
    if asked is not None and asked != name:
        raise another_model(asked, name)
    for field, value in body.items():
        if field not in fields and field not in _BOTH:
            known = ", ".join(sorted({*fields, *_BOTH}))
            raise Refusal(f"The field {field!r} is not known here; these are: {known}", param=field)
        check, wanted = (_BOTH | dict(fields))[field]
        # null is the same as nothing.
        if value is not None and not check(value):
            raise Refusal(f"{field} is {_shown(value)}; it can be {wanted}", param=field)


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, dict):
        raise Refusal(f"{where} is {_kind(message)}, not an object with a role and content", param="messages")
    if not isinstance(message.get("role"), str):
        raise Refusal(f"{where}.role is {_kind(message.get('role'))}, not text", param="messages")
    calls, content = message.get("tool_calls"), message.get("content")
    if calls is not None and not (isinstance(calls, list) and all(map(_is_call, calls))):
        raise Refusal(f"{where}.tool_calls is no list of calls of functions", param="messages")
    if not isinstance(message.get("tool_call_id", ""), str):
        raise Refusal(f"{where}.tool_call_id is no text", param="messages")
    if isinstance(content, str) or (content is None and calls):
        return
    if not isinstance(content, list):
        raise Refusal(f"{where}.content is {_kind(content)}, not text", param="messages")
    for part in content:
        if not isinstance(part, dict) or part.get("type") not in _CONTENT or not isinstance(part.get("text"), str):
            raise Refusal(f"{where}.content has a part that is no text, and text is all that is read", param="messages")


def _is_call(call: Any) -> bool:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return False
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return isinstance(arguments, dict)
    try:
        return isinstance(json.loads(arguments), dict)
    except (ValueError, RecursionError):
        return False


def _is_tool(tool: Any) -> bool:
    function = tool.get("function") if isinstance(tool, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _number(low: float, high: float) -> Callable[[Any], bool]:
    # True and False are numbers to Python alone.
    return lambda value: isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _only(*allowed: Any) -> Callable[[Any], bool]:
    return lambda value: any(type(value) is type(one) and value == one for one in allowed)


def _stops(value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return len(texts) <= _MOST_STOPS and all(isinstance(t, str) and 0 < len(t) <= _LONGEST_STOP for t in texts)


def _biases(value: Any) -> bool:
    fits = _number(-100, 100)
    return isinstance(value, dict) and all(k.isascii() and k.isdigit() and fits(v) for k, v in value.items())


def _kept(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(v, str | bool | int | float) for v in value.values())


# Whether a value will do, and what would.
_Field = tuple[Callable[[Any], bool], str]
_ZERO: _Field = (lambda value: _number(0, 0)(value), "0 alone: it is not supported")
_ONE: _Field = (_only(1), "1 alone: it is not supported")
_FALSE: _Field = (_only(False), "false alone: it is not supported")
_TOKENS: _Field = (_whole(1, 1 << 31), "a whole number of tokens, 1 or more")

_BOTH: dict[str, _Field] = {
    "model": (lambda value: True, "the model's name"),
    "max_tokens": _TOKENS,
    "temperature": (_number(0, 2), "a number from 0 to 2"),
    "top_p": (_number(0, 1), "a number from 0 to 1"),
    "stop": (_stops, f"a text, or a list of at most {_MOST_STOPS}, each of 1 to {_LONGEST_STOP} characters"),
    "seed": (_whole(-_SEEDS, _SEEDS - 1), "a whole number of 64 bits"),
    "stream": (lambda value: isinstance(value, bool), "true or false"),
    "stream_options": (lambda value: isinstance(value, dict), "an object"),
    "logit_bias": (_biases, "an object of token ids and numbers from -100 to 100"),
    "user": (lambda value: isinstance(value, str), "a text"),
    "n": _ONE,
    "frequency_penalty": _ZERO,
    "presence_penalty": _ZERO,
}
_COMPLETION: dict[str, _Field] = {
    "prompt": (lambda value: True, "a text"),
    "best_of": _ONE,
    "echo": _FALSE,
    "logprobs": (lambda value: False, "null alone: it is not supported"),
    "suffix": (_only(""), "empty: it is not supported"),
}
_CHAT: dict[str, _Field] = {
    "messages": (lambda value: True, "a list"),
    "max_completion_tokens": _TOKENS,
    "logprobs": _FALSE,
    "tools": (lambda value: isinstance(value, list) and all(map(_is_tool, value)), "a list of functions"),
    "tool_choice": (_only("auto"), "'auto' alone: it is not supported"),
    "parallel_tool_calls": (_only(True), "true alone: it is not supported"),
    "response_format": (_only({"type": "text"}), '{"type": "text"} alone: it is not supported'),
    "chat_template_kwargs": (_kept, "an object of texts, numbers, true and false"),
    "metadata": (lambda value: isinstance(value, dict), "an object"),
    "store": _FALSE,
}


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "missing"}
    return kinds.get(type(value), "a number")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}…"


def is_sampled(body: Mapping[str, Any]) -> bool | None:
    """Whether tokens are drawn, as far as the request says; None: as the model's own generation config says."""
    temperature, top_p = body.get("temperature"), body.get("top_p")
    if temperature is not None:
        # Logits divided by less are infinite.
        return not math.isclose(temperature, 0, abs_tol=1e-3)
    return True if top_p is not None else None
