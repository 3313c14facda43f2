"""What may be asked of the backend ``onnx``. Imports nothing heavy: its words are refused before a model is opened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparsify.errors import SpecError
from sparsify.runtime.words import Activations, AskedGroup, AskedValues

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
        values: of ``sparse``: ``auto`` stores weights that a pass rounded as integers of 8 or 4 bits with scales,
            ``int8`` and ``int4`` round others to nearest first (the pass ``round`` loses less), ``full`` keeps their
            dtype.
        group: in_features that share a scale, or the whole ``row``, where values=int8 (row) or int4 (64) rounds.
        activations: of weights stored as integers: ``int8`` rounds the inputs of a product to 8 bits by token and
            group; ``float`` does not, and is slower.
    """

    weights: Mode = "link"
    opset: int = 23
    linear: Linear = "gemm"
    cache: Cache = "keep"
    dtype: Dtype | None = None
    compute: Dtype = "float32"
    values: AskedValues = "auto"
    group: AskedGroup | None = None
    activations: Activations = "int8"

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
        own = [name for name in ("values", "group", "activations") if getattr(self, name) != getattr(Options, name)]
        if self.weights != "sparse" and own:
            asked = ",".join(f"{name}={getattr(self, name)}" for name in own)
            raise SpecError(
                f"onnx:weights={self.weights},{asked}",
                found=f"options of the products that weights=sparse writes, and weights is {self.weights} here",
                do="Add weights=sparse, or drop them",
            )
        if self.values in ("int8", "int4") and self.dtype is not None:
            raise SpecError(
                f"onnx:values={self.values},dtype={self.dtype}",
                found="values that are rounded in the checkpoint's own dtype, and would be once more",
                do="Drop dtype",
            )
        if self.group is not None and self.values not in ("int8", "int4"):
            raise SpecError(
                f"onnx:values={self.values},group={self.group}",
                found="in_features that share a scale, and nothing is rounded",
                do="Add values=int8 or values=int4, or leave group out: a grid is found with its own",
            )
