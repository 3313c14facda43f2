"""Our models inside lm-eval itself: ``import sparsify.lm_eval``, then ``model="sparsify"``; or its command line.

lm-eval finds models in a table of its own and in no package's entry points, so that somebody has to add to it:

    python -m sparsify.lm_eval --model sparsify --model_args pretrained=OUT --tasks boolq

is lm-eval's own command line, with every option of its own, in which ``sparsify`` is one more kind of model.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from sparsify.errors import SparsifyError, SpecError
from sparsify.quality.tasks.names import require_lm_eval
from sparsify.words import plain

require_lm_eval()

from lm_eval.api.model import LM  # noqa: E402 (whoever has it not is told what to install)
from lm_eval.api.registry import model_registry  # noqa: E402

NAME = "sparsify"


class Sparsify(LM):  # type: ignore[misc, unused-ignore]
    """What lm-eval asks for by the name ``sparsify``; what it is given is a model of the kind that the folder needs."""

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Any:
        """As lm-eval calls it from its command line: ``pretrained=OUT,compute_dtype=bfloat16``.

        Raises:
            SparsifyError: as :func:`open_model`.
        """
        from lm_eval.utils import simple_parse_args_string

        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> Any:
        """As lm-eval calls it from Python.

        Raises:
            SparsifyError: as :func:`open_model`.
        """
        given = {name: value for name, value in (additional_config or {}).items() if value is not None}
        # How far an automatic batch may go: ours are as large as is said.
        given.pop("max_batch_size", None)
        if str(given.get("device", "")).startswith("cuda") and not torch.cuda.is_available():
            # Its command line asks for a GPU where nobody did, and its own models take the CPU then.
            del given["device"]
        return open_model(**(given | arg_dict))


def open_model(
    pretrained: Any,
    *,
    batch_size: int | str = 8,
    device: str | None = None,
    allow_bin: bool = False,
    trust_remote_code: bool = False,
    check: bool = True,
    allow_nan: bool = False,
    compute_dtype: str | None = None,
    adapter: str | None = None,
) -> Any:
    """The model of any folder that sparsify reads (ordinary, packed, ragged, quantized, ONNX) for lm-eval.

    Args:
        pretrained: the folder, a hub id or a GGUF file. batch_size: questions at a time; ``auto`` is 8.
        others: as for :func:`sparsify.evaluate`.

    Raises:
        CheckpointError, TraceError, BackendError: no such model, none that predicts text, or one that does not run.
        SpecError: a batch that is no number.
    """
    from sparsify.frontend.source import open_source
    from sparsify.host import resolve_device
    from sparsify.quality.graphs import open_graph
    from sparsify.quality.tasks.answering import BATCH, language_model

    asked = str(BATCH) if str(batch_size).startswith("auto") else str(batch_size)
    if not asked.isascii() or not asked.isdigit() or int(asked) < 1:
        raise SpecError(f"batch_size {batch_size}", found="no number of questions", do="Give 8, say, or auto")
    place = device or "auto"
    model = open_graph(pretrained, device=place, check=check) or open_source(
        pretrained,
        allow_bin=allow_bin,
        trust_remote_code=trust_remote_code,
        check=check,
        allow_nan=allow_nan,
        compute_dtype=compute_dtype,
        adapter=adapter,
    )
    return language_model(model, resolve_device(place), int(asked))


def main() -> None:
    """lm-eval's own command line, which knows our models; our errors are sentences here too."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except SparsifyError as error:
        print(f"error: {plain(str(error))}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


if NAME not in model_registry:
    model_registry.register(NAME, target=f"{__name__ if __name__ != '__main__' else 'sparsify.lm_eval'}:Sparsify")

if __name__ == "__main__":
    main()
