"""Folders of every kind through transformers' handlers in this process, and what ``generate`` tells while it runs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from support.onnx_models import endless
from support.serving import offline, with_bytes
from support.tokenizers import CHATML, of_bytes
from transformers.cli.serving.utils import ToolCall, build_response_parser

import sparsify
from sparsify.backends.serve.handlers import Chat, Completions, Held, generation_config
from sparsify.backends.serve.listener import Ended, Gone, Listener, Stops
from sparsify.backends.serve.opening import example, open_held
from sparsify.backends.serve.refusal import Refusal

CPU = torch.device("cpu")
KINDS = {
    "checkpoint": ("magnitude:2:4", "hf"),
    "ragged": ("llm-pruner:50%,importance=l2,keep_last=1", "hf"),
    "packed": ("magnitude:2:4", "packed:choice=smallest"),
    "int8": ("magnitude:2:4", "packed:choice=smallest,values=int8"),
    "int4": ("magnitude:2:4", "packed:choice=smallest,values=int4"),
}


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_bytes(endless("llama"), tmp_path_factory.mktemp("served") / "dense")


def answer(held: Held, body: dict[str, Any], kind: type[Completions | Chat] = Completions) -> dict[str, Any]:
    response = asyncio.run(kind(held, body).handle_request(body, "one"))
    return dict(json.loads(response.body))


@pytest.mark.first(2)
@pytest.mark.parametrize("kind", KINDS)
def test_folders_of_every_kind(kind: str, dense: Path, tmp_path: Path) -> None:
    spec, to = KINDS[kind]
    sparsify.compile(dense, [spec], to=to, output=tmp_path / "out")
    held = open_held(tmp_path / "out", "m", CPU)
    assert held.context == 64 and held.vocabulary == len(held.tokenizer)
    # A folder of packed weights loads as its own kind, and what is compared is not what was opened to be served.
    again = open_held(tmp_path / "out", "m", CPU)
    made = answer(held, {"prompt": "some text", "max_tokens": 8, "temperature": 0})
    assert made["choices"][0]["text"] == offline(again.model, again.tokenizer, "some text", 8)
    if kind == "ragged":
        loaded = sparsify.load(tmp_path / "out")
        assert made["choices"][0]["text"] == offline(loaded, held.tokenizer, "some text", 8)


def test_a_whole_answer_fits_behind_the_prompt(dense: Path) -> None:
    held = open_held(dense, "m", CPU)
    made = answer(held, {"prompt": "x" * 60, "temperature": 0})
    assert made["usage"]["total_tokens"] == 64
    for body in ({"prompt": "x" * 60, "max_tokens": 5}, {"prompt": "x" * 64}):
        with pytest.raises(Refusal, match="holds 64 tokens") as refused:
            answer(held, body)
        assert refused.value.code == "context_length_exceeded"


def test_what_a_model_without_a_template_is_not_asked(dense: Path) -> None:
    held = open_held(dense, "m", CPU)
    with pytest.raises(Refusal, match=r"no chat template.*/v1/completions"):
        held.check({}, chat=True)
    held.check({}, chat=False)
    assert "/completions " in example(held, "http://x/v1") and "chat" not in example(held, "http://x/v1")
    held.tokenizer.chat_template = CHATML
    held.check({}, chat=True)
    assert "http://x/v1/chat/completions " in example(held, "http://x/v1")


def test_a_turn_that_was_given_up_while_it_waited_is_not_taken(dense: Path) -> None:
    held = open_held(dense, "m", CPU)
    hold = threading.Event()
    steps: list[int] = []
    held.model.register_forward_hook(lambda *_: steps.append(1))
    body = {"prompt": "x", "max_tokens": 50, "temperature": 0}

    async def give_up() -> None:
        held.worker.submit(hold.wait)
        handler = Completions(held, body)
        waiting = asyncio.ensure_future(handler.handle_request(body, "one"))
        await asyncio.sleep(0.1)
        handler.turn.cancel()
        hold.set()
        await waiting

    asyncio.run(give_up())
    assert not steps


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"temperature": 0.5}, {"do_sample": True, "temperature": 0.5}),
        ({"temperature": 0}, {"do_sample": False}),
        ({"temperature": 1e-9}, {"do_sample": False}),
        ({"top_p": 0.5}, {"do_sample": True, "top_p": 0.5}),
        ({}, {"do_sample": True, "temperature": 0.7, "max_new_tokens": 1024, "num_beams": 1}),
        ({"max_tokens": 3}, {"max_new_tokens": 3}),
        ({"max_tokens": 3, "max_completion_tokens": 4}, {"max_new_tokens": 4}),
        ({"stop": ["</turn>", "x"]}, {"eos_token_id": [2, 4]}),
        ({"logit_bias": {"7": -100}}, {"sequence_bias": {(7,): -100.0}}),
    ],
)
def test_what_is_generated_with(body: dict[str, Any], says: dict[str, Any]) -> None:
    own = transformers.GenerationConfig(do_sample=True, temperature=0.7, num_beams=4, eos_token_id=2)
    made = generation_config(body, own, of_bytes())
    assert {name: getattr(made, name) for name in says} == says and own.num_beams == 4


def hear(tokenizer: Any, ids: list[int], stops: list[str], parser: Any = None) -> list[Any]:
    said: list[Any] = []
    listener = Listener(tokenizer._tokenizer, stops, said.append, parser)
    listener.put(torch.tensor([[9, 9, 9]]))
    with contextlib.suppress(Ended):
        for number in ids:
            listener.put(torch.tensor([number]))
    listener.end()
    return said


@given(st.lists(st.text("ab", max_size=4)), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_texts_that_end_a_text(parts: list[str], stops: list[str]) -> None:
    said, made = Stops(stops), ""
    for number, part in enumerate(parts):
        made += said.take(part)
        whole = "".join(parts[: number + 1])
        if any(stop in whole for stop in stops):
            assert said.found and made == Stops(stops).cut(whole) == min((whole.split(s)[0] for s in stops), key=len)
            return
        # Nothing is said that a stop could still take back, and nothing else is held.
        held = whole[len(made) :]
        assert not said.found and whole.startswith(made)
        begun = [whole[-n:] for stop in stops for n in range(1, len(stop)) if whole.endswith(stop[:n])]
        assert held == max(begun, key=len, default="")
    assert made + said.rest() == "".join(parts)


def test_characters_of_several_tokens() -> None:
    tokenizer = of_bytes()
    text = "é漢 \U0001f600 x"
    ids = tokenizer(text).input_ids
    said = hear(tokenizer, ids, [])
    assert said[-1] is None and "".join(said[:-1]) == text and "\ufffd" not in "".join(said[:-1])
    # A last one that is not whole is what decoding makes of it.
    assert "".join(hear(tokenizer, ids[:-4], [])[:-1]) == tokenizer.decode(ids[:-4])
    assert "".join(hear(tokenizer, ids, ["漢"])[:-1]) == "é"


def test_calls_of_tools_are_found() -> None:
    tokenizer = of_bytes(special=["<tool_call>", "</tool_call>", "<|im_end|>", "<think>", "</think>"])
    model = endless("qwen3")
    ids = tokenizer("<|im_start|>assistant\n", return_tensors="pt").input_ids
    written = 'Yes.<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    parser = build_response_parser(tokenizer, model, ids)
    assert parser is not None
    said = hear(tokenizer, tokenizer(written).input_ids, [], parser)
    (call,) = [item for item in said if isinstance(item, ToolCall)]
    assert call.name == "f" and json.loads(call.arguments) == {"x": 1}
    assert "".join(item for item in said if type(item) is str).strip() == "Yes." and said[-1] is None


def test_nobody_listens() -> None:
    said: list[Any] = []
    listener = Listener(of_bytes()._tokenizer, [], said.append)
    listener.put(torch.tensor([[9]]))
    listener.cancel()
    with pytest.raises(Gone):
        listener.put(torch.tensor([70]))
    assert not said and listener.total_tokens == 0


def test_a_failure_in_the_middle_of_a_stream(dense: Path) -> None:
    held = open_held(dense, "m", CPU)

    def fail(*_: Any) -> None:
        raise RuntimeError('a "quoted" reason')

    held.model.register_forward_hook(fail)
    body = {"prompt": "x", "max_tokens": 5, "stream": True}

    async def ask() -> str:
        response = await Completions(held, body).handle_request(body, "one")
        return "".join([part async for part in response.body_iterator])

    assert json.loads(asyncio.run(ask()).removeprefix("data: ")) == {"error": 'generation failed: a "quoted" reason'}
