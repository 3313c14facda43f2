"""What several tests of the GPU runtime need."""

from __future__ import annotations

import pytest

from sparsify.runtime.cuda import nvrtc


@pytest.fixture(scope="module")
def compiler() -> nvrtc.NVRTC:
    found = nvrtc.nvrtc()
    if found is None:
        pytest.skip("no NVRTC on this machine")
    return found
