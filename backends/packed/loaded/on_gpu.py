"""Bring a loaded packed model into the layouts of the GPUs that its layers lie on."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec

from torch import Tensor, nn

from sparsify.backends.packed.format import PackedSite
from sparsify.backends.packed.loaded.dense import dense_modules
from sparsify.backends.packed.loaded.experts import stacks
from sparsify.backends.packed.loaded.linear import PackedLinear
from sparsify.backends.packed.loaded.modules import owner_of
from sparsify.backends.packed.loaded.product import Product, lies_on_gpu
from sparsify.context import Progress, report
from sparsify.errors import BackendError
from sparsify.runtime.cpu.unpacking import unpacked
from sparsify.runtime.cuda.gpu import GPU, NO_EXPERTS
from sparsify.runtime.cuda.prepared import NO_COMPILER
from sparsify.runtime.words import Policy, check_policy


@dataclass(frozen=True)
class Prepared:
    """What became of one matrix of a model.

    Attributes:
        names: the parameters in it; several where one product serves siblings.
        shape: (rows, columns), rows of all siblings. nbytes, dense_bytes: what it takes on the GPU, and would take
            dense.
        plan: which kernel serves how many tokens (:mod:`sparsify.runtime.cuda.dispatch`); None where it has none.
        gains: dense time by the chosen kernel's, by token count; empty where nothing was measured.
        reason: why there is no plan.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    dense_bytes: int
    plan: str | None
    gains: Mapping[int, float] = field(default_factory=dict)
    reason: str | None = None


def prepare(
    model: nn.Module,
    policy: Policy = "decode",
    *,
    tune: bool = True,
    target: GPU | None = None,
) -> list[Prepared]:
    """Prepare every packed weight of ``model`` that lies on a GPU, in place; ``from_pretrained`` does it by itself.

    One matrix after the other: beside the model there is never more than one of them twice. What has no kernel there
    (bitmasks, experts, float32) and what is measured to be faster dense becomes dense, with one warning; 2:4 weights of
    few bits become those of full width before, with another, where no kernel takes their integers.

    Args:
        policy: ``decode`` keeps weights for few tokens, ``prefill`` for many, ``both`` twice.
        tune: measure every kernel once per shape (kept in ``~/.cache/sparsify``); else built-in defaults choose.
        target: a GPU to prepare for, in the place of the one that the layers lie on; a plain reference then runs them.

    Raises:
        SpecError: another policy. BackendError: the kernels do not compile here.
    """
    check_policy(policy)
    records: list[Prepared] = []
    dense: dict[str, str] = {}
    waiting = 0
    widen(model, policy, target)
    for product, names in _products(model):
        _check_together(product, names)
        if not _lies_there(product.members[0].weight, target):
            continue
        # One that was prepared in the same way already, as by `.to("cuda")`, is left as it is.
        if product.plan is None or (product.policy, product.tune, product.target) != (policy, tune, target):
            report(Progress("preparing for the GPU", what=names[0]))
            product.policy, product.tune, product.target = policy, tune, target
            product.prepare()
        records.append(_record(product, names))
        refused = product.refused
        if refused is not None and refused.code == NO_COMPILER:
            # Without NVRTC the Triton kernels run the portable layout.
            waiting += 1
        elif refused is not None:
            dense |= dict.fromkeys(names, refused.reason)
    for name, site, tensor in stacks(model):
        if _lies_there(tensor, target):
            records.append(_stack_record(name, site, tensor))
            dense[name] = NO_EXPERTS
    if dense:
        _make_dense(model, dense)
    if waiting:
        slower = "Triton kernels run them, more slowly" if find_spec("triton") else "every product unpacks its weight"
        text = f"sparsify: {waiting} weights wait for NVRTC (pip install nvidia-cuda-nvrtc); {slower}"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    return records


