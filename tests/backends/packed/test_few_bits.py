"""Packed folders of few bits as their users meet them: grids that are found, weights that are rounded, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.command_line import sparsify as command
from support.families import inputs, run, save
from support.folders import load, same_files

import sparsify
from sparsify.backends.packed.backend import PackedBackend
from sparsify.backends.packed.loaded.linear import PackedLinear
from sparsify.backends.packed.loaded.on_gpu import prepare
from sparsify.backends.packed.unpack import unpack_folder
from sparsify.errors import BackendError, SpecError
from sparsify.files.checkpoint import Checkpoint
from sparsify.method.spec import parse_backend
from sparsify.runtime.cuda.gpu import GPU

SMALLEST = "packed:choice=smallest"
NEAREST = "compensation=none"
UP = "model.layers.0.mlp.up_proj.weight"


def quantization(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


def kinds(folder: Path) -> set[tuple[str, int | None, int | None]]:
    sites = quantization(folder)["sites"].values()
    return {(site["layout"], site.get("bits"), site.get("group")) for site in sites}


def llama() -> transformers.LlamaForCausalLM:
    """One whose inputs are not mostly padding."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).eval()


def wide(folder: Path) -> Path:
    llama().save_pretrained(folder)
    return folder


def near(got: torch.Tensor, want: torch.Tensor, share: float = 0.05) -> bool:
    return float((got - want).norm() / want.norm()) < share


ROUNDED = [
    (["magnitude:2:4", f"round:int8,{NEAREST}"], {("packed24", 8, None)}),
    (["magnitude:2:4", f"round:int4,group=32,{NEAREST}"], {("packed24", 4, 32)}),
    (["magnitude:2:4", f"round:int3,group=64,{NEAREST}"], {("packed24", 4, 64)}),
    (["magnitude:60%", f"round:int4,group=64,{NEAREST}"], {("bitmask", 4, 64)}),
    ([f"round:int8,{NEAREST}"], {("dense", 8, None)}),
    # A grid of 4 bits that is not symmetric is a symmetric one of 8.
    (["magnitude:2:4", f"round:int4,symmetric=false,{NEAREST}"], {("packed24", 8, None)}),
]


@pytest.mark.first(2)
@pytest.mark.parametrize(("passes", "layouts"), ROUNDED)
def test_what_was_rounded_is_stored_as_integers_to_the_bit(
    passes: list[str], layouts: set[Any], tmp_path: Path
) -> None:
    dense = wide(tmp_path / "dense")
    sparsify.compile(dense, passes, output=tmp_path / "hf")
    sparsify.compile(dense, passes, output=tmp_path / "packed", to=SMALLEST)
    assert kinds(tmp_path / "packed") == layouts and quantization(tmp_path / "packed")["format"] == 2
    unpack_folder(tmp_path / "packed", tmp_path / "back")
    assert same_files(tmp_path / "hf", tmp_path / "back")
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())
    packed, plain = load(tmp_path / "packed"), load(tmp_path / "hf")
    batch = inputs("llama", rows=1)
    assert near(run(packed, batch), run(plain, batch))
    packed.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert torch.equal(run(again, batch), run(packed, batch)) and kinds(tmp_path / "again") == layouts


@pytest.mark.slow
def test_rounding_in_an_earlier_run_and_in_a_joint_sweep_is_meant_too(tmp_path: Path) -> None:
    dense, ids = wide(tmp_path / "dense"), [torch.randint(0, 64, (2, 32))]
    sparsify.compile(dense, ["magnitude:2:4", f"round:int8,{NEAREST}"], output=tmp_path / "hf")
    sparsify.compile(tmp_path / "hf", [], output=tmp_path / "later", to=SMALLEST)
    assert kinds(tmp_path / "later") == {("packed24", 8, None)}
    sparsify.compile(dense, ["sparsegpt:2:4,bits=4"], calibration=ids, output=tmp_path / "joint", to=SMALLEST)
    assert kinds(tmp_path / "joint") == {("packed24", 4, None)}


