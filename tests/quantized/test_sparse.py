"""Checkpoints whose weights were stored without their zeros, which nothing else reads any more."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import quantized
from support.command_line import sparsify as command
from support.quantized import Tensors, change_config, dense_folder, pruned_24, store, tensors_of
from torch import Tensor

import sparsify
from sparsify.errors import CheckpointError, SpecError
from sparsify.frontend.source import open_source

FORMS = ("sparse-24-bitmask", "sparse-bitmask")
Q_PROJ = "model.layers.0.self_attn.q_proj"


def half(weight: Tensor, form: str) -> Tensor:
    weight = weight.float()
    return pruned_24(weight) if form == FORMS[0] else weight.masked_fill(weight.abs() < weight.abs().median(), 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("form", FORMS)
def test_every_weight_comes_back_to_the_bit_in_its_own_dtype(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    dense = tensors_of(dense_folder(tmp_path / "dense", dtype=dtype))
    source = open_source(quantized.sparse(tmp_path / "model", form, dtype))
    assert set(source.weights.parameters()) == set(dense)
    for name, tensor in dense.items():
        want = half(tensor, form).to(dtype) if quantized.is_linear(name, tensor) else tensor
        got = source.weights.read(name)
        assert got.dtype == dtype and torch.equal(got, want), name


@pytest.mark.parametrize("form", FORMS)
def test_it_becomes_an_ordinary_checkpoint_and_a_packed_one(form: str, tmp_path: Path) -> None:
    folder = quantized.sparse(tmp_path / "model", form)
    made = sparsify.compile(folder, [], output=tmp_path / "hf")
    assert made.manifest["quantized_source"]["method"] == form
    assert json.loads((tmp_path / "hf" / "config.json").read_text()).get("quantization_config") is None
    wrote = tensors_of(tmp_path / "hf")
    for name, tensor in tensors_of(dense_folder(tmp_path / "dense")).items():
        assert torch.equal(wrote[name], half(tensor, form).bfloat16() if quantized.is_linear(name, tensor) else tensor)
    done = command("compile", str(folder), "--to", "packed:choice=smallest", "-o", str(tmp_path / "packed"))
    assert not done.returncode and f"stored without its zeros ({form}" in done.stderr + done.stdout, done.stderr
    sites = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]["sites"]
    assert ("packed24" if form == FORMS[0] else "bitmask") in {site["layout"] for site in sites.values()}
    packed = open_source(tmp_path / "packed")
    for name in packed.weights.parameters():
        assert torch.equal(packed.weights.read(name), wrote[name])
    done = command("compile", str(folder), "-o", str(tmp_path / "again"))
    assert not done.returncode and tensors_of(tmp_path / "again").keys() == wrote.keys(), done.stderr
    for words in (["inspect", str(folder)], ["verify", str(tmp_path / "packed")]):
        assert not command(*words).returncode


@pytest.mark.parametrize("form", FORMS)
def test_values_of_few_bits_inside_it(form: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed (the extra quantized)")
    folder = quantized.sparse(tmp_path / "model", form, quantized=True)
    source = open_source(folder)
    dense = tensors_of(dense_folder(tmp_path / "dense"))
    for name, tensor in dense.items():
        if not quantized.is_linear(name, tensor):
            continue
        pruned = half(tensor, form)
        scale = pruned.abs().amax(1, keepdim=True) / 448
        want = (pruned / scale).to(torch.float8_e4m3fn).float() * scale.bfloat16().float()
        got = source.weights.read(name)
        torch.testing.assert_close(got.float(), want, rtol=2**-7, atol=0)
        assert torch.equal(got == 0, want == 0)
    assert source.quantization is not None and source.quantization["method"] == f"{form} of compressed-tensors"


def test_nothing_to_do_is_still_said(tmp_path: Path) -> None:
    folder = dense_folder(tmp_path / "model")
    for change in (None, {"quant_method": "compressed-tensors", "format": "dense"}):
        change_config(folder, quantization_config=change)
        with pytest.raises(SpecError, match="nothing to do"):
            sparsify.compile(folder, [], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_the_config_says_is_not_needed(tmp_path: Path) -> None:
    folder = quantized.sparse(tmp_path / "model", FORMS[0])
    change_config(folder, quantization_config=None)
    assert (open_source(folder).weights.read(f"{Q_PROJ}.weight") == 0).float().mean() >= 0.5


DAMAGED: dict[str, tuple[str, Callable[[Tensors], object], str]] = {
    "a bit more": (FORMS[1], lambda t: t[f"{Q_PROJ}.bitmask"][0].fill_(255), "places for"),
    "not 2:4": (
        FORMS[0],
        lambda t: t[f"{Q_PROJ}.bitmask"][0, :1].fill_(15),
        "two places of every four",
    ),
    "starts": (FORMS[1], lambda t: t[f"{Q_PROJ}.row_offsets"][3:4].add_(1), "does not count the places"),
    "no mask": (FORMS[0], lambda t: t.pop(f"{Q_PROJ}.bitmask"), "bitmask, which it is read with, is not there"),
    "no values": (FORMS[0], lambda t: t.pop(f"{Q_PROJ}.compressed"), "compressed, which it is read with, is not there"),
    "no sizes": (FORMS[1], lambda t: t.pop(f"{Q_PROJ}.shape"), "shape, which it is read with, is not there"),
    "other sizes": (FORMS[0], lambda t: t[f"{Q_PROJ}.shape"][0].add_(8), "bitmask is"),
    "negative": (FORMS[0], lambda t: t[f"{Q_PROJ}.shape"][0].fill_(-4), "says -4×"),
    "both": (FORMS[0], lambda t: t.update({f"{Q_PROJ}.weight": torch.ones(4, 4)}), "beside those without"),
    "whole numbers": (
        FORMS[0],
        lambda t: t.update({f"{Q_PROJ}.compressed": t[f"{Q_PROJ}.compressed"].to(torch.int8)}),
        "names no groups",
    ),
    "a mask of another kind": (
        FORMS[0],
        lambda t: t.update({f"{Q_PROJ}.bitmask": t[f"{Q_PROJ}.bitmask"].to(torch.int32)}),
        "int32",
    ),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damage_is_named(kind: str, tmp_path: Path) -> None:
    form, change, word = DAMAGED[kind]
    folder = quantized.sparse(tmp_path / "model", form)
    tensors = tensors_of(folder)
    change(tensors)
    store(folder, tensors)
    with pytest.raises(CheckpointError, match=word) as caught:
        sparsify.compile(folder, ["magnitude:2:4"], output=tmp_path / "out")
    assert Q_PROJ in str(caught.value) and not (tmp_path / "out").exists()
