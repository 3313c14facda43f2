"""pytest in processes that begin with torch imported: a mutant then costs its tests, and not five seconds of imports.

``warm.py serve SOCKET`` imports what tests import, except this package, and waits; ``warm.py run SOCKET ARGUMENTS``
has pytest run in a fork of it and ends with pytest's exit code. Without a server ``run`` runs pytest itself.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import socket
import sys
import threading
from pathlib import Path

# As tests/conftest.py sets them, which comes too late here.
SETTINGS = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}
FIRST = (
    "torch", "torch.export", "torch._dynamo", "torch.fx.experimental.symbolic_shapes", "pytest", "hypothesis",
    "hypothesis.extra.numpy", "safetensors.torch", "transformers", "transformers.models.llama.modeling_llama",
    "transformers.models.mixtral.modeling_mixtral", "transformers.models.gpt2.modeling_gpt2", "onnx", "onnx_ir",
    "onnxscript", "onnxruntime", "typer.testing", "rich.console", "huggingface_hub", "networkx",
)  # fmt: skip


def serve(place: Path) -> None:
    """Fork for every connection, until this process is ended."""
    os.environ.update(SETTINGS)
    for name in FIRST:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    place.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(place))
        server.listen()
        while True:
            connection, _ = server.accept()
            with connection:
                if not os.fork():
                    _answer(connection)
                with contextlib.suppress(ChildProcessError):
                    while os.waitpid(-1, os.WNOHANG)[0]:
                        pass


def _answer(connection: socket.socket) -> None:
    """Run pytest, its output and then its code to the other end; stop when that goes away. Does not return."""
    asked = json.loads(connection.makefile().readline())
    os.setpgrp()

    def stop_without_listener() -> None:
        connection.recv(1)
        os.killpg(0, 9)

    threading.Thread(target=stop_without_listener, daemon=True).start()
    os.chdir(asked["folder"])
    for stream in (1, 2):
        os.dup2(connection.fileno(), stream)
    import pytest

    code = int(pytest.main(asked["arguments"]))
    sys.stdout.flush()
    sys.stderr.flush()
    connection.sendall(f"\nexit {code}\n".encode())
    os._exit(code)


def run(place: Path, arguments: list[str]) -> int:
    """The exit code of ``pytest ARGUMENTS`` in a fork of the server at ``place``."""
    try:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(place))
    except OSError:
        os.execv(sys.executable, [sys.executable, "-m", "pytest", *arguments])
    connection.sendall(json.dumps({"folder": str(Path.cwd()), "arguments": arguments}).encode() + b"\n")
    last = ""
    for line in connection.makefile(errors="replace"):
        last = line
        if not line.startswith("exit "):
            print(line, end="")
    # A child that was killed said nothing: that is no pass.
    return int(last.removeprefix("exit ")) if last.startswith("exit ") else 3


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(Path(sys.argv[2]))
    sys.exit(run(Path(sys.argv[2]), sys.argv[3:]))
