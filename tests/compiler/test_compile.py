"""The main job from end to end: what is written, what is left alone, what can be called from Python."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from support.families import FAMILIES, build, inputs, run, save
from torch import Tensor, nn

import sparsify
from sparsify.errors import BackendError, CheckpointError, SpecError, TraceError
from sparsify.files.checkpoint import Checkpoint
from sparsify.tensors import digest


def tensors(folder: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.names()}


def follows(weight: Tensor, n: int, m: int) -> bool:
    return bool(((weight != 0).view(-1, m).sum(1) <= n).all())


@pytest.mark.first(4)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_written_and_loads_again(family: str, folder: Callable[[str], Path], tmp_path: Path) -> None:
    source = folder(family)
    batches = [inputs(family, seed=s) for s in (1, 2)]
    result = sparsify.compile(source, ["wanda:50%"], calibration=batches, output=tmp_path / "out")
    before, after = tensors(source), tensors(tmp_path / "out")
    pruned = {name for site in result.runs[0].sites for name in site.sources}
    assert before.keys() == after.keys() and pruned < before.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype
        if name in pruned:
            kept = after[name] != 0
            assert torch.equal(after[name][kept], before[name][kept]) and 0.4 < float(kept.float().mean()) < 0.6
        else:
            assert torch.equal(before[name], after[name]), name
    loaded = type(build(family)).from_pretrained(tmp_path / "out").eval()
    memory = sparsify.compile(build(family), ["wanda:50%"], calibration=batches).model
    torch.testing.assert_close(run(loaded, batches[0]), run(memory, batches[0]), rtol=0, atol=1e-6)


def test_the_folder_is_an_ordinary_one(bundled: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ids = torch.randint(4096, (2, 16))
    result = sparsify.compile(bundled, ["wanda:2:4"], calibration=[ids], output=out)
    assert result.output == out
    expected = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert expected | {"sparsify.json"} <= {p.name for p in out.iterdir()}
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (bundled / name).read_bytes()
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    with safe_open(out / "model.safetensors", "pt") as a, safe_open(bundled / "model.safetensors", "pt") as b:
        assert a.keys() == b.keys() and a.metadata() == b.metadata()
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert follows(model.model.layers[3].mlp.down_proj.weight, 2, 4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    text = tokenizer("import os", return_tensors="pt")
    assert model.generate(**text, max_new_tokens=4).shape[1] == text["input_ids"].shape[1] + 4


def test_shards_stay_as_they_are(tmp_path: Path, ids: Tensor) -> None:
    source = save("llama", tmp_path / "source", max_shard_size="20kB")
    assert len(list(source.glob("*.safetensors"))) > 2
    sparsify.compile(source, ["wanda:2:4"], calibration=[ids], output=tmp_path / "out")
    for path in source.iterdir():
        copy = tmp_path / "out" / path.name
        assert copy.stat().st_size == path.stat().st_size
    index = "model.safetensors.index.json"
    assert (tmp_path / "out" / index).read_bytes() == (source / index).read_bytes()


def test_two_runs_write_the_same_bytes(folder: Callable[[str], Path], tmp_path: Path, ids: Tensor) -> None:
    for out in ("a", "b"):
        sparsify.compile(folder("llama"), ["wanda:2:4"], calibration=[ids], output=tmp_path / out)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_the_manifest_says_what_was_done(folder: Callable[[str], Path], tmp_path: Path, ids: Tensor) -> None:
    result = sparsify.compile(
        folder("mixtral"),
        ["wanda:2:4"],
        calibration=[ids],
        output=tmp_path / "out",
        schedule="block",
        seed=7,
        ignore=["*o_proj"],
    )
    manifest = json.loads((tmp_path / "out" / "sparsify.json").read_text())
    digests = manifest.pop("digests")
    assert manifest == json.loads(json.dumps(result.manifest))
    written = Checkpoint(tmp_path / "out")
    assert digests["tensors"] == {name: digest(written.read(name)) for name in written.names()}
    assert digests["headers"].keys() == {"model.safetensors"} and "config.json" in digests["files"]
    assert manifest["format"] == 2 and manifest["source_check"] == "none"
    (one,) = manifest["passes"]
    assert (one["spec"], one["schedule"], one["ignore"]) == ("wanda:2:4", "block", ["*o_proj"])
    assert one["options"]["pattern"] == "2:4" and manifest["calibration"]["seed"] == 7
    assert manifest["calibration"]["sequences"] == 4 and len(manifest["calibration"]["sha256"]) == 64
    names = {s["name"] for s in one["sites"]}
    assert "model.layers.0.mlp.experts.down_proj" in names
    assert {"name": "model.layers.0.self_attn.o_proj", "reason": "named by --ignore"} in one["skipped"]
    assert all(s["kept"] == 0.5 and 0 < s["error"] < 1 and s["shape"] for s in one["sites"])
    assert manifest["versions"]["torch"] == torch.__version__
    assert str(tmp_path) not in json.dumps(manifest)


def test_passes_run_in_order_each_on_the_last(ids: Tensor) -> None:
    model = build("llama")
    both = sparsify.compile(model, ["wanda:25%", "magnitude:2:4"], calibration=[ids])
    first = sparsify.compile(model, ["wanda:25%"], calibration=[ids])
    then = sparsify.compile(first.model, ["magnitude:2:4"])
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(both.weight(name), then.weight(name))
    assert follows(both.weight(name), 2, 4)


def test_a_module_is_left_as_it_is_and_shares_what_was_not_pruned(ids: Tensor) -> None:
    model = build("llama")
    before = {n: p.clone() for n, p in model.named_parameters()}
    pruned = sparsify.compile(model, ["wanda:2:4"], calibration=[ids]).model
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert pruned is not model and type(pruned) is type(model)
    assert follows(pruned.model.layers[0].mlp.up_proj.weight, 2, 4)
    assert pruned.model.embed_tokens.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_a_module_with_an_output_writes_the_same_as_its_folder(tmp_path: Path, ids: Tensor) -> None:
    source = save("opt", tmp_path / "source")
    sparsify.compile(source, ["wanda:2:4"], calibration=[ids], output=tmp_path / "a")
    model = build("opt")
    sparsify.compile(model, ["wanda:2:4"], calibration=[ids], output=tmp_path / "b")
    one, other = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert all(torch.equal(one[name], other[name]) for name in one) and one.keys() == other.keys()


def test_a_plain_module_is_written_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    result = sparsify.compile(net, ["wanda:2:4"], calibration=[torch.randn(16, 8)], output=tmp_path / "out")
    written = tensors(tmp_path / "out")
    assert torch.equal(result.weight("0.weight"), written["0.weight"])
    assert written.keys() == net.state_dict().keys() and follows(written["0.weight"], 2, 4)
    fresh = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    fresh.load_state_dict(written)


def test_half_precision_keeps_its_dtype(tmp_path: Path, ids: Tensor) -> None:
    build("llama").bfloat16().save_pretrained(tmp_path / "source")
    sparsify.compile(tmp_path / "source", ["wanda:50%"], calibration=[ids], output=tmp_path / "out")
    assert {t.dtype for t in tensors(tmp_path / "out").values()} == {torch.bfloat16}


def test_a_config_without_a_dtype_means_that_of_the_file(tmp_path: Path, ids: Tensor) -> None:
    build("llama").half().save_pretrained(tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    result = sparsify.compile(tmp_path / "source", ["wanda:2:4"], calibration=[ids], output=tmp_path / "out")
    assert result.model.dtype == torch.float16


def test_weights_stored_wider_than_the_config_says_stay_exact(tmp_path: Path, ids: Tensor) -> None:
    """config.json says bfloat16, the file holds float32: what is kept is kept to the last bit of the file."""
    source = save("llama", tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | {"dtype": "bfloat16"}
    (source / "config.json").write_text(json.dumps(config))
    sparsify.compile(source, ["wanda:2:4"], calibration=[ids], output=tmp_path / "out")
    before, after = tensors(source), tensors(tmp_path / "out")
    for name in before:
        kept = after[name] != 0
        assert after[name].dtype == torch.float32 and torch.equal(after[name][kept], before[name][kept])


def test_magnitude_needs_no_data_and_no_tokenizer(folder: Callable[[str], Path]) -> None:
    result = sparsify.compile(folder("gpt2"), ["magnitude:2:4"])
    assert result.calibration is None and all(s.error is None for s in result.runs[0].sites)
    weight = result.weight("transformer.h.0.attn.c_attn.weight")
    assert follows(weight.t().contiguous(), 2, 4), "Conv1D stores in × out: N:M runs along the inputs"
    assert not follows(weight.contiguous(), 2, 4)


def test_magnitude_with_data_measures_errors(ids: Tensor) -> None:
    result = sparsify.compile(build("llama"), ["magnitude:2:4"], calibration=[ids])
    assert all(s.error and s.error > 0 for s in result.runs[0].sites)


def test_some_experts_of_a_stack(folder: Callable[[str], Path], tmp_path: Path, ids: Tensor) -> None:
    sparsify.compile(
        folder("mixtral"),
        ["wanda:2:4"],
        calibration=[ids],
        output=tmp_path / "out",
        only=["re:.*layers.0.block_sparse_moe.experts.[01].w1"],
    )
    before, after = tensors(folder("mixtral")), tensors(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.0.block_sparse_moe.experts.{e}.w1.weight" for e in (0, 1)}
    assert all(follows(after[name], 2, 4) for name in changed)


def test_dry_run_reads_no_weight_and_writes_nothing(
    folder: Callable[[str], Path], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("a weight was read"))
    result = sparsify.compile(folder("llama"), ["wanda:4:8"], dry_run=True, output=tmp_path / "out")
    assert len(result.runs[0].targets) == 14 and not result.runs[0].sites
    assert not (tmp_path / "out").exists()


def test_pytorch_bin_is_read_only_when_asked(tmp_path: Path, ids: Tensor) -> None:
    model = build("llama")
    save("llama", tmp_path / "source")
    (tmp_path / "source" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "source" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="--allow-bin"):
        sparsify.compile(tmp_path / "source", ["wanda:2:4"], calibration=[ids])
    sparsify.compile(tmp_path / "source", ["wanda:2:4"], calibration=[ids], output=tmp_path / "out", allow_bin=True)
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()
    assert follows(tensors(tmp_path / "out")["model.layers.0.mlp.up_proj.weight"], 2, 4)


def test_a_pickle_that_runs_code_is_refused_even_then(tmp_path: Path, ids: Tensor) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "owned",))

    save("llama", tmp_path / "source")
    (tmp_path / "source" / "model.safetensors").unlink()
    torch.save({"x": Evil()}, tmp_path / "source" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="weights_only"):
        sparsify.compile(tmp_path / "source", ["wanda:2:4"], calibration=[ids], allow_bin=True)
    assert not (tmp_path / "owned").exists()


def test_wrong_words_are_refused_before_a_model_is_looked_for() -> None:
    for options in ({"schedule": "stage"}, {"to": "onxx"}, {"memory": "lots"}, {"device": "warp"}):
        with pytest.raises(SpecError):
            sparsify.compile("/no/such/model", ["wanda:2:4"], **options)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="nothing to do"):
        sparsify.compile("/no/such/model")
    with pytest.raises(SpecError):
        sparsify.compile("/no/such/model", ["wanda:5:4"])


def test_an_existing_output_is_refused_before_a_model_is_opened(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(BackendError, match="exists already"):
        sparsify.compile("/no/such/model", ["wanda:2:4"], output=tmp_path / "out")


def test_a_module_on_the_meta_device_has_nothing_to_prune() -> None:
    with torch.device("meta"):
        net = nn.Linear(8, 8)
    with pytest.raises(TraceError, match="holds no numbers"):
        sparsify.compile(net, ["magnitude:2:4"], calibration=[torch.randn(2, 8)])


def test_two_compiles_in_one_process_do_not_meet(ids: Tensor) -> None:
    model = build("llama")
    alone = sparsify.compile(model, ["wanda:2:4"], calibration=[ids])
    sparsify.compile(build("opt"), ["magnitude:90%"])
    again = sparsify.compile(model, ["wanda:2:4"], calibration=[ids])
    assert alone.manifest == again.manifest
