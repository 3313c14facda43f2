"""The tuned model as a folder: LoRA merged under the mask, names and shards as they were; or the adapter alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sparsify.compiler.backend import Backend, settle
from sparsify.compiler.manifest import as_opened, whole_of
from sparsify.context import Context
from sparsify.errors import CalibrationError
from sparsify.files.ledger import write_manifest
from sparsify.files.staging import Staging
from sparsify.finite import infinities_allowed, said, scan
from sparsify.frontend.source import Source
from sparsify.ir.program import Program
from sparsify.provenance.card import write_card
from sparsify.provenance.carried import with_other_numbers
from sparsify.provenance.history import entry, origin_of
from sparsify.provenance.runs import earlier, of_tuning
from sparsify.quality.perplexity import of_losses, perplexity
from sparsify.tensors import digest
from sparsify.tuning.recipe import Recipe, Tuned


def merged(wrapped: Any, source: Source, masks: Mapping[str, Tensor], recipe: Recipe) -> dict[str, Tensor]:
    """Every parameter as it is now, in the dtype that it is stored in; LoRA's products added under the mask."""
    with torch.no_grad():
        if recipe.method == "lora":
            for module in wrapped.modules():
                if hasattr(module, "get_delta_weight"):
                    # In float32: bfloat16 would swallow small additions one by one.
                    module.get_base_layer().weight.data = (
                        module.get_base_layer().weight.data.float() + module.get_delta_weight("default").float()
                    )
            named = {
                n.replace("base_model.model.", "").replace(".base_layer", ""): p
                for n, p in wrapped.named_parameters()
                if "lora_" not in n
            }
        else:
            named = dict(wrapped.named_parameters())
        new = {source.weights.canonical(n): p.detach().cpu() for n, p in named.items()}
        made = {
            name: (new[name] * masks[name] if name in masks else new[name]).to(source.weights.dtype(name))
            for name in source.weights.parameters()
            if name in new
        }
    if not source.allow_nan:
        for name, tensor in made.items():
            if (found := scan(tensor, infinities_allowed(name))).count:
                raise CalibrationError(
                    f"tuning {name}",
                    found=f"{said(found, tensor.shape)} as {tensor.dtype}, which it is stored in",
                    do="Give a smaller --rate; float16 ends at 65504: convert the model to bfloat16",
                )
    return made


@dataclass(frozen=True)
class Output:
    """Who writes the tuned model, from what it was and its graph.

    Attributes:
        asked: when, and by which words; None where some are in memory alone.
    """

    source: Source
    program: Program
    backend: Backend
    overwrite: bool
    asked: tuple[str, Mapping[str, Any] | None]

    def write(self, new: Mapping[str, Tensor], result: Tuned, held_out: Tensor, context: Context) -> float:
        """The tuned model into a folder, names and shards as they were; its perplexity on the held-out text."""
        source, program = self.source, self.program
        with self.backend.open(source, result.output, overwrite=self.overwrite, program=program) as job:
            for name, tensor in new.items():
                if not torch.equal(tensor, source.weights.read(name)):
                    job.weights.write(name, tensor)
            settle(job, program)
            after = perplexity(replace(source, weights=job.weights), held_out, context)
            record = replace(result, perplexity=(result.perplexity[0], after)).as_dict()
            record.pop("output")
            program.weights = job.weights
            before = with_other_numbers(source.ledger.manifest)
            made = {"tuned": record, "history": _history(source, record, self.asked, whole_of(job.weights))}
            # A backend reads which passes there were, of a dense model none.
            job.finish(program, {"model": source.name, "passes": [], **before, **as_opened(source), **made})
        return after


def _history(
    source: Source,
    record: Mapping[str, Any],
    asked: tuple[str, Mapping[str, Any] | None],
    whole: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    date, words = asked
    run = entry("tune", date, origin_of(source), **of_tuning(record), recipe=words, whole=whole)
    return [*earlier(source.ledger.manifest), run]


def write_adapter(
    source: Source,
    wrapped: Any,
    result: Tuned,
    held_out: Tensor,
    overwrite: bool,
    asked: tuple[str, Mapping[str, Any] | None],
) -> Tuned:
    """LoRA's additions alone: the base stays as it is, zeros included; perplexity with the adapter on."""
    wrapped.eval()
    losses = []
    with torch.no_grad():
        for window in held_out.long():
            logits = wrapped(input_ids=window[None].to(wrapped.device)).logits[0, :-1].float()
            losses.append(float(nn.functional.cross_entropy(logits, window[1:].to(logits.device))))
    # Before anything is written.
    after = of_losses(torch.tensor(losses, dtype=torch.float64), source.name, source.dtype)
    with Staging(result.output, overwrite=overwrite, source=source.folder, need=64 << 20) as staging:
        wrapped.save_pretrained(staging.folder)
        tensors = load_file(staging.folder / "adapter_model.safetensors")
        digests = {name: digest(tensor) for name, tensor in tensors.items()}
        done = replace(result, perplexity=(result.perplexity[0], after))
        record = done.as_dict()
        record.pop("output")
        manifest: dict[str, Any] = {"model": source.name, "source_check": source.checked, "tuned": record}
        # peft's own card, which has blanks to fill in, goes.
        manifest |= {"history": _history(source, record, asked), "card": {"dense": None}}
        write_card(staging.folder, manifest)
        write_manifest(staging.folder, manifest, digests)
        staging.commit()
    return done