def widen(model: nn.Module, policy: Policy = "decode", target: GPU | None = None, *, everywhere: bool = False) -> None:
    """Make 2:4 layers of few bits that lie on a GPU (or ``everywhere``) such of full width, in place, with one warning,
    where no kernel of that GPU multiplies with their integers under ``policy``.

    The numbers stay the same. The model's config says so too: saved, it has the wider weights.
    """
    reasons: dict[str, str] = {}
    for name, module in model.named_modules():
        few = isinstance(module, PackedLinear) and module.site.bits is not None and module.site.layout == "packed24"
        if not isinstance(module, PackedLinear) or not few or not (everywhere or _lies_there(module.weight, target)):
            continue
        reason = (target or GPU.of(module.weight.device)).unfit_integers(module.weight.dtype, policy)
        if reason is None:
            continue
        module.widen()
        parameter = f"{name}.weight"
        reasons[parameter] = reason
        sites = getattr(getattr(getattr(model, "config", None), "quantization_config", None), "sites", {})
        if parameter in sites:
            sites[parameter] = module.site.as_dict()
    if reasons:
        why = "; ".join(dict.fromkeys(reasons.values()))
        text = f"sparsify: {why}: {len(reasons)} 2:4 weights take the width of their dtype there"
        warnings.warn(text, RuntimeWarning, stacklevel=3)


def prepared_products(model: nn.Module) -> list[Prepared]:
    """What :func:`prepare` made of the products that are still packed."""
    return [_record(product, names) for product, names in _products(model)]


def _products(model: nn.Module) -> Iterator[tuple[Product, tuple[str, ...]]]:
    """Every product once, with the names of its parameters."""
    layers = {id(m): n for n, m in model.named_modules() if isinstance(m, PackedLinear)}
    seen: set[int] = set()
    for module in list(model.modules()):
        if isinstance(module, PackedLinear) and id(module.product) not in seen:
            seen.add(id(module.product))
            yield module.product, tuple(f"{layers[id(m)]}.weight" for m in module.product.members)


def _check_together(product: Product, names: tuple[str, ...]) -> None:
    if len({member.weight.device for member in product.members}) > 1:
        raise BackendError(
            f"preparing {', '.join(names)}",
            found="layers that share one product on several devices",
            do="Give a device_map that keeps each block on one device",
        )


def _lies_there(weight: Tensor, target: GPU | None) -> bool:
    return target is not None or lies_on_gpu(weight)


def _record(product: Product, names: tuple[str, ...]) -> Prepared:
    leader = product.members[0]
    shape = (sum(product.sizes), leader.in_features)
    dense = shape[0] * shape[1] * leader.weight.element_size()
    tensors = (getattr(leader, name, None) for name in ("weight", "weight_compressed", "weight_codes"))
    held = dense if product.plan is None else sum(t.nbytes for t in tensors if t is not None)
    gains = {tokens: product.timings.gain(tokens) for tokens in product.timings.micro}
    dtype = str(leader.weight.dtype).removeprefix("torch.")
    reason = None if product.refused is None else product.refused.reason
    return Prepared(names, shape, dtype, held, dense, product.plan, gains, reason)


def _stack_record(name: str, site: PackedSite, tensor: Tensor) -> Prepared:
    size = site.shape.numel() * tensor.element_size()
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Prepared((name,), tuple(site.shape), dtype, size, size, None, {}, NO_EXPERTS)


def _make_dense(model: nn.Module, reasons: Mapping[str, str]) -> None:
    sites: dict[str, PackedSite] = {}
    for name in reasons:
        owner, leaf = owner_of(model, name)
        sites[name] = owner.site if isinstance(owner, PackedLinear) else owner.sites[leaf]
    dense_modules(model, sites, unpacked)
    _forget(model, reasons)
    kinds: dict[str, int] = {}
    for reason in reasons.values():
        kinds[reason] = kinds.get(reason, 0) + 1
    text = "; ".join(f"{count} × {reason}" for reason, count in kinds.items())
    warnings.warn(f"sparsify: weights made dense on the GPU: {text}", RuntimeWarning, stacklevel=3)


def _forget(model: nn.Module, names: Mapping[str, str]) -> None:
    """Let the model's config speak of the weights that are still packed, so that it is saved as it is."""
    quantization = getattr(getattr(model, "config", None), "quantization_config", None)
    if quantization is None or not isinstance(getattr(quantization, "sites", None), dict):
        return
    for name in names:
        quantization.sites.pop(name, None)
    left = [[n for n in group if n in quantization.sites] for group in quantization.siblings]
    quantization.siblings = [group for group in left if len(group) > 1]
    if not quantization.sites and (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(model)
