"""What may be asked of the backend ``onnx``. Imports nothing heavy: its words are refused before a model is opened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparsify.errors import SpecError

Mode = Literal["link", "external", "packed", "sparse"]
Linear = Literal["gemm", "matmul"]
Cache = Literal["keep", "none"]
Dtype = Literal["float32", "float16", "bfloat16"]
OPSETS = tuple(range(18, 25))


@dataclass(frozen=True)
class Options:
    """The options of the backend ``onnx``.

    Attributes:
        weights: ``link`` points into the safetensors of the folder, ``external`` writes one data file in their place,
            ``packed`` writes zeros as one bit, ``sparse`` too, and multiplies without unpacking them: onnxruntime is
            given the library ``sparsify.onnx_library()`` for that.
        opset: 18 to 24; 23 is the first with attention and normalisation as operators.
        linear: ``gemm`` on weights [out_features, in_features], or ``matmul``.
        cache: of models that generate: ``keep`` has past tokens' states as inputs and outputs, ``none`` reads the whole
            text for every token.
        dtype: of the stored weights; the checkpoint's own where None.
        compute: of the arithmetic, inputs and outputs. Weights stored otherwise are cast when a session is made.
    """

    weights: Mode = "link"
    opset: int = 23
    linear: Linear = "gemm"
    cache: Cache = "keep"
    dtype: Dtype | None = None
    compute: Dtype = "float32"

    def __post_init__(self) -> None:
        if self.opset not in OPSETS:
            raise SpecError(
                f"onnx:opset={self.opset}",
                found=f"only opsets {OPSETS[0]} to {OPSETS[-1]} can be written",
                do="Take 23, or 20 for onnxruntime before 1.23 and older TensorRT",
            )
        if self.weights == "link" and self.dtype is not None:
            raise SpecError(
                f"onnx:dtype={self.dtype}",
                found="weights=link points at the checkpoint's own bytes, which have its dtype",
                do="Add weights=external or weights=packed, or drop dtype",
            )
        if self.weights == "sparse" and self.linear != "gemm":
            raise SpecError(
                f"onnx:linear={self.linear}",
                found="weights=sparse writes products of its own, and the others as gemm",
                do="Drop linear",
            )
