"""The structural passes of a compile: each writes a smaller model, which all that follows takes for the model."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sparsify.calibration.data import Calibration, example_batch, load_calibration
from sparsify.capture import capture, quiet
from sparsify.errors import BackendError
from sparsify.pruning import Observer
from sparsify.restructure import plan, restructure
from sparsify.restructured import Restructured
from sparsify.source import Source, open_source
from sparsify.structural import StructuralPass


class Smaller:
    """A temporary folder with the smaller model, until it is left or :meth:`detach` is called.

    Raises:
        BackendError: not a transformers model: its config could not say the new widths.
    """

    def __init__(
        self, source: Source, passes: Sequence[StructuralPass], ignore: Sequence[str], only: Sequence[str]
    ) -> None:
        if not source.is_transformers or source.config is None:
            raise BackendError(
                f"making {source.name} smaller",
                found="not a transformers model, whose config says its widths",
                do="Cut its graph in Python: sparsify.shrink.shrink with what coupled_dimensions(program) finds",
            )
        self.source, self.passes, self.ignore, self.only = source, list(passes), list(ignore), list(only)
        self.done: list[Restructured] = []
        self._place: tempfile.TemporaryDirectory[str] | None = None

    def planned(self) -> list[Restructured]:
        """What each pass would do to the model as it is now."""
        program = capture(self.source, example_batch(self.source))
        return [plan(program, p, self.ignore, self.only) for p in self.passes]

    def calibration(
        self, given: Any, *, samples: int | None, sequence_length: int | None, seed: int
    ) -> Calibration | None:
        """Samples for the gradients that the passes need, one by one; None where they need none."""
        # Before data is drawn, which may take minutes, all that can be refused is.
        self.planned()
        if not any(p.needs_data for p in self.passes):
            return None
        return load_calibration(
            given, self.source, samples=samples, sequence_length=sequence_length, seed=seed, one_by_one=True
        )

    def cut(
        self, data: Calibration | None, *, memory: int, device: torch.device, seed: int, observe: Observer
    ) -> Source:
        """Run the passes; the smaller model."""
        self._place = tempfile.TemporaryDirectory(prefix="sparsify-smaller-")
        name = self.source.name
        if self.source.folder is None:
            saved = Path(self._place.name) / "saved"
            with quiet():
                self.source.module.save_pretrained(saved)  # type: ignore[operator]
            self.source = open_source(saved)
        for number, structural_pass in enumerate(one for p in self.passes for one in p.rounds()):
            into = Path(self._place.name) / str(number)
            into.mkdir()
            example = example_batch(self.source) if data is None else data.batches[0]
            done = restructure(
                self.source,
                structural_pass,
                None if data is None else data.batches,
                None if data is None else data.labels,
                example,
                into,
                ignore=self.ignore,
                only=self.only,
                memory=memory,
                device=device,
                seed=seed,
                observe=observe,
            )
            self.done.append(done)
            smaller = open_source(into, trust_remote_code=self.source.trust_remote_code)
            self.source = replace(smaller, name=name)
        return self.source

    def detach(self) -> Any:
        """The folder's owner: whoever holds it keeps the folder."""
        place, self._place = self._place, None
        return place

    def __enter__(self) -> Smaller:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._place is not None:
            self._place.cleanup()
