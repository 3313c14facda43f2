"""A socket, and a server on it until it is told to stop."""

from __future__ import annotations

import errno
import socket

import uvicorn

from sparsify.backends.serve.app import build_app
from sparsify.backends.serve.handlers import Held
from sparsify.errors import BackendError, SpecError

# Seconds that answers have to come to their end when the server is told to stop.
_GRACE = 5


def bind(host: str, port: int) -> socket.socket:
    """A socket that nothing listens on yet; before a model is loaded, so that a port in use is told at once.

    Raises:
        SpecError: no such host. BackendError: the port cannot be had.
    """
    asked = f"--host {host} --port {port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        do = "Give an address of this machine: 127.0.0.1, or 0.0.0.0 for all of them"
        raise SpecError(asked, found=f"no such host ({error})", do=do) from error
    made = socket.socket(family, kind, protocol)
    # A port whose last connections are only just closed is free.
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind(address)
    except OSError as error:
        made.close()
        raise _cannot(asked, error) from error
    return made


def listen(made: socket.socket) -> None:
    """Raises:
    BackendError: another program has begun to listen there.
    """
    try:
        made.listen(2048)
    except OSError as error:
        host, port = made.getsockname()[:2]
        raise _cannot(f"--host {host} --port {port}", error) from error


def address_of(made: socket.socket) -> str:
    """The URL under which OpenAI's clients find it."""
    host, port = made.getsockname()[:2]
    return f"http://[{host}]:{port}/v1" if made.family == socket.AF_INET6 else f"http://{host}:{port}/v1"


def run_until_told(held: Held, made: socket.socket, *, log_requests: bool = False) -> None:
    """Answer requests until Ctrl-C or SIGTERM, which are raised again when all is closed."""
    config = uvicorn.Config(
        build_app(held),
        log_config=None,
        access_log=log_requests,
        lifespan="off",
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=_GRACE,
    )
    try:
        uvicorn.Server(config).run(sockets=[made])
    finally:
        made.close()
        # Turns were cancelled with their requests: what runs ends at its next token.
        held.worker.shutdown(cancel_futures=True)


def _cannot(asked: str, error: OSError) -> BackendError:
    reasons = {
        errno.EADDRINUSE: ("another program listens there", "Give --port another number, or 0 for any that is free"),
        errno.EACCES: ("this user may not listen there", "Give --port 1024 or more"),
        errno.EADDRNOTAVAIL: (
            "that is no address of this machine",
            "Give --host 127.0.0.1, or 0.0.0.0 for all of them",
        ),
    }
    found, do = reasons.get(error.errno or 0, (error.strerror or str(error), "Give another --host or --port"))
    return BackendError(asked, found=found, do=do)
