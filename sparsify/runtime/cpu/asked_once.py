"""Whether codes are codes: asked once of each tensor, since that takes as long as a product."""

from __future__ import annotations

import weakref

from torch import Tensor

from sparsify.errors import BackendError
from sparsify.runtime.codes import ascending


class KnownCodes:
    """Tensors that were found to hold nothing but two ascending positions a nibble.

    A tensor is asked again when it was changed in place or given other memory. A change that torch does not count (of a
    tensor made in inference mode, or through shared memory) goes unseen: it gives wrong products, and reads nothing
    outside of the tensors, for a nibble is four positions at most.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], int, int | None]] = {}

    def check(self, codes: Tensor) -> None:
        """Refuse codes that are none.

        Raises:
            BackendError: a nibble that is not two ascending positions.
        """
        known = self._known.get(id(codes))
        same = known is not None and known[0]() is codes and known[1] == codes.data_ptr()
        # A tensor made in inference mode has no version, and raises where it is asked for one.
        if same and known is not None and (known[2] is None or known[2] == codes._version):
            return
        if not ascending(codes):
            raise BackendError(
                f"a product with packed24 weights, codes {list(codes.shape)}",
                found="a code that is not two ascending positions of four",
                do="Pack the matrix again: these are not the codes of one",
            )
        key, version = id(codes), None if codes.is_inference() else codes._version
        self._known[key] = (weakref.ref(codes, lambda gone: self._forget(key, gone)), codes.data_ptr(), version)

    def _forget(self, key: int, gone: weakref.ref[Tensor]) -> None:
        # Another tensor may have the number by now.
        if (entry := self._known.get(key)) is not None and entry[0] is gone:
            del self._known[key]