@pytest.mark.slow
def test_a_grid_that_no_pass_made_is_said_and_kept_at_full_width(tmp_path: Path) -> None:
    """Who only packs gets the products of before, which round no activations."""
    dense = wide(tmp_path / "dense")
    sparsify.compile(dense, ["magnitude:2:4", f"round:int4,group=32,{NEAREST}"], output=tmp_path / "hf")
    (tmp_path / "hf" / "sparsify.json").unlink()
    made = sparsify.compile(tmp_path / "hf", [], output=tmp_path / "out", to=SMALLEST)
    assert kinds(tmp_path / "out") == {("packed24", None, None)} and quantization(tmp_path / "out")["format"] == 1
    assert any("on a grid of 4 bits where no pass put it: values=int4 stores it so" in note for note in made.notes)
    sparsify.compile(tmp_path / "hf", [], output=tmp_path / "asked", to=f"{SMALLEST},values=int4,group=32")
    assert kinds(tmp_path / "asked") == {("packed24", 4, 32)}
    unpack_folder(tmp_path / "asked", tmp_path / "back")
    for name, tensor in transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf").state_dict().items():
        assert torch.equal(load(tmp_path / "back").state_dict()[name], tensor), name


@pytest.mark.first(2)
@pytest.mark.parametrize("family", ["gpt2", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("to", ["values=int8", "values=int4,group=32,layout=dense", "values=int4,layout=bitmask"])
def test_stacks_of_experts_and_transposed_weights(family: str, to: str, tmp_path: Path) -> None:
    save(family, tmp_path / "dense")
    made = sparsify.compile(tmp_path / "dense", ["magnitude:60%"], output=tmp_path / "out", to=f"{SMALLEST},{to}")
    names = {name.rpartition(".")[2] for name in quantization(tmp_path / "out")["sites"]}
    assert names == ({"weight"} if family == "gpt2" else {"weight", "gate_up_proj", "down_proj"})
    assert {bits for _, bits, _ in kinds(tmp_path / "out")} == {8 if "int8" in to else 4}
    unpack_folder(tmp_path / "out", tmp_path / "back")
    packed, plain = load(tmp_path / "out"), load(tmp_path / "back")
    batch = inputs(family)
    assert near(run(packed, batch), run(plain, batch), 0.01)
    for name in quantization(tmp_path / "out")["sites"]:
        assert torch.equal(made.weight(name), plain.get_parameter(name))


def test_rounded_on_the_way_and_said_so(tmp_path: Path) -> None:
    dense = wide(tmp_path / "dense")
    plain = sparsify.compile(dense, ["magnitude:2:4"])
    made = sparsify.compile(dense, ["magnitude:2:4"], output=tmp_path / "out", to=f"{SMALLEST},values=int4")
    assert kinds(tmp_path / "out") == {("packed24", 4, 64)}, "the group where nobody names one"
    manifest = json.loads((tmp_path / "out" / "sparsify.json").read_text())["packed"]
    assert manifest["format"] == 2 and manifest["values"] == "int4" and manifest["activations"] == "int8"
    for site in manifest["sites"]:
        if site["layout"] == "packed24":
            before, after = plain.weight(site["name"]), made.weight(site["name"])
            assert site["rounding"] == pytest.approx(float((after - before).norm() / before.norm()), abs=1e-5)
            assert 0.02 < site["rounding"] < 0.2 and not after[before == 0].any()
    note = next(note for note in made.notes if "rounded to nearest" in note)
    assert "14 weights" in note and "--pass round" in note
    # A head is rounded where its zeros say that somebody pruned it, and else where a pass names it.
    head = next(site for site in manifest["sites"] if site["name"] == "lm_head.weight")
    assert head["layout"] == "dense" and "bits" not in head
    assert torch.equal(made.weight("lm_head.weight"), plain.weight("lm_head.weight"))


@pytest.mark.slow
def test_what_lies_on_a_grid_is_not_rounded_again(tmp_path: Path) -> None:
    dense = wide(tmp_path / "dense")
    rounded = ["magnitude:2:4", f"round:int4,group=32,{NEAREST}"]
    sparsify.compile(dense, rounded, output=tmp_path / "hf")
    for to, stored in (
        ("values=int4", (4, 32)),
        ("values=int8", (8, 32)),
        ("values=int4,group=32", (4, 32)),
        ("values=auto", (4, 32)),
    ):
        out = tmp_path / to.replace(",", "_")
        sparsify.compile(tmp_path / "hf", output=out, to=f"{SMALLEST},{to}")
        assert kinds(out) == {("packed24", *stored)}
        unpack_folder(out, tmp_path / f"{out.name}-back")
        assert same_files(tmp_path / "hf", tmp_path / f"{out.name}-back")
    # Larger groups than it has were asked for.
    sparsify.compile(tmp_path / "hf", output=tmp_path / "row", to=f"{SMALLEST},values=int8,group=row")
    assert kinds(tmp_path / "row") == {("packed24", 8, None)}
    sparsify.compile(tmp_path / "hf", output=tmp_path / "full", to=f"{SMALLEST},values=full")
    assert kinds(tmp_path / "full") == {("packed24", None, None)} and quantization(tmp_path / "full")["format"] == 1
    assert "activations" not in quantization(tmp_path / "full")


@pytest.mark.slow
def test_a_grid_that_no_layout_has_is_named(tmp_path: Path) -> None:
    dense = wide(tmp_path / "dense")
    specs = ["magnitude:2:4", f"round:int8,symmetric=false,{NEAREST}"]
    made = sparsify.compile(dense, specs, output=tmp_path / "out", to=SMALLEST)
    assert kinds(tmp_path / "out") == {("packed24", None, None)}
    assert any("of full width" in note and "not symmetric" in note for note in made.notes)
    none = sparsify.compile(dense, specs[1:], output=tmp_path / "none", to=SMALLEST)
    assert "not symmetric" in none.notes[0] and "OUT is an ordinary checkpoint" in none.notes[0]


@pytest.mark.parametrize(
    ("spec", "values", "says"),
    [
        ("round:int8,symmetric=false", "int8", "8 bits with zero points"),
        ("round:int4,symmetric=false", "int4", "Leave values out"),
        ("sparsegpt:2:4,bits=8,symmetric=false", "int4", "rounded twice"),
    ],
)
def test_zero_points_are_not_rounded_away_in_silence(spec: str, values: str, says: str, tmp_path: Path) -> None:
    """Before anything is opened: there is no such model."""
    with pytest.raises(SpecError, match="symmetric=false") as caught:
        sparsify.compile(tmp_path / "none", spec, output=tmp_path / "out", to=f"packed:values={values}")
    assert says in str(caught.value)


def test_zero_points_of_an_earlier_run_are_told(tmp_path: Path) -> None:
    """Neither ``save`` nor another run rounds them once more without a word; three bits fit into four about zero."""
    dense = wide(tmp_path / "dense")
    made = sparsify.compile(dense, f"round:int8,symmetric=false,{NEAREST}", output=tmp_path / "hf")
    with pytest.raises(SpecError, match="rounded twice"):
        made.save(tmp_path / "saved", to="packed:values=int8")
    later = sparsify.compile(tmp_path / "hf", output=tmp_path / "later", to=f"{SMALLEST},values=int8")
    assert any(note.startswith("rounded again") and "not symmetric" in note for note in later.notes)
    spec = f"round:int3,symmetric=false,group=64,{NEAREST}"
    three = sparsify.compile(dense, spec, output=tmp_path / "three", to=f"{SMALLEST},values=int4")
    assert kinds(tmp_path / "three") == {("dense", 4, 64)}
    assert not any("rounded" in note for note in three.notes)


def test_eval_judges_what_is_written(tmp_path: Path) -> None:
    """The perplexity is of the rounded weights, which are those of the folder."""
    dense = wide(tmp_path / "dense")
    ids = torch.randint(3, 60, (2, 32), generator=torch.Generator().manual_seed(0))
    to = f"{SMALLEST},values=int4,group=row"
    made = sparsify.compile(dense, ["magnitude:2:4"], output=tmp_path / "out", to=to, evaluate=ids)
    again = sparsify.compile(tmp_path / "out", ["magnitude:2:4"], evaluate=ids)
    plain = sparsify.compile(dense, ["magnitude:2:4"], evaluate=ids)
    figures = [own.evaluation.as_dict() for own in (made, again, plain) if own.evaluation is not None]
    assert figures[0]["pruned"] == pytest.approx(figures[1]["dense"], rel=1e-6)
    assert figures[0]["pruned"] != pytest.approx(figures[2]["pruned"], rel=1e-5)
    # What was judged as it was is rounded only when it is saved: its figures are not the folder's.
    plain.save(tmp_path / "saved", to=to)
    assert "evaluation" not in json.loads((tmp_path / "saved" / "sparsify.json").read_text())


@pytest.mark.slow
def test_dtypes_state_dicts_and_compile(tmp_path: Path) -> None:
    dense = wide(tmp_path / "dense")
    to = f"{SMALLEST},values=int4,activations=float"
    sparsify.compile(dense, ["magnitude:2:4"], output=tmp_path / "out", to=to)
    assert quantization(tmp_path / "out")["activations"] == "float"
    packed, batch = load(tmp_path / "out"), inputs("llama", rows=1)
    want = run(packed, batch)
    unpack_folder(tmp_path / "out", tmp_path / "back")
    torch.testing.assert_close(want, run(load(tmp_path / "back"), batch), rtol=1e-3, atol=1e-4)
    layer = packed.model.layers[0].mlp.up_proj
    assert isinstance(layer, PackedLinear) and layer.exact and "packed24 int4" in repr(layer)
    half = load(tmp_path / "out", dtype=torch.bfloat16)
    own = half.model.layers[0].mlp.up_proj
    assert own.weight.dtype == torch.bfloat16 and own.weight_integers.dtype == torch.uint8
    assert near(run(half, batch).float(), want, 0.1)
    torch.save(packed.state_dict(), tmp_path / "state.pt")
    other = load(tmp_path / "out")
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(run(other, batch), want)
    torch.save(packed, tmp_path / "model.pt")
    assert torch.equal(run(torch.load(tmp_path / "model.pt", weights_only=False), batch), want)
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch, use_cache=False).logits, packed(**batch).logits)
    whole = packed.dequantize()
    assert not any(isinstance(module, PackedLinear) for module in whole.modules())
    torch.testing.assert_close(run(whole, batch), want, rtol=1e-3, atol=1e-4)


