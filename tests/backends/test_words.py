"""The words of every backend: understood and refused without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sparsify.errors import SpecError
from sparsify.method.registry import registered
from sparsify.method.spec import parse_backend

WRONG = {
    "onnx:opset=3": "only opsets 18 to 24",
    "onnx:dtype=float16": "weights=link points at the checkpoint's own bytes",
    "onnx:weights=loose": "'loose' is not link or external or packed",
    "packed:layout=loose": "'loose' is not auto or packed24 or bitmask or dense",
    "packed:values=int3": "'int3' is not auto or int8 or int4 or full",
    "packed:group=64": "nothing is rounded",
    "packed:choice=best": "'best' is not measured or smallest",
    "cuda:policy=fast": "'fast' is not decode or prefill or both",
    "cuda:tune=maybe": "'maybe' is not true or false",
    "hf:shards=2": "no such option",
}


@pytest.mark.parametrize("words", WRONG)
def test_what_cannot_be_meant_is_refused(words: str) -> None:
    with pytest.raises(SpecError, match=WRONG[words]):
        parse_backend(words)


def test_no_backend_needs_torch_to_know_its_words() -> None:
    code = f"""
import sys
from sparsify.errors import SpecError
from sparsify.method.spec import parse_backend
for name in {sorted(registered("sparsify.backends"))}:
    parse_backend(name)
for words in {list(WRONG)}:
    try:
        parse_backend(words)
    except SpecError:
        continue
    raise AssertionError(words)
import sparsify.backends.bench.commands, sparsify.backends.onnx.commands
import sparsify.backends.packed.commands, sparsify.backends.verify.commands
print({{"torch", "transformers", "onnx", "numpy"}} & sys.modules.keys())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


def test_a_policy_given_in_python_is_checked_too() -> None:
    from sparsify.backends.cuda.backend import CudaBackend

    with pytest.raises(SpecError, match=r"--to cuda:policy=fast: no such policy\. Take decode, prefill, both"):
        CudaBackend("fast")  # type: ignore[arg-type]
