"""``history`` in ``sparsify.json``: every run that made the model what it is, oldest first."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sparsify.errors import SpecError
from sparsify.files.checkpoint import Checkpoint
from sparsify.frontend.source import Source
from sparsify.ir.store import RenamedStore
from sparsify.provenance.runs import earlier
from sparsify.tensors import digest, new_hash

# https://reproducible-builds.org/specs/source-date-epoch/: the time, for who wants the same bytes twice.
EPOCH = "SOURCE_DATE_EPOCH"


def run_date() -> str:
    """Now, in UTC, to the second: ``2026-11-27T09:52:44Z``; where SOURCE_DATE_EPOCH is set, that.

    Raises:
        SpecError: it is no number of seconds.
    """
    told = os.environ.get(EPOCH)
    try:
        date = datetime.fromtimestamp(int(told) if told else int(time.time()), UTC)
    except (ValueError, OverflowError, OSError) as error:
        do = "Give seconds since 1970, or unset it"
        raise SpecError(f"{EPOCH}={told}", found="no time", do=do) from error
    return date.strftime("%Y-%m-%dT%H:%M:%SZ")


def versions() -> dict[str, str]:
    """Of what writes and computes here."""
    found = {name: _version(name) for name in ("sparsify-fx", "torch", "transformers", "safetensors")}
    return found | {"python": platform.python_version()}


def entry(
    command: str, date: str, source: Mapping[str, Any], passes: Sequence[Mapping[str, Any]] = (), **others: Any
) -> dict[str, Any]:
    """One run.

    Args:
        command: of ours. source: what it was given; see :func:`origin_of`. passes: what ran, in order.
        others: ``calibration``, ``recipe`` and such; None is not said.
    """
    said = {key: value for key, value in others.items() if value is not None}
    return {"command": command, "date": date, "source": dict(source), "passes": list(passes), **said} | {
        "versions": versions()
    }


def origin_of(source: Source) -> dict[str, Any]:
    """What a run was given: the model's name (its id, of one of the hub), and the digest of its weights."""
    return {"name": source.hub or source.name, "weights": _digest_of(source)}


def restated(manifest: Mapping[str, Any], command: str) -> list[dict[str, Any]]:
    """The history of a folder whose weights ``command`` wrote in another form, by its manifest."""
    digests = manifest.get("digests", {})
    weights = digest_of_sums(digests["tensors"]) if digests.get("tensors") else None
    name = str(manifest.get("model", ""))
    return [*earlier(manifest), entry(command, run_date(), {"name": name, "weights": weights})]


def digest_of_sums(sums: Mapping[str, str]) -> str:
    """One digest of the digests of all tensors: BLAKE2b-256 of them as JSON with sorted keys and no spaces."""
    whole = new_hash()
    text = json.dumps(dict(sums), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    whole.update(text.encode("utf-8", "surrogatepass"))
    return whole.hexdigest()


def _digest_of(source: Source) -> str:
    """The digest of what ``source`` holds: of a folder's tensors as they are stored, else as they are read."""
    if source.ledger.complete and source.adapter is None:
        return digest_of_sums(source.ledger.tensors)
    if source.digest is None:
        source.digest = digest_of_store(source.weights.store)
    return source.digest


def digest_of_store(store: Any) -> str:
    """The same of a store: of a folder's tensors as they are stored, else as they are read."""
    if isinstance(store, RenamedStore):
        store = store.base
    files = getattr(store, "checkpoint", store)
    if isinstance(files, Checkpoint):
        return digest_of_sums(files.own_digests())
    return digest_of_sums({name: digest(store.read(name)) for name in store.names()})


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
