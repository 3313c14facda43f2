"""What is known of a folder of ours without reading a weight: its manifest, its config, and what lies there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sparsify.errors import CheckpointError
from sparsify.files.manifest import MANIFEST, digest_of_manifest, read_manifest, sealed_manifest
from sparsify.files.reading import kind_at, read_json, weight_bytes
from sparsify.provenance.figures import Figure, figures_of
from sparsify.provenance.loading import Kind, kind_of
from sparsify.provenance.runs import earlier, whole_of
from sparsify.reporting.layers import Stack, stacks_of
from sparsify.reporting.measured import Measured, measured


@dataclass(frozen=True)
class Facts:
    """A folder of ours.

    Attributes:
        nbytes: of the files that hold weights. digest: of the manifest, by which a page can be held against a folder.
        measured: what ``sparsify eval --json`` says of the folder.
    """

    folder: Path
    manifest: Mapping[str, Any]
    kind: Kind
    nbytes: int
    digest: str
    measured: Sequence[Measured] = ()

    @cached_property
    def history(self) -> Sequence[Mapping[str, Any]]:
        """Every run, the oldest first."""
        return earlier(self.manifest)

    @property
    def passes(self) -> Sequence[Mapping[str, Any]]:
        """What the last step that pruned did, site by site."""
        found: Sequence[Mapping[str, Any]] = self.manifest.get("passes", ())
        return found

    @cached_property
    def stacks(self) -> list[Stack]:
        return stacks_of(self.passes)

    @cached_property
    def figures(self) -> list[Figure]:
        """Every perplexity that the manifest knows, and those that were measured later."""
        return figures_of(self.manifest) + [own.figure for own in self.measured if own.figure is not None]

    @property
    def whole(self) -> Mapping[str, Any] | None:
        """How many numbers the model has and which share is not zero, as the last step that says so found it."""
        return whole_of(self.history)

    @property
    def base(self) -> str:
        """What the first step was given; the model's name where nobody said."""
        given = self.history[0].get("source", {}).get("name") if self.history else None
        return str(given or self.manifest.get("model") or self.folder.name)

    @property
    def trained_since(self) -> bool:
        """Whether what the last step that pruned says of its errors is of weights that were trained after it."""
        steps = self.pruning_steps
        return bool(steps) and any(run["command"] == "tune" for run in self.history[steps[-1] :])

    @property
    def pruning_steps(self) -> list[int]:
        """The numbers of the steps that have passes."""
        return [number for number, run in enumerate(self.history, 1) if run.get("passes")]


def facts_of(folder: Path, check: bool = True, evaluations: Sequence[Path] = ()) -> Facts:
    """Read them.

    Args:
        check: hold the manifest against the digest that it has of itself.
        evaluations: files of what ``sparsify eval --json`` printed.

    Raises:
        CheckpointError: nothing there, not a folder of ours, or a damaged manifest; an evaluation of another folder.
    """
    asked, path = f"report of {folder}", folder.expanduser()
    if kind_at(path) != "folder":
        found = "nothing there" if kind_at(path) is None else "no folder"
        raise CheckpointError(asked, found=found, do="Name a folder that sparsify wrote")
    if not (path / MANIFEST).exists() and not (path / MANIFEST).is_symlink():
        raise CheckpointError(
            asked,
            found=f"no {MANIFEST} in it, which says what was done to a model",
            do="sparsify verify FOLDER counts the zeros of any folder, sparsify diff DENSE FOLDER says what differs",
        )
    manifest = sealed_manifest(path) if check else read_manifest(path)
    config = read_json(path / "config.json") if kind_at(path / "config.json") == "file" else {}
    digest = digest_of_manifest(manifest)
    known = tuple(measured(place, digest) for place in evaluations)
    return Facts(path, manifest, kind_of(path, config, manifest), weight_bytes(path), digest, known)
