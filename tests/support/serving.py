"""``sparsify serve`` as its users meet it: a process, a port that was free, and OpenAI's own client."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import torch
import transformers
from support.tokenizers import of_bytes

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'stranger' %}{{ raise_exception('no such role') }}{% endif %}"
    "# {{ message['role'] }}: {{ message['content'] }}\n{% endfor %}{% if loud %}# LOUD\n{% endif %}def "
)


@dataclass(frozen=True)
class Server:
    """A server that answers.

    Attributes:
        process: to be told to stop. told: what ``--json`` printed.
    """

    process: subprocess.Popen[str]
    told: dict[str, Any]

    @property
    def address(self) -> str:
        return str(self.told["address"])

    @property
    def name(self) -> str:
        return str(self.told["model"])

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.address, api_key="none", max_retries=0, timeout=120)

    def connect(self) -> socket.socket:
        host, _, port = self.address.removeprefix("http://").removesuffix("/v1").rpartition(":")
        return socket.create_connection((host, int(port)), timeout=60)

    def post(self, way: str, body: bytes) -> socket.socket:
        """A connection on which a request was sent, and nothing read."""
        made = self.connect()
        head = f"POST /v1/{way} HTTP/1.1\r\nHost: here\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        made.sendall(head.encode() + body)
        return made

    def answer(self, way: str, body: bytes) -> tuple[int, Any]:
        """Status, and JSON."""
        status, _, said = self.said(way, body)
        return status, json.loads(said)

    def said(self, way: str, body: bytes) -> tuple[int, str, str]:
        """Status, the kind of content, and the whole of it."""
        with self.post(way, body) as made:
            response = http.client.HTTPResponse(made)
            response.begin()
            return response.status, response.getheader("content-type", ""), response.read().decode()


@contextlib.contextmanager
def serving(folder: Path, *words: object) -> Iterator[Server]:
    """``sparsify serve FOLDER WORDS`` on a port that is free; killed at the end if it still runs."""
    command = [sys.executable, "-m", "sparsify", "serve", str(folder), "--port", "0", "--json", *map(str, words)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        # A test may run where Ctrl-C is ignored, which a process of it would take over.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        assert line, process.stderr.read()
        yield Server(process, json.loads(line))
    finally:
        process.kill()
        process.communicate()


def bundled_in_float32(bundled: Path, folder: Path, template: str | None = TEMPLATE) -> Path:
    """One block of the bundled model, in float32, in which likely tokens are rarely as likely; with a chat template."""
    config = transformers.AutoConfig.from_pretrained(bundled, num_hidden_layers=1)
    model = transformers.AutoModelForCausalLM.from_pretrained(bundled, config=config, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(bundled)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def with_bytes(model: Any, folder: Path, chat_template: str | None = None) -> Path:
    """``model`` with a token for each byte, so that any text can be sent to it."""
    tokenizer = of_bytes(chat_template=chat_template)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def offline(model: Any, tokenizer: Any, text: str, tokens: int) -> str:
    """The text that comes after ``text``, the likeliest token each time."""
    given = tokenizer(text, return_tensors="pt")
    out = model.generate(
        given.input_ids, attention_mask=given.attention_mask, max_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    return str(tokenizer.decode(out[0, given.input_ids.shape[1] :], skip_special_tokens=True))
