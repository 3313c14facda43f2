"""Packed folders as their users meet them: written, loaded by transformers, run, saved again, unpacked."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import sparsify as command
from support.families import build, inputs, run
from support.folders import SMALLEST, load, same_files, write_both

import sparsify
from sparsify.backends.packed.loaded.linear import PackedLinear
from sparsify.backends.packed.loaded.modules import FastLinear
from sparsify.backends.packed.unpack import unpack_folder
from sparsify.errors import BackendError
from sparsify.files.checkpoint import Checkpoint
from sparsify.frontend.source import open_source
from sparsify.quality.perplexity import perplexity
from sparsify.runtime.cpu.stopwatch import Stopwatch, Timing


def packed_parameters(model: Any) -> set[str]:
    return set(model.config.quantization_config.sites)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_both("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.first(3)
@pytest.mark.parametrize("spec", ["magnitude:2:4", "magnitude:60%"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_a_packed_model_is_the_pruned_model(family: str, spec: str, tmp_path: Path) -> None:
    hf, folder = write_both(family, tmp_path, spec)
    dense, packed = load(hf), load(folder)
    batch = inputs(family)
    torch.testing.assert_close(run(packed, batch), run(dense, batch), rtol=1e-4, atol=1e-5)
    # Rows of 32 inputs, padded to 64, would be no smaller as packed24.
    sites = packed.config.quantization_config.sites.values()
    layouts = {(entry["layout"], entry["columns"] >= 64) for entry in sites}
    assert layouts <= {("packed24" if spec.endswith("2:4") else "bitmask", True), ("bitmask", False)}
    kinds = {name.rpartition(".")[2] for name in packed_parameters(packed)}
    assert kinds == ({"weight", "gate_up_proj", "down_proj"} if family in ("mixtral", "gpt_oss") else {"weight"})
    unpack_folder(folder, tmp_path / "back")
    assert same_files(hf, tmp_path / "back"), "back, bit for bit, under the checkpoint's own names"
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())


@pytest.mark.slow
def test_generation_caches_batches_and_compile(llama: tuple[Path, Path]) -> None:
    dense, packed = (load(folder) for folder in llama)
    ids = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
    want = dense.generate(ids, **options)
    assert torch.equal(packed.generate(ids, **options), want)
    assert torch.equal(packed.generate(ids, **options, cache_implementation="static"), want)
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        got = compiled(ids, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(got, dense(ids, attention_mask=mask).logits, rtol=1e-4, atol=1e-5)


def test_saved_again_it_is_the_same(llama: tuple[Path, Path], tmp_path: Path) -> None:
    packed = load(llama[1])
    packed.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert torch.equal(run(again, inputs("llama")), run(packed, inputs("llama")))
    assert packed_parameters(again) == packed_parameters(packed)
    # It no longer says what the checkpoint's names and shards were; the model's own names serve.
    unpack_folder(tmp_path / "again", tmp_path / "back")
    torch.testing.assert_close(run(load(tmp_path / "back"), inputs("llama")), run(load(llama[0]), inputs("llama")))


def test_dtype_device_map_and_dequantize(llama: tuple[Path, Path]) -> None:
    half = load(llama[1], dtype=torch.bfloat16)
    assert half.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    want = run(load(llama[0], dtype=torch.bfloat16), inputs("llama"))
    torch.testing.assert_close(run(half, inputs("llama")), want, rtol=0.05, atol=0.05)
    pytest.importorskip("accelerate")
    for device_map in ("cpu", "auto"):
        mapped = load(llama[1], device_map=device_map)
        assert isinstance(mapped.model.layers[0].mlp.up_proj, PackedLinear)
        torch.testing.assert_close(run(mapped, inputs("llama")), run(load(llama[0]), inputs("llama")))
    with pytest.raises(BackendError, match="disk"):
        load(llama[1], device_map={"model": "cpu", "lm_head": "disk"})
    dense = load(llama[1]).dequantize()
    assert not any(isinstance(m, (PackedLinear, FastLinear)) for m in dense.modules())
    assert torch.equal(run(dense, inputs("llama")), run(load(llama[0]), inputs("llama")))
    with pytest.raises(BackendError, match=r"float64: no kernel .* dequantize\(\) before"):
        load(llama[1]).double()
    wide = dense.double()
    assert wide.dtype == torch.float64 and run(wide, inputs("llama")).isfinite().all()


def test_shards_and_carried_tensors(tmp_path: Path) -> None:
    hf, folder = write_both("mixtral", tmp_path, max_shard_size="40KB")
    assert len(Checkpoint(hf).files) > 1
    unpack_folder(folder, tmp_path / "back")
    assert same_files(hf, tmp_path / "back")


def test_the_folder_is_read_by_every_command(llama: tuple[Path, Path], tmp_path: Path) -> None:
    ids = torch.randint(3, 60, (4, 16), generator=torch.Generator().manual_seed(0))
    assert perplexity(open_source(llama[1]), ids) == pytest.approx(perplexity(open_source(llama[0]), ids))
    # Pruned further, it is an ordinary folder again.
    sparsify.compile(llama[1], ["magnitude:1:4"], output=tmp_path / "more")
    assert "quantization_config" not in json.loads((tmp_path / "more" / "config.json").read_text())
    weight = load(tmp_path / "more").model.layers[0].mlp.up_proj.weight
    assert int((weight != 0).sum()) * 4 == weight.numel()
    said = command("verify", llama[1], "--weights-only").stdout
    assert "sound" in said and "packed24" in said and "sparsify bench" in said


def test_verify_finds_one_changed_byte(llama: tuple[Path, Path], tmp_path: Path) -> None:
    import shutil

    shutil.copytree(llama[1], tmp_path / "bad")
    path, start, _ = Checkpoint(tmp_path / "bad").span("model.layers.0.mlp.up_proj.weight")
    content = bytearray(path.read_bytes())
    content[start + 5] ^= 1
    path.write_bytes(content)
    done = command("verify", tmp_path / "bad", "--weights-only")
    assert done.returncode == 1 and "up_proj" in done.stdout


@pytest.mark.slow
def test_without_the_import_it_does_not_load_in_silence(llama: tuple[Path, Path]) -> None:
    load_it = f"M.from_pretrained({str(llama[1])!r})"
    late = f"""
