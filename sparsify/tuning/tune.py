"""Recover a pruned model by training it: LoRA or all weights, zeros held. ``sparsify tune``.

The mask is what is zero in the weights when it begins, and stays so: all weights have it applied after every step,
LoRA is merged under it. Whether it held is verified before anything is written.

LoRA's defaults are LLM-Pruner's (algorithms.md, section 9.5): rank 8, alpha 16, dropout 0.05 on every linear layer of
the blocks, AdamW, 3e-4 with a warm-up of 100 steps and a linear decay, 64 sequences a step in micro-batches.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sparsify.analysis.linear import find_sites
from sparsify.compiler.backend import Backend, as_backend
from sparsify.context import Context
from sparsify.data.batches import evaluation_windows, example_batch, load_calibration
from sparsify.data.chat import Chat
from sparsify.data.inputs import default_length
from sparsify.data.sources import same_source
from sparsify.errors import CalibrationError, SpecError, VerifyError
from sparsify.evaluation.perplexity import of_losses, perplexity
from sparsify.files.ledger import write_manifest
from sparsify.files.staging import Staging, check_output
from sparsify.finite import infinities_allowed, said, scan
from sparsify.frontend.capture import capture
from sparsify.frontend.materialize import materialize
from sparsify.frontend.source import Source, open_source
from sparsify.host import cpu_by_default, quiet, within_memory
from sparsify.ir.program import Program
from sparsify.refine.trainable import LEAST_ZEROS
from sparsify.tensors import digest
from sparsify.tuning.recipe import Recipe
from sparsify.tuning.state import TuneState


@dataclass
class Tuned:
    """What came of it. ``data``: what was trained on. ``perplexity``: on held-out text, before and after (merged);
    ``losses``: of every step."""

    recipe: Recipe
    output: Path
    steps: int
    tokens: int
    seconds: float
    perplexity: tuple[float, float]
    validation: str
    masked: int
    data: str
    losses: list[float] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"output": str(self.output)}


@cpu_by_default()
def tune(
    model: str | Path,
    data: str,
    output: str | Path,
    recipe: Recipe | None = None,
    *,
    to: str | Backend = "hf",
    adapter: bool = False,
    resume: bool = False,
    save_every: int = 100,
    device: torch.device | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    check: bool = True,
    allow_nan: bool = False,
    chat_template: str | Path | None = None,
    validation: str | None = None,
    observe: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> Tuned:
    """Train the causal language model of the folder ``model`` on ``data`` and write it to ``output``.

    Args:
        data: a source's name, as for calibration.
        validation: another source's name; None: of sources in parts the held-out one, of others the last tenth, which
            is not trained on then.
        chat_template: the file of a Jinja template for chat messages, in place of the tokenizer's own.
        to: the backend that writes the result, as for :func:`sparsify.compile`.
        adapter: write LoRA's additions alone, as a folder of ``peft``, and not the merged model.
        resume: go on from ``OUTPUT.tuning``, where the state is kept every ``save_every`` steps until it is done.
        check: hold the bytes of a folder of ours against its ``sparsify.json``. allow_nan: let NaN in tensors pass.
        observe: told (step, steps, loss).

    Raises:
        SpecError: a recipe that cannot be meant.
        CalibrationError: data too short, too little memory, or a loss or perplexity that is no number.
        VerifyError: a mask that broke.
        CheckpointError, TraceError: no causal language model there.
    """
    recipe, out, place = recipe or Recipe(), Path(output), device or torch.device("cpu")
    if adapter and recipe.method != "lora":
        raise SpecError("an adapter of full tuning", found="only LoRA makes one", do="Take --method lora")
    backend = as_backend(to)
    if adapter and backend.name != "hf":
        raise SpecError(f"an adapter --to {backend.name}", found="a folder of peft's own form", do="Leave --to out")
    with ExitStack() as stack:
        if (claim := check_output(out, overwrite=overwrite, source=Path(model))) is not None:
            stack.enter_context(claim)
        source = open_source(model, trust_remote_code=trust_remote_code, check=check, allow_nan=allow_nan)
        length = recipe.length or default_length(source, 256)
        chat, judged = Chat(source, chat_template), validation or data
        both = same_source(data, judged)
        held_out, told = evaluation_windows(judged, source, length, 32, chat, both=both)
        drawn = load_calibration(
            data, source, samples=recipe.samples, sequence_length=length, seed=recipe.seed, chat=chat, both=both
        )
        chat.check_used(f"'{data}'")
        ids = torch.cat([batch["input_ids"] for batch in drawn.batches])
        if len(ids) < recipe.batch:
            raise CalibrationError(
                f"tuning on {drawn.size}",
                found=f"fewer than one step of {recipe.batch} sequences",
                do="Give more --samples, or a smaller --batch",
            )
        context = Context(place)
        before = perplexity(source, held_out, context)
        program = capture(source, example_batch(source))
        masks = masks_of(program)
        less = "Take fewer sequences at once (--micro), shorter ones (--sequence-length) or --device cpu"
        with within_memory(f"tuning {source.name}", place, less):
            network, wrapped = _network(source, recipe, place)
            state = stack.enter_context(TuneState.of(out, recipe, wrapped, resume=resume, source=source.folder))
            started = time.perf_counter()
            steps = recipe.steps or max(1, recipe.epochs * len(ids) // recipe.batch)
            _train(wrapped, network, ids, recipe, steps, masks, state, save_every, place, observe)
            seconds = time.perf_counter() - started
        known = Tuned(
            recipe,
            out,
            state.step,
            state.step * recipe.batch * length,
            seconds,
            (before, math.nan),
            told,
            len(masks),
            drawn.label,
            state.losses,
        )
        with within_memory(f"what tuning {source.name} gave", place, less):
            if claim is not None:
                claim.release()
            if adapter:
                tuned = _write_adapter(source, wrapped, known, held_out, overwrite)
                state.forget()
                return tuned
            new = _merged(wrapped, source, masks, recipe)
        check_masks(new, masks)
        after = _Output(source, program, backend, overwrite).write(new, known, held_out, context)
        state.forget()
        return replace(known, perplexity=(before, after))


def masks_of(program: Program) -> dict[str, Tensor]:
    """Parameter -> True where a linear weight is kept; of those that were pruned."""
    masks = {}
    for name in dict.fromkeys(site.parameter for site in find_sites(program)[0]):
        kept = program.weights.read(name) != 0
        if float((~kept).float().mean()) >= LEAST_ZEROS:
            masks[name] = kept
    return masks


def check_masks(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Raises:
    VerifyError: a weight that is not zero where it was pruned.
    """
    for name, kept in masks.items():
        broken = int(((weights[name] != 0) & ~kept.to(weights[name].device)).sum())
        if broken:
            raise VerifyError(
                f"tuning {name}",
                found=f"{broken} pruned weights are not zero any more",
                do="Report this as a bug; nothing was written",
            )