def test_a_module_in_memory_and_what_is_saved_later(tmp_path: Path) -> None:
    model = llama()
    made = sparsify.compile(model, ["magnitude:2:4"], output=tmp_path / "out", to=f"{SMALLEST},values=int8")
    assert torch.equal(made.weight(UP), made.model.get_parameter(UP))
    kept = sparsify.compile(model, ["magnitude:2:4"])
    before = kept.weight(UP).clone()
    kept.save(tmp_path / "saved", to=PackedBackend(choice="smallest", values="int8"))
    assert kinds(tmp_path / "saved") == {("packed24", 8, None)}
    assert torch.equal(load(tmp_path / "saved").dequantize().get_parameter(UP), made.weight(UP))
    assert torch.equal(kept.weight(UP), before), "the result in memory is what passes made of it"


@pytest.mark.parametrize(
    ("to", "says"),
    [
        ("packed:group=64", "leave group out"),
        ("packed:values=auto,group=64", "nothing is rounded"),
        ("packed:values=full,layout=dense", "stored as integers"),
        ("packed:values=full,activations=float", "stored as integers"),
        ("packed:values=int5", "int8"),
        ("packed:values=int8,group=16", "row"),
    ],
)
def test_options_that_cannot_be_meant(to: str, says: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_backend(to)
    assert says in str(caught.value)


def test_values_that_have_no_scale_stay_dense(tmp_path: Path) -> None:
    model = llama()
    with torch.no_grad():
        model.get_parameter(UP).mul_(1e10)
    made = sparsify.compile(model, [], output=tmp_path / "out", to=f"{SMALLEST},values=int8")
    assert any("float16 ends at 65504" in note and "up_proj" in note for note in made.notes)
    assert UP not in quantization(tmp_path / "out")["sites"]


def test_a_gpu_gets_the_full_width_for_many_tokens(tmp_path: Path) -> None:
    """NVIDIA's library has no kernel for integers: with one warning, and not in silence."""
    dense = wide(tmp_path / "dense")
    sparsify.compile(dense, ["magnitude:2:4"], output=tmp_path / "out", to=f"{SMALLEST},values=int8")
    packed, batch = load(tmp_path / "out", dtype=torch.bfloat16), inputs("llama", rows=1)
    want = run(load(tmp_path / "out", dtype=torch.bfloat16).dequantize(), batch)
    with pytest.warns(RuntimeWarning, match="14 2:4 weights take the width of their dtype"):
        prepare(packed, "both", tune=False, target=GPU("a GPU", (8, 0), 108, True, "cutlass"))
    assert near(run(packed, batch), want, 0.02)
    entry = packed.config.quantization_config.sites[UP]
    assert entry["layout"] == "packed24" and "bits" not in entry
    packed.save_pretrained(tmp_path / "saved")
    assert kinds(tmp_path / "saved") == {("packed24", None, None)}
    assert near(run(load(tmp_path / "saved", dtype=torch.bfloat16), batch), want, 0.02)
    made = sparsify.compile(dense, ["magnitude:2:4", f"round:int8,{NEAREST}"], output=tmp_path / "gpu", to="cuda")
    assert any("--to packed stores them in few bits" in note for note in made.notes) and kinds(tmp_path / "gpu") == {
        ("packed24", None, None)
    }


@pytest.mark.parametrize(("spec", "to"), [("magnitude:60%", "values=int4"), ("", "values=int8,layout=dense")])
def test_integers_without_2_4_become_dense_on_a_gpu(spec: str, to: str, tmp_path: Path) -> None:
    """The values of the grid, with a warning that says how many and why."""
    sparsify.compile(wide(tmp_path / "dense"), spec or [], output=tmp_path / "out", to=f"{SMALLEST},{to}")
    packed, batch = load(tmp_path / "out", dtype=torch.bfloat16), inputs("llama", rows=1)
    want = run(load(tmp_path / "out", dtype=torch.bfloat16).dequantize(), batch)
    with pytest.warns(RuntimeWarning, match="14 × values of 8 or 4 bits, for which there is no GPU kernel"):
        prepare(packed, tune=False, target=GPU("a GPU", (9, 0), 132, True, "cusparselt"))
    assert not any(isinstance(module, PackedLinear) for module in packed.modules())
    assert torch.equal(run(packed, batch), want)


def test_nothing_to_round_is_no_end(tmp_path: Path) -> None:
    """Without zeros a model is packed too, if it is rounded; what to do is said where it is not."""
    dense = wide(tmp_path / "dense")
    with pytest.raises(BackendError, match=r"no zeros.*values=int8"):
        sparsify.compile(dense, output=tmp_path / "no", to=SMALLEST)
    sparsify.compile(dense, output=tmp_path / "out", to=f"{SMALLEST},values=int8")
    assert kinds(tmp_path / "out") == {("dense", 8, None)}
    assert Checkpoint(tmp_path / "out").dtype(f"{UP}_integers") == torch.int8
    page = sparsify.report(tmp_path / "out", tmp_path / "page.html").read_text()
    assert "dense int8" in page and "Not packed: None" not in page


@pytest.mark.slow
def test_from_the_command_line(tmp_path: Path) -> None:
    dense, out = wide(tmp_path / "dense"), tmp_path / "packed"
    done = command("compile", dense, "--pass", "magnitude:2:4", "--to", f"{SMALLEST},values=int4,group=64", "-o", out)
    assert done.returncode == 0 and "14 as packed24 int4" in done.stdout, done.stderr
    said = command("verify", out, "--weights-only")
    assert said.returncode == 0 and "packed24 int4" in said.stdout and "sparsify bench" in said.stdout, said.stdout
    assert "15 linear sites" in command("inspect", out).stdout
    assert command("diff", dense, out).returncode == 0
    assert command("report", out, "-o", tmp_path / "page.html").returncode == 0
    assert command("unpack", out, "-o", tmp_path / "back").returncode == 0
    assert command("verify", tmp_path / "back", "--weights-only").returncode == 0
    table = command("bench", out, "--prompt", 8, "--tokens", 4, "--rounds", 1)
    assert table.returncode == 0 and "packed24 int4" in table.stdout, table.stderr
    assert torch.equal(sparsify.load(out).get_parameter(UP), sparsify.load(tmp_path / "back").get_parameter(UP))
