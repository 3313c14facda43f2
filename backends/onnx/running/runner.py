"""Logits of an exported graph, and generation token by token over the cache in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsify.backends.onnx.running.session import NUMPY, find_onnx, open_session
from sparsify.backends.onnx.storage.store import check_written
from sparsify.errors import BackendError, first_line
from sparsify.files.manifest import section

TokenIds = npt.NDArray[np.int64]
# The states that a graph takes and gives, by the names of its inputs; onnxruntime's own values.
Cache = dict[str, Any]


@dataclass(frozen=True)
class Sampling:
    """The next token: the likeliest at temperature 0, else drawn from the ``top_k`` likeliest (0: from all)."""

    temperature: float = 0.0
    top_k: int = 0
    seed: int = 0


def is_state(name: str) -> bool:
    """Whether an input of a graph holds what a layer kept of tokens before: a name with its number, as no series has
    (``past_values``).
    """
    return name.startswith("past") and any(letter.isdigit() for letter in name)


class Runner:
    """A decoder or step graph in a session; ``file`` is ``model.onnx`` or the folder that holds it. With ``check`` a
    folder of ours is held against its ``sparsify.json`` first; ``session``: where the file is open already.

    Raises:
        BackendError, CheckpointError: no such file, or a graph that does not generate.
    """

    def __init__(
        self, file: Path, *, device: str = "cpu", threads: int = 0, check: bool = True, session: Any = None
    ) -> None:
        self.file = find_onnx(file)
        ledger = check_written(self.file, check)
        self.folder = self.file.parent
        said = section(ledger.manifest, "onnx")
        self.session = session or open_session(self.file, device=device, threads=threads)
        self.inputs = {i.name: i for i in self.session.get_inputs()}
        self.outputs = [o.name for o in self.session.get_outputs()]
        self.past = [n for n in self.inputs if is_state(n)]
        self.present = [n for n in self.outputs if n.startswith("present")]
        # A model that generates, without a cache: all of the text goes in for every token.
        self.whole = not self.past and said.get("kind") == "uncached" and "logits" in self.outputs
        if "input_ids" not in self.inputs or not (self.past or self.whole) or len(self.past) != len(self.present):
            raise BackendError(
                f"generating with {self.file}",
                found=f"a graph of {', '.join(self.inputs)}, without a cache",
                do="Only decoders generate; run other graphs with onnxruntime.InferenceSession",
            )
        # A graph of one step has a fixed sequence length.
        self.step_only = list(self.inputs["input_ids"].shape)[1:] == [1]
        # Only a model that keeps no keys has no use for the mask of the tokens before.
        mask = self.inputs.get("attention_mask")
        self.one_mask = mask is not None and list(mask.shape)[1:] == [1]

    def empty(self, rows: int) -> Cache:
        """The cache before the first token."""
        try:
            return {name: self._zeros(self.inputs[name], rows) for name in self.past}
        except Exception as error:  # of an input that is no state: of another kind, or of a size past all memory
            raise self._failed(error) from error

    def forward(self, ids: TokenIds, mask: TokenIds, cache: Cache) -> tuple[npt.NDArray[np.generic], Cache]:
        """Logits [rows, tokens, vocabulary] of ``ids`` after ``cache``, and the cache after them.

        Args:
            mask: [rows, past + tokens], 0 on padding.
        """
        if not self.step_only or ids.shape[1] == 1:
            return self._run(ids, mask, cache)
        parts = []
        seen = mask.shape[1] - ids.shape[1]
        for t in range(ids.shape[1]):
            logits, cache = self._run(ids[:, t : t + 1], mask[:, : seen + t + 1], cache)
            parts.append(logits)
        return np.concatenate(parts, 1), cache

    def _run(self, ids: TokenIds, mask: TokenIds, cache: Cache) -> tuple[npt.NDArray[np.generic], Cache]:
        try:
            return self._ran(ids, mask, cache)
        except Exception as error:  # onnxruntime's own kinds are not importable by name
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> BackendError:
        return BackendError(
            f"generating with {self.file}",
            found=f"the graph does not run ({first_line(error)})",
            do="sparsify verify says whether the files are whole",
        )

    def _ran(self, ids: TokenIds, mask: TokenIds, cache: Cache) -> tuple[npt.NDArray[np.generic], Cache]:
        import onnxruntime as ort

        length = ids.shape[1]
        position = np.maximum(np.cumsum(mask, 1) - 1, 0)[:, -length:]
        given = {
            "input_ids": ids,
            "attention_mask": mask[:, -1:] if self.one_mask else mask,
            "position_ids": position,
        }
        feed = {
            name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value.astype(NUMPY[self.inputs[name].type])))
            for name, value in given.items()
            if name in self.inputs
        }
        out = dict(zip(self.outputs, self.session.run_with_ort_values(self.outputs, feed | cache), strict=True))
        # The cache stays where onnxruntime made it: nothing is copied from one step to the next.
        return out["logits"].numpy(), dict(zip(self.past, (out[name] for name in self.present), strict=True))

    def generate(
        self, ids: TokenIds, mask: TokenIds | None = None, *, tokens: int, sampling: Sampling | None = None
    ) -> Iterator[TokenIds]:
        """Yield the next token of every row, ``tokens`` times.

        Args:
            ids: [rows, length], padded on the left where ``mask`` is 0.
        """
        sampling = sampling or Sampling()
        random = np.random.default_rng(sampling.seed)
        mask = np.ones_like(ids) if mask is None else mask
        if self.whole and not mask.all():
            raise BackendError(
                f"generating with {self.file}",
                found="padding among the text, and a graph without a cache (cache=none), which counts it as tokens",
                do="Give rows of one length",
            )
        cache = self.empty(len(ids))
        for _ in range(tokens):
            logits, cache = self.forward(ids, mask, cache)
            chosen = _choose(logits[:, -1].astype(np.float32), sampling, random)[:, None]
            yield chosen[:, 0]
            ids = np.concatenate([ids, chosen], 1) if self.whole else chosen
            mask = np.concatenate([mask, np.ones_like(chosen)], 1)

    def _zeros(self, info: Any, rows: int) -> Any:
        import onnxruntime as ort

        # The batch is the first dimension; every other one that is not fixed is the past, which is empty.
        shape = [rows, *(n if isinstance(n, int) else 0 for n in info.shape[1:])]
        if info.type == "tensor(bfloat16)":
            from onnx import TensorProto

            return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(np.zeros(shape, np.uint16), TensorProto.BFLOAT16)
        return ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, NUMPY[info.type]))


def _choose(logits: npt.NDArray[np.float32], sampling: Sampling, random: np.random.Generator) -> TokenIds:
    if sampling.temperature <= 0:
        return logits.argmax(-1).astype(np.int64)
    scaled = logits / sampling.temperature
    if 0 < sampling.top_k < scaled.shape[1]:
        least = np.partition(scaled, -sampling.top_k, 1)[:, -sampling.top_k, None]
        scaled = np.where(scaled < least, -np.inf, scaled)
    # The largest of the logits with Gumbel noise is a draw from their softmax.
    return (scaled + random.gumbel(size=scaled.shape)).argmax(-1).astype(np.int64)
