"""Everything that lies in a folder, held against its ``sparsify.json``: what differs, what is gone, what is new."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path

from sparsify.backends.verify.result import Verification
from sparsify.errors import CheckpointError
from sparsify.files.checkpoint import INDEX, WEIGHTS, Checkpoint
from sparsify.files.companions import companions, holds_weights
from sparsify.files.ledger import Ledger, digest_of_header
from sparsify.files.manifest import MANIFEST
from sparsify.files.reading import admit
from sparsify.finite import Scan, said
from sparsify.tensors import CRC, digest_of_span


def differs(what: str) -> str:
    """The sentence for bytes that changed since they were written."""
    return f"{what}: its bytes are not those that were written (checksum of {MANIFEST})"


def check_content(result: Verification, folder: Path, ledger: Ledger) -> dict[str, bool]:
    """Compare every file and every tensor of a safetensors file, and look for NaN; what is wrong goes to ``result``.

    Returns:
        Whether each tensor that was compared is the one that was written.
    """
    if ledger.checked == "none":
        result.unchecked.append(f"bytes: no {MANIFEST} with checksums to compare with")
    elif ledger.checked == CRC:
        result.unchecked.append(
            f"config, tokenizer and other files: {MANIFEST} (format 1) has checksums of tensors alone"
        )
    else:
        _check_files(result, folder, ledger)
    if not (folder / WEIGHTS).exists() and not (folder / INDEX).exists():
        return {}
    try:
        files = Checkpoint(folder)
        check_numbers(result, files.scans(), {name: files.shape(name) for name in files.names()}, ledger)
        return {} if ledger.checked == "none" else _check_tensors(result, files, ledger)
    except CheckpointError as error:
        result.problems.append(str(error))
        return {}


def check_numbers(
    result: Verification, found: Mapping[str, Scan], shapes: Mapping[str, Sequence[int]], ledger: Ledger
) -> None:
    """NaN and infinity that scans of tensors found: a problem, unless the folder says that they were let pass."""
    allowed = bool(ledger.manifest.get("allow_nan"))
    for name, scan in found.items():
        if scan.count:
            sentence = f"{name}: {said(scan, shapes[name])}"
            if allowed:
                result.unchecked.append(f"{sentence}, which --allow-nan let pass")
            else:
                result.problems.append(sentence)


def _check_tensors(result: Verification, files: Checkpoint, ledger: Ledger) -> dict[str, bool]:
    return compare_tensors(result, set(files.names()), lambda names: files.digests(names, ledger.algorithm), ledger)


def compare_tensors(
    result: Verification, held: Set[str], digests: Callable[[Sequence[str]], Mapping[str, str]], ledger: Ledger
) -> dict[str, bool]:
    """Hold the tensors ``held``, by their ``digests``, against the ledger; what is wrong goes to ``result``.

    Returns:
        Whether each tensor that was compared is the one that was written.
    """
    equal: dict[str, bool] = {}
    for name in ledger.tensors:
        if name not in held:
            result.problems.append(f"{name}: {MANIFEST} names it, and no file holds it")
    for name, found in digests(sorted(held & ledger.tensors.keys())).items():
        equal[name] = found == ledger.tensors[name]
        result.compared += 1
        if not equal[name]:
            result.problems.append(differs(name))
    result.problems += [
        f"{name}: a tensor that {MANIFEST} does not know" for name in sorted(held - ledger.tensors.keys())
    ]
    return equal


def _check_files(result: Verification, folder: Path, ledger: Ledger) -> None:
    known = ledger.headers.keys() | ledger.files.keys()
    here = {path.name: path for path in sorted(folder.iterdir()) if path.name != MANIFEST and not path.is_dir()}
    here |= {path.relative_to(folder).as_posix(): path for path in companions(folder) if path.parent != folder}
    here |= {n: folder / n for n in known if "/" in n and ".." not in Path(n).parts and (folder / n).is_file()}
    result.problems += [f"{name}: {MANIFEST} names it, and it is not here" for name in sorted(known - here.keys())]
    strangers = sorted(here.keys() - known)
    if strangers:
        named = ", ".join(strangers)
        result.unchecked.append(f"{named}: not in {MANIFEST}, so nothing says what should be there")
    for name in sorted(known & here.keys()):
        try:
            admit(here[name])
            if name in ledger.headers:
                sound = digest_of_header(here[name]) == ledger.headers[name]
                named = f"the header of {name}"
            else:
                sound, named = digest_of_span(here[name]) == ledger.files[name], name
        except (CheckpointError, EOFError) as error:
            result.problems.append(str(error))
            continue
        result.files += 1
        if not sound:
            result.problems.append(differs(named))
    result.problems += [
        f"{name}: a weight file that {MANIFEST} does not know"
        for name in strangers
        if holds_weights(name) and "/" not in name
    ]
