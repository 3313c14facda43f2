"""A packed folder served to OpenAI's client, and to clients that mean no good."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import transformers
from support.folders import SMALLEST, load
from support.onnx_models import endless
from support.serving import Server, bundled_in_float32, offline, serving, with_bytes

import sparsify

PROMPTS = ["def main(", "import os\n", "class Point:\n    ", "for name in names:\n", "# é 漢 字\n"]
Offline = Callable[[str, int], str]


@pytest.fixture(scope="session")
def packed(bundled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    dense = bundled_in_float32(bundled, root / "dense")
    sparsify.compile(dense, ["magnitude:2:4"], to=SMALLEST, output=root / "packed")
    return root / "packed"


@pytest.fixture(scope="session")
def server(packed: Path) -> Iterator[Server]:
    with serving(packed, "--name", "own/name") as made:
        yield made


@pytest.fixture(scope="session")
def greedy(packed: Path) -> Offline:
    model, tokenizer = load(packed), transformers.AutoTokenizer.from_pretrained(packed)
    return lambda text, tokens: offline(model, tokenizer, text, tokens)


def complete(server: Server, prompt: str, tokens: int, **more: Any) -> str:
    options: dict[str, Any] = {"temperature": 0, **more}
    made = server.client().completions.create(model=server.name, prompt=prompt, max_tokens=tokens, **options)
    if not options.get("stream"):
        return str(made.choices[0].text)
    return "".join(part.choices[0].text for part in made)


def test_the_model_and_no_other(server: Server) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == ["own/name"]
    assert client.models.retrieve("own/name").id == "own/name"
    for ask in (
        lambda: client.models.retrieve("gpt-4"),
        lambda: client.completions.create(model="gpt-4", prompt="x"),
        lambda: client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "x"}]),
    ):
        with pytest.raises(openai.NotFoundError, match="Ask for 'own/name'") as refused:
            ask()
        assert refused.value.code == "model_not_found"
    # What transformers' own server would download for a request, and throw out for another.
    for way in ("/load_model", "/reset", "/v1/responses"):
        with pytest.raises(openai.NotFoundError):
            client.post(f"{server.address.removesuffix('/v1')}{way}", body={"model": "gpt2"}, cast_to=object)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_texts_are_those_of_the_folder(prompt: str, server: Server, greedy: Offline) -> None:
    expected = greedy(prompt, 16)
    assert expected and complete(server, prompt, 16) == expected == complete(server, prompt, 16, stream=True)


def test_what_comes_with_a_text(server: Server) -> None:
    whole = server.client().completions.create(model=server.name, prompt="def main(", max_tokens=5, temperature=0)
    assert whole.usage is not None and whole.usage.completion_tokens == 5 and whole.choices[0].finish_reason == "length"
    assert whole.model == "own/name" and whole.id.startswith("cmpl-")
    asked = {"prompt": "def main(", "max_tokens": 5, "stream": True, "temperature": 0}
    status, kind, said = server.said("completions", json.dumps(asked).encode())
    assert status == 200 and kind.startswith("text/event-stream") and said.endswith("data: [DONE]\n\n")
    last = json.loads(said.split("data: ")[-2])
    assert last["usage"] == whole.usage.to_dict() and last["choices"][0]["finish_reason"] == "length"


def test_chat(server: Server, greedy: Offline) -> None:
    client = server.client()
    messages: list[Any] = [{"role": "system", "content": "code"}, {"role": "user", "content": "a main"}]
    expected = greedy("# system: code\n# user: a main\ndef ", 12)
    made = client.chat.completions.create(model=server.name, messages=messages, max_tokens=12, temperature=0)
    assert made.choices[0].message.content == expected and made.choices[0].message.role == "assistant"
    parts = [{"role": "system", "content": "code"}, {"role": "user", "content": [{"type": "text", "text": "a main"}]}]
    streamed = client.chat.completions.create(
        model=server.name,
        messages=parts,  # type: ignore[arg-type]
        max_completion_tokens=12,
        temperature=0,
        stream=True,
    )
    assert "".join(part.choices[0].delta.content or "" for part in streamed) == expected
    loud = client.chat.completions.create(
        model=server.name,
        messages=messages,
        max_tokens=12,
        temperature=0,
        extra_body={"chat_template_kwargs": {"loud": True}},
    )
    assert loud.choices[0].message.content == greedy("# system: code\n# user: a main\n# LOUD\ndef ", 12)
    with pytest.raises(openai.BadRequestError, match="no such role"):
        client.chat.completions.create(
            model=server.name,
            messages=[{"role": "stranger", "content": "x"}],  # type: ignore[list-item]
        )


def test_sixteen_at_once(server: Server, greedy: Offline) -> None:
    asked = [(f"{PROMPTS[n % len(PROMPTS)]}# {n}\n", 4 + n % 5) for n in range(16)]
    with ThreadPoolExecutor(16) as pool:
        made = list(pool.map(lambda n: complete(server, *asked[n], stream=n % 2 == 0), range(16)))
    assert made == [greedy(*one) for one in asked]


def test_where_a_text_ends(server: Server, greedy: Offline) -> None:
    whole = greedy("def main(", 24)
    # One that begins and ends in the middle of tokens.
    for stop in (whole[7:10], [whole[12:13], "nowhere"], [whole[5:9], whole[9:14]]):
        first = min(place for text in ([stop] if isinstance(stop, str) else stop) if (place := whole.find(text)) >= 0)
        for stream in (False, True):
            assert complete(server, "def main(", 24, stop=stop, stream=stream) == whole[:first]
    made = server.client().completions.create(
        model=server.name, prompt="def main(", max_tokens=24, temperature=0, stop=whole[7:10]
    )
    assert made.choices[0].finish_reason == "stop"
    assert complete(server, "def main(", 24, stop="nowhere at all", stream=True) == whole


def test_seeds_and_temperatures(server: Server, greedy: Offline) -> None:
    def drawn(**more: Any) -> str:
        return complete(server, "def main(", 24, **more)

    with ThreadPoolExecutor(8) as pool:
        # Others that are drawn meanwhile do not change what a seed gives, nor do they repeat it.
        turns = [{"temperature": 1, "seed": 5} if n % 2 else {"temperature": 1} for n in range(8)]
        made = list(pool.map(lambda more: drawn(**more), turns))
    assert len(set(made[1::2])) == 1 and len({*made[::2], made[1]}) == 5
    assert drawn(temperature=1, seed=6) != made[1]
    assert drawn(temperature=2, top_p=0) == drawn(temperature=0, seed=5) == greedy("def main(", 24)
    assert drawn(logit_bias={"300": 100}) != greedy("def main(", 24)


def test_clients_that_leave(server: Server) -> None:
    """What they asked for is not made: the next one is answered sooner than one of them would have been."""
    start = time.perf_counter()
    complete(server, "x = ", 400)
    one = time.perf_counter() - start
    for stream in (False, True):
        body = json.dumps({"prompt": "x = ", "max_tokens": 1000, "temperature": 0, "stream": stream}).encode()
        left = [server.post("completions", body) for _ in range(6)]
        time.sleep(one / 10)
        for client in left:
            client.close()
        start = time.perf_counter()
        complete(server, "x = ", 1)
        # Of all six it would be 15 times as long.
        assert time.perf_counter() - start < 2 * one


BAD: dict[str, tuple[str, Any]] = {
    "nothing": ("completions", b""),
    "no JSON": ("completions", b'{"prompt": '),
    "a list": ("completions", b"[1, 2]"),
    "nests deeply": ("completions", b'{"prompt": ' + b"[" * 100_000),
    "a number without end": ("completions", b'{"prompt": "x", "max_tokens": ' + b"9" * 10_000 + b"}"),
    "no UTF-8": ("completions", b'{"prompt": "\xff"}'),
    "half a pair": ("completions", rb'{"prompt": "\ud800"}'),
    "NaN": ("completions", b'{"prompt": "x", "temperature": NaN}'),
    "infinity": ("completions", b'{"prompt": "x", "temperature": 1e999}'),
    "no prompt": ("completions", {}),
    "no text": ("completions", {"prompt": 5}),
    "an empty one": ("completions", {"prompt": ""}),
    "two at once": ("completions", {"prompt": ["a", "b"]}),
    "tokens": ("completions", {"prompt": [1, 2]}),
    "a long prompt": ("completions", {"prompt": "x " * 3000}),
    "more than there is room for": ("completions", {"prompt": "x", "max_tokens": 1024}),
    "no tokens": ("completions", {"prompt": "x", "max_tokens": 0}),
    "true tokens": ("completions", {"prompt": "x", "max_tokens": True}),
    "half a token": ("completions", {"prompt": "x", "max_tokens": 1.5}),
    "cold": ("completions", {"prompt": "x", "temperature": -1}),
    "a word": ("completions", {"prompt": "x", "temperature": "hot"}),
    "a probability": ("completions", {"prompt": "x", "top_p": 1.5}),
    "two texts": ("completions", {"prompt": "x", "n": 2}),
    "a penalty": ("completions", {"prompt": "x", "frequency_penalty": 1}),
    "an unknown field": ("completions", {"prompt": "x", "top_k": 5}),
    "a config": ("completions", {"prompt": "x", "generation_config": "{}"}),
    "an empty stop": ("completions", {"prompt": "x", "stop": [""]}),
    "stops": ("completions", {"prompt": "x", "stop": ["x"] * 17}),
    "a seed": ("completions", {"prompt": "x", "seed": 1 << 63}),
    "no token": ("completions", {"prompt": "x", "logit_bias": {"4096": 1}}),
    "no number of a token": ("completions", {"prompt": "x", "logit_bias": {"²": 1}}),
    "a model of another kind": ("completions", {"prompt": "x", "model": ["x"]}),
    "a stream": ("completions", {"prompt": "x", "stream": "yes"}),
    "no messages": ("chat/completions", {}),
    "none": ("chat/completions", {"messages": []}),
    "a message": ("chat/completions", {"messages": ["hello"]}),
    "no role": ("chat/completions", {"messages": [{"content": "hello"}]}),
    "no content": ("chat/completions", {"messages": [{"role": "user"}]}),
    "a picture": (
        "chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}]},
    ),
    "a call": ("chat/completions", {"messages": [{"role": "user", "tool_calls": [{"function": {"name": "f"}}]}]}),
    "a tool": ("chat/completions", {"messages": [{"role": "user", "content": "x"}], "tools": [{}]}),
    "a template": (
        "chat/completions",
        {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"chat_template": "x"}},
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_requests(what: str, server: Server) -> None:
    way, body = BAD[what]
    status, said = server.answer(way, body if isinstance(body, bytes) else json.dumps(body).encode())
    assert status == 400 and said["error"]["message"] and said["error"]["type"] == "invalid_request_error", said


def test_nonsense_and_the_server_lives(server: Server, greedy: Offline) -> None:
    for nonsense in (
        b"\x00\xff\x16\x03",
        b"GET\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 9\r\n\r\n{",
    ):
        with server.connect() as made:
            made.sendall(nonsense)
    with server.connect() as made:
        made.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n{")
    status, said = server.answer("completions", json.dumps({"prompt": "x" * (9 << 20)}).encode())
    assert status == 413 and "larger than" in said["error"]["message"]
    assert server.answer("nothing", b"{}")[0] == 404
    assert complete(server, "def main(", 3) == greedy("def main(", 3) and server.process.poll() is None


@pytest.mark.slow
@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_in_the_middle_of_a_text(told: signal.Signals, tmp_path: Path) -> None:
    model = endless("mamba")  # which any length goes into
    folder = with_bytes(model, tmp_path / "model")
    with serving(folder, "--log-level", "info") as made:
        body = json.dumps({"prompt": "x", "max_tokens": 1 << 20, "stream": True}).encode()
        with made.post("completions", body) as streamed, made.post("completions", body.replace(b"true", b"false")):
            streamed.recv(1 << 16)
            start = time.perf_counter()
            made.process.send_signal(told)
            assert made.process.wait(60) == {signal.SIGTERM: 143, signal.SIGINT: 130}[told]
        assert time.perf_counter() - start < 30
        assert made.process.stderr is not None
        lines = made.process.stderr.read().splitlines()
        assert len(lines) <= 2 and all('"POST /v1/completions HTTP/1.1"' in line for line in lines), lines
