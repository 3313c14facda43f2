"""``sparsify serve`` at the command line: what it says, how it ends, and what it refuses before anything is loaded."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from support.command_line import sparsify as command
from support.families import save
from support.onnx_models import endless
from support.serving import with_bytes
from support.tokenizers import CHATML, of_bytes

from sparsify.backends.serve import needed
from sparsify.backends.serve.server import address_of, bind, listen
from sparsify.errors import BackendError, SpecError


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_bytes(endless("llama"), tmp_path_factory.mktemp("served") / "it's")


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])


@pytest.mark.parametrize(("told", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_it_answers_until_it_is_told_to_end(told: signal.Signals, code: int, model: Path) -> None:
    port = free_port()
    address, answers = f"http://127.0.0.1:{port}/v1", []

    def ask() -> None:
        for _ in range(600):
            try:
                body = json.dumps({"model": "it's", "prompt": "x", "max_tokens": 3}).encode()
                with urllib.request.urlopen(f"{address}/completions", body) as answer:
                    answers.append(json.load(answer)["usage"]["completion_tokens"])
                break
            except OSError:
                time.sleep(0.1)
        os.kill(os.getpid(), told)

    client = threading.Thread(target=ask)
    client.start()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        done = command("serve", model, "--port", port, "--device", "cpu")
    finally:
        signal.signal(signal.SIGINT, before)
    client.join()
    assert done.returncode == code and answers == [3] and done.stderr == ""
    loading, serving, curl, *rest = done.stdout.splitlines()
    assert loading == f"loading {model} (checkpoint)"
    assert serving == f"serving it's (LlamaForCausalLM, float32, cpu) at {address}"
    assert curl.startswith(f"  curl {address}/completions -H ") and r"it\u0027s" in curl
    assert rest == ["Ctrl-C ends it.", "stopped"]


def test_a_port_in_use(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = command("serve", model, "--port", port)
        assert done.returncode == 1 and f"--port {port}: another program listens there" in done.stderr
        assert "--port another number" in done.stderr and done.stdout == ""


def test_a_port_that_was_taken_while_the_model_was_loaded() -> None:
    one, two = bind("127.0.0.1", 0), None
    try:
        two = bind("127.0.0.1", one.getsockname()[1])
        listen(two)
        with pytest.raises(BackendError, match="another program listens there"):
            listen(one)
        assert address_of(two) == f"http://127.0.0.1:{one.getsockname()[1]}/v1"
    finally:
        one.close()
        if two is not None:
            two.close()


def test_hosts() -> None:
    with pytest.raises(SpecError, match="no such host"):
        bind("no host.invalid", 0)
    with pytest.raises(BackendError, match="no address of this machine"):
        bind("203.0.113.1", 0)


def test_wrong_words(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in (["--port", "70000"], ["--name", " "], ["--name", "a\x1bb"], ["--threads", "-1"], ["--device", "tpu"]):
        assert command("serve", model, *words).returncode == 2, words
    monkeypatch.setattr(needed, "find_spec", lambda name: None if name == "uvicorn" else name)
    done = command("serve", model)
    assert done.returncode == 2 and "uvicorn" in done.stderr and "fastapi" not in done.stderr
    assert "pip install 'sparsify-fx[serve]'" in done.stderr


def _tokenizer(folder: Path) -> Path:
    of_bytes(chat_template=CHATML).save_pretrained(folder)
    return folder


NOT_SERVED: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda folder: None, "no such folder"),
    "a file": (lambda folder: folder.write_text("x"), "a file"),
    "an empty folder": (lambda folder: folder.mkdir(), "no config.json"),
    "a graph": (lambda folder: (folder.mkdir(), (folder / "model.onnx").write_bytes(b"")), "an ONNX model"),
    "no tokenizer": (lambda folder: save("llama", folder), "tokenizer"),
    "an encoder": (
        lambda folder: _tokenizer(save("bert", folder)),
        "BertForMaskedLM, which does not go on",
    ),
    "two halves": (lambda folder: _tokenizer(save("t5", folder)), "T5ForConditionalGeneration, which does not"),
    "pictures": (lambda folder: _tokenizer(save("vit", folder)), "ViTForImageClassification, which does not"),
    "a damaged file": (lambda folder: _damaged(_tokenizer(save("llama", folder))), "transformers refuses it"),
}


def _damaged(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize("what", NOT_SERVED)
def test_what_is_not_served(what: str, tmp_path: Path) -> None:
    make, says = NOT_SERVED[what]
    folder = tmp_path / "model"
    make(folder)
    done = command("serve", folder, "--port", 0, "--quiet")
    assert done.returncode == 1 and done.stdout == "", done
    assert done.stderr.startswith("error: ") and says in done.stderr and len(done.stderr.splitlines()) == 1
