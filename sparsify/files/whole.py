"""Every byte of a model folder of ours at once, for whoever does not read it tensor by tensor."""

from __future__ import annotations

from pathlib import Path

from sparsify.files.checkpoint import Checkpoint
from sparsify.files.companions import check_companions
from sparsify.files.ledger import Ledger


def check_folder(folder: Path, check: bool = True) -> Ledger:
    """Hold all that lies in ``folder`` against its ``sparsify.json``: configs, tokenizer, headers, tensors.

    Args:
        check: False looks only at what the files are: regular ones, of this folder.

    Raises:
        CheckpointError: something is not what was written; it is named.
    """
    ledger = Ledger.of(folder, check)
    check_companions(folder, ledger)
    if ledger.checked not in ("none", "skipped"):
        Checkpoint(folder, ledger=ledger).check()
    return ledger
