"""A model in turns with other runtimes' forms of it, one of these at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsify.backends.bench.benchmark import PeerSpeed
from sparsify.backends.bench.contender import Reader
from sparsify.backends.bench.peers.genai import genai_peers, genai_version
from sparsify.backends.bench.peers.llama import llama_peers, llama_version
from sparsify.backends.bench.peers.peer import Peer, has_genai, has_llama
from sparsify.backends.bench.turns import reading_speed
from sparsify.context import Progress, report
from sparsify.errors import BackendError, Refused
from sparsify.files.ownership import Scratch


def race_peers(
    out: Reader, model: Any, source: Path, ids: Tensor, tokens: int, rounds: int
) -> tuple[list[PeerSpeed], list[Refused]]:
    """``out`` in turns with every peer that is installed and can hold ``model``.

    Args:
        model: of transformers, the dense one; ``source`` is its folder.
        ids: the prompt [1, length]; ``tokens`` follow it.

    Returns:
        What was measured, and what of which peer could not be.

    Raises:
        BackendError: no peer that is installed can hold the model.
    """
    raced: list[PeerSpeed] = []
    refused: list[Refused] = []
    makers: list[tuple[str, Callable[[Path], Iterator[Peer]]]] = []
    if has_llama():
        makers.append((llama_version(), lambda folder: llama_peers(model, folder)))
    if has_genai():
        makers.append((genai_version(), lambda folder: genai_peers(source, folder)))
    for version, make in makers:
        with Scratch("sparsify-bench") as folder:
            try:
                report(Progress("making", what=f"the model for {version}"))
                for peer in make(Path(folder)):
                    report(Progress("timing", what=peer.name))
                    with peer.open() as reader:
                        speeds = reading_speed((reader, out), ids, tokens, rounds)
                    raced.append(PeerSpeed(peer.name, version, peer.nbytes, *speeds))
            except BackendError as error:
                refused.append(Refused(str(error), version))
    if not raced:
        raise BackendError(
            f"bench --peers of {source}",
            found="; ".join(f"{one.node}: {one.reason}" for one in refused),
            do="Leave --peers out, or give another dense model with --against",
        )
    return raced, refused