def _network(source: Source, recipe: Recipe, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """The model in memory, and what is trained: itself in float32, or it with LoRA around its linear layers."""
    torch.manual_seed(recipe.seed)
    names = set(source.weights.parameters())
    network: Any = materialize(source, source.weights, names).to(device)
    network.config.use_cache = False
    if recipe.method == "full":
        return network, network.float().requires_grad_(True).train()
    try:
        import peft
    except ImportError as error:
        raise SpecError(
            "--method lora", found="the package peft is not installed", do="pip install 'sparsify-fx[tune]'"
        ) from error
    widest = max((min(p.shape[-2:]) for p in network.parameters() if p.dim() > 1), default=1)
    if recipe.rank > widest:
        raise SpecError(
            f"rank {recipe.rank}",
            found=f"no matrix of {source.name} has a rank above {widest}",
            do="Give --rank 8, say",
        )
    config = peft.LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules="all-linear",
        bias="none",
        task_type="CAUSAL_LM",
    )
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(network.requires_grad_(False), config)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return network, wrapped.train()


def _train(
    wrapped: nn.Module,
    network: nn.Module,
    ids: Tensor,
    recipe: Recipe,
    steps: int,
    masks: Mapping[str, Tensor],
    state: TuneState,
    save_every: int,
    device: torch.device,
    observe: Callable[[int, int, float], None],
) -> None:
    """A plain loop; ``accelerate`` brings model and optimizer to the device, or devices."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=device.type == "cpu")
    optimizer = torch.optim.AdamW(state.trained.values(), lr=recipe.highest_rate, weight_decay=0.0)
    state.restore(optimizer)
    # One process has its model and moments where it was told to; accelerate would take its own first device.
    several = accelerator.num_processes > 1
    prepared, optimizer = accelerator.prepare(wrapped, optimizer, device_placement=[several, several])
    held = dict(network.named_parameters())
    kept = {name: mask.to(held[name].device) for name, mask in masks.items() if recipe.method == "full"}
    deadline = time.monotonic() + 60 * recipe.minutes if recipe.minutes is not None else math.inf
    for number, chosen in enumerate(_orders(len(ids), recipe, steps)):
        if number < state.step:
            continue
        if time.monotonic() > deadline:
            break
        for group in optimizer.param_groups:
            group["lr"] = recipe.highest_rate * _share(number, steps, recipe.warmup)
        losses: list[tuple[Tensor, int]] = []
        for micro in chosen.split(recipe.micro):
            batch = ids[micro].to(device)
            logits = prepared(input_ids=batch).logits[:, :-1].float()
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            accelerator.backward(loss * len(micro) / recipe.batch)
            losses.append((loss.detach(), len(micro)))
        # Once a step: a GPU that is asked after every part stands still meanwhile.
        total = sum((float(loss) * count / recipe.batch for loss, count in losses), start=0.0)
        if not math.isfinite(total):
            raise CalibrationError(f"tuning, step {number + 1}", found=f"a loss of {total}", do="Give a smaller --rate")
        if not math.isfinite(float(accelerator.clip_grad_norm_(state.trained.values(), 1.0))):
            raise CalibrationError(
                f"tuning, step {number + 1}", found="gradients that are NaN or infinite", do="Give a smaller --rate"
            )
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, mask in kept.items():
                held[name].mul_(mask)
        state.step, state.losses = number + 1, [*state.losses, total]
        observe(number + 1, steps, total)
        if state.step % save_every == 0:
            state.save(optimizer)


def _orders(count: int, recipe: Recipe, steps: int) -> Iterator[Tensor]:
    """The sequences of each step: every epoch in an order of its own, the same ones at every run."""
    generator = torch.Generator().manual_seed(recipe.seed)
    waiting = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(waiting) < recipe.batch:
            waiting = torch.cat([waiting, torch.randperm(count, generator=generator)])
        yield waiting[: recipe.batch]
        waiting = waiting[recipe.batch :]


def _share(step: int, steps: int, warmup: int) -> float:
    """Of the highest rate: up over the warm-up (a tenth of a short run), then down to nothing."""
    rising = max(1, min(warmup, steps // 10))
    return min((step + 1) / rising, (steps - step) / max(1, steps - rising))


def _merged(wrapped: Any, source: Source, masks: Mapping[str, Tensor], recipe: Recipe) -> dict[str, Tensor]:
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
class _Output:
    """Who writes the tuned model, from what it was and its graph."""

    source: Source
    program: Program
    backend: Backend
    overwrite: bool

    def write(self, new: Mapping[str, Tensor], result: Tuned, held_out: Tensor, context: Context) -> float:
        """The tuned model into a folder, names and shards as they were; its perplexity on the held-out text."""
        source, program = self.source, self.program
        with self.backend.open(source, result.output, overwrite=self.overwrite, program=program) as job:
            for name, tensor in new.items():
                if not torch.equal(tensor, source.weights.read(name)):
                    job.weights.write(name, tensor)
            after = perplexity(replace(source, weights=job.weights), held_out, context)
            record = replace(result, perplexity=(result.perplexity[0], after)).as_dict()
            record.pop("output")
            program.weights = job.weights
            kept = {**source.ledger.manifest, **({"allow_nan": True} if source.allow_nan else {})}
            job.finish(program, {**kept, "source_check": source.checked, "tuned": record})
        return after


def _write_adapter(source: Source, wrapped: Any, result: Tuned, held_out: Tensor, overwrite: bool) -> Tuned:
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
        write_manifest(staging.folder, {"model": source.name, "source_check": source.checked}, digests)
        staging.commit()
    return replace(result, perplexity=(result.perplexity[0], after))
