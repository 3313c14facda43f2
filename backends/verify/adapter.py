"""``sparsify verify`` of an adapter that ``sparsify tune --adapter`` wrote: its bytes, and no NaN in them."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from sparsify.backends.verify.content import check_content, check_numbers, compare_tensors
from sparsify.backends.verify.result import Verification
from sparsify.files.ledger import Ledger
from sparsify.files.reading import admit
from sparsify.finite import infinities_allowed, scan
from sparsify.tensors import digest

WEIGHTS = "adapter_model.safetensors"


def verify_adapter(folder: Path) -> Verification:
    """Hold every file and tensor of an adapter of ``peft`` against its ``sparsify.json``.

    Raises:
        CheckpointError: no sound manifest, or weights that are no file of the folder.
    """
    ledger = Ledger.of(folder)
    result = Verification(folder)
    if ledger.checked == "none":
        result.problems.append("no sparsify.json: there is nothing to hold an adapter against")
        return result
    check_content(result, folder, ledger)
    try:
        tensors = load_file(admit(folder / WEIGHTS))
    except (SafetensorError, OSError) as error:
        result.problems.append(f"{WEIGHTS}: no sound safetensors file ({error})")
        return result
    check_numbers(
        result,
        {n: scan(t, infinities_allowed(n)) for n, t in tensors.items()},
        {n: t.shape for n, t in tensors.items()},
        ledger,
    )
    if ledger.checked != "none":
        compare_tensors(result, tensors.keys(), lambda names: {name: digest(tensors[name]) for name in names}, ledger)
    return result