from transformers import LlamaForCausalLM as M
try:
    {load_it}
except RuntimeError as error:
    print("refused", error)
import sparsify
{load_it}
print("loaded")
"""
    done = subprocess.run([sys.executable, "-c", late], capture_output=True, text=True)
    assert "got sparsify" in done.stderr and done.stdout.startswith("refused") and not done.returncode, done.stderr
    assert "loaded" in done.stdout, "transformers first, then sparsify"
    assert "import sparsify" in json.loads((llama[1] / "config.json").read_text())["quantization_config"]["note"]
    early = f"import sparsify\nfrom transformers import LlamaForCausalLM as M\n{load_it}"
    done = subprocess.run([sys.executable, "-c", early], capture_output=True, text=True)
    assert not done.returncode, done.stderr


def test_importing_sparsify_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, sparsify; print({'torch', 'transformers'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_a_weight_that_packing_would_slow_down_stays_dense(
    folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Wide layers gain, square ones do not.
    def race(self: Stopwatch, calls: list[Any]) -> list[float]:
        rows = calls[0]().shape[-1]
        return [1.0, 2.0, 0.5 if rows == 64 else 1.3][: len(calls)]

    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Stopwatch, "race", race)
    result = sparsify.compile(folder("llama"), ["magnitude:2:4"], output=tmp_path / "out", to="packed")
    model = load(tmp_path / "out")
    assert {n.rpartition(".mlp.")[2] for n in packed_parameters(model)} == {"gate_proj.weight", "up_proj.weight"}
    assert any("dense is faster here (packed24 takes 1.30× its time)" in note for note in result.notes)
    site = json.loads((tmp_path / "out" / "sparsify.json").read_text())["packed"]["sites"][0]
    assert site["layout"] == "dense" and site["timing"]["packed_us"] == 1.3e6 and site["reason"]
    monkeypatch.setattr(Stopwatch, "race", lambda self, calls: [1.0, 2.0, 3.0][: len(calls)])
    # No timing discards what was pruned.
    none = sparsify.compile(folder("llama"), ["magnitude:2:4"], output=tmp_path / "none", to="packed")
    assert "choice=smallest" in none.notes[0] and not hasattr(load(tmp_path / "none").config, "quantization_config")


def test_dense_layers_get_our_kernel_where_it_is_faster(
    llama: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "one"))
    monkeypatch.setattr(Stopwatch, "race", lambda self, calls: [2.0, 1.0, 3.0][: len(calls)])
    fast = load(llama[1])
    assert isinstance(fast.lm_head, FastLinear)
    monkeypatch.setattr(Stopwatch, "race", lambda self, calls: [1.0, 2.0, 3.0][: len(calls)])
    # A machine that has measured a shape neither measures nor chooses again; what is no answer is measured again.
    assert isinstance(load(llama[1]).lm_head, FastLinear)
    kept = tmp_path / "one" / "dense.json"
    kept.write_text(kept.read_text().replace("true", '"yes"'))
    assert not isinstance(load(llama[1]).lm_head, FastLinear)
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "other"))
    slow = load(llama[1])
    assert not isinstance(slow.lm_head, FastLinear)
    ids = torch.tensor([[5]])
    torch.testing.assert_close(fast(ids).logits, slow(ids).logits)


def test_layouts_that_are_asked_for(folder: Callable[[str], Path], tmp_path: Path) -> None:
    result = sparsify.compile(
        folder("llama"), ["magnitude:2:4"], output=tmp_path / "out", to="packed:layout=bitmask,choice=smallest"
    )
    assert "packed: 14 as bitmask" in result.notes[0]
    none = sparsify.compile(
        folder("llama"), ["magnitude:60%"], output=tmp_path / "none", to="packed:layout=packed24,choice=smallest"
    )
    assert "not 2:4 along its inputs" in none.notes[0]
    # Nothing but zeros made earlier is needed.
    with pytest.raises(BackendError, match=r"no zeros.*Prune it first"):
        sparsify.compile(folder("llama"), output=tmp_path / "no", to="packed")


def test_what_is_no_transformers_model(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(64, 64))
    with pytest.raises(BackendError, match="LowerSparse"):
        sparsify.compile(net, ["magnitude:2:4"], calibration=[torch.randn(2, 64)], output=tmp_path / "out", to="packed")


def test_a_module_in_memory_is_packed_too(tmp_path: Path) -> None:
    model = build("llama")
    ids = torch.randint(3, 60, (2, 16))
    result = sparsify.compile(model, ["magnitude:2:4"], calibration=[ids], output=tmp_path / "out", to=SMALLEST)
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "out")(ids).logits, result.model(ids).logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(
        result.weight("model.layers.0.mlp.up_proj.weight"), result.model.model.layers[0].mlp.up_proj.weight
    )


@pytest.mark.slow
def test_from_the_command_line(bundled: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    drawn = ("--calibration", "python-stdlib", "--samples", 4, "--sequence-length", 64)
    done = command("compile", bundled, "--pass", "wanda:2:4", *drawn, "--to", "packed:choice=smallest", "-o", out)
    assert done.returncode == 0 and "42 as packed24" in done.stdout and "import sparsify" in done.stdout, done.stderr
    assert command("unpack", out, "-o", tmp_path / "dense").returncode == 0
    assert command("unpack", out, "-o", tmp_path / "dense").returncode == 1
    no = command("unpack", tmp_path / "dense", "-o", tmp_path / "x")
    assert no.returncode == 1 and "no packed folder" in no.stderr and not (tmp_path / "x").exists()
    table = command("bench", out, "--prompt", 8, "--tokens", 4, "--rounds", 1).stdout
    assert "decode of 4" in table and "mlp.down_proj ×6" in table and "packed24" in table
    assert "Give --against MODEL" in command("bench", bundled).stderr
    long = command("bench", out, "--prompt", 100000)
    assert long.returncode == 2 and "context" in long.stderr


@pytest.mark.slow
def test_bench_against_the_dense_folder(llama: tuple[Path, Path], tmp_path: Path) -> None:
    few = ("--prompt", 8, "--tokens", 4, "--rounds", 1)
    said = command("bench", llama[1], "--against", llama[0], *few, "--json", "-o", tmp_path)
    assert said.returncode == 0, said.stderr
    result = json.loads(said.stdout)
    assert result["decode"]["out"] > 0 and result["file_bytes"][1] < result["file_bytes"][0]
    assert result["loading"][0]["peak"] > 0
    assert {s["layout"] for s in result["sites"]} == {"packed24", "bitmask", "dense"}
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "bench.json").read_text())["prompt"] == 8


def test_prune_it_first_is_said_to_nobody_who_did(
    folder: Callable[[str], Path], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(Timing, "pays", property(lambda self: False))
    (note,) = sparsify.compile(folder("llama"), ["magnitude:2:4"], output=tmp_path / "no", to="packed").notes
    assert "dense is faster here" in note and "choice=smallest" in note and "rune it" not in note
