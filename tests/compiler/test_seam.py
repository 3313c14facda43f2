"""One kind of pass, one seam: order, declarations, timing, what is printed, and passes of other packages."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import sparsify
from sparsify.analysis.graph_pass import GraphPass
from sparsify.analysis.linear import find_sites
from sparsify.context import Context, Progress
from sparsify.errors import SpecError, VerifyError
from sparsify.ir.program import Program
from sparsify.method.base import Change, Pass, check_order
from sparsify.method.pattern import NM, Unstructured
from sparsify.method.registry import find, registered
from sparsify.passes import LLMPruner, LowerSparse, Magnitude, Permute, Wanda


@dataclass(frozen=True)
class Scale(GraphPass):
    """Multiplies the weight of every linear site."""

    factor: float = 2.0

    name: ClassVar[str] = "scale"
    summary: ClassVar[str] = "every linear weight times a factor"

    def apply(self, program: Program, batches: Sequence[Mapping[str, Tensor]] | None, context: Context) -> None:
        for name in dict.fromkeys(site.parameter for site in find_sites(program)[0]):
            program.weights.write(name, program.weights.read(name) * self.factor)


@dataclass(frozen=True)
class Meddling(GraphPass):
    """Puts a second relu behind every relu, whether it says so or not."""

    name: ClassVar[str] = "meddling"

    def apply(self, program: Program, batches: Sequence[Mapping[str, Tensor]] | None, context: Context) -> None:
        for node in [n for n in program.graph.nodes if n.target is torch.ops.aten.relu.default]:
            with program.graph.inserting_after(node):
                again = program.graph.call_function(torch.ops.aten.relu.default, (node,))
            again.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(again, lambda user, own=again: user is not own)


@dataclass(frozen=True)
class Admitted(Meddling):
    name: ClassVar[str] = "admitted"
    changes: ClassVar[frozenset[Change]] = frozenset({"graph"})


@dataclass(frozen=True)
class SecretlyWriting(Scale):
    name: ClassVar[str] = "secretly-writing"
    changes: ClassVar[frozenset[Change]] = frozenset({"graph"})


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()


X = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))


def test_every_registered_pass_declares_itself() -> None:
    for name in registered("sparsify.passes"):
        kind = find("sparsify.passes", name)
        assert issubclass(kind, Pass) and kind.name == name and kind.summary
        assert kind.kind in ("structure", "graph", "channels", "weights", "regions", "rounding", "lowering")
        assert kind.misplaced and kind.changes


def test_graph_passes_and_weight_passes_in_any_order() -> None:
    model = net()
    first, then = (sparsify.compile(model, passes, calibration=[X]).model for passes in
                   ([Scale(4.0), "magnitude:2:4"], ["magnitude:2:4", Scale(4.0)]))  # fmt: skip
    for one, other, dense in zip(first.parameters(), then.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, one.detach() if dense.dim() == 1 else dense * 4 * (one != 0))


def test_what_comes_after_what() -> None:
    """Every pair of kinds, by their declarations alone."""
    passes: list[Pass] = [LLMPruner(Unstructured(0.5)), Scale(), Permute(NM(2, 4)), Wanda(NM(2, 4)), LowerSparse()]
    allowed = set()
    for one, other in itertools.product(passes, passes):
        try:
            check_order([one, other])
        except SpecError as error:
            assert other.name in str(error) and one.name in str(error) and error.do
        else:
            allowed.add((one.kind, other.kind))
    earlier = ("structure", "graph", "channels", "weights")
    after = {(a, b) for a in earlier for b in ("graph", "channels", "weights", "lowering")} - {("weights", "channels")}
    assert allowed == {("structure", "structure")} | after


def test_structural_after_weights_is_refused_before_a_model_is_opened() -> None:
    with pytest.raises(SpecError, match="weights changed before the model gets smaller"):
        sparsify.compile("no such folder", ["wanda:2:4", "llm-pruner:50%"])


def test_a_pass_that_changes_what_it_declares_not_to_is_stopped() -> None:
    with pytest.raises(VerifyError, match="meddling: it changed the graph, and declares that it changes weights"):
        sparsify.compile(net(), [Meddling()], calibration=[X])
    with pytest.raises(VerifyError, match=r"secretly-writing: it changed the weight 0\.weight"):
        sparsify.compile(net(), [SecretlyWriting()], calibration=[X])


@dataclass(frozen=True)
class Bad(GraphPass):
    what: str = "nan"

    name: ClassVar[str] = "bad"

    def apply(self, program: Program, batches: Sequence[Mapping[str, Tensor]] | None, context: Context) -> None:
        value = program.weights.read("0.weight").clone()
        if self.what == "raise":
            raise KeyError("missing")
        if self.what == "unknown":
            program.weights.write("no.such", value)
        if self.what == "shape":
            program.weights.write("0.weight", value[1:])
        value[0, 0] = float(self.what) if self.what in ("nan", "inf") else 0
        if self.what in ("nan", "inf"):
            program.weights.write("0.weight", value)


@pytest.mark.parametrize(
    ("what", "found"),
    [
        ("nan", "pass bad: weight 0.weight: a weight that is NaN or infinite"),
        ("inf", "pass bad: weight 0.weight: a weight that is NaN or infinite"),
        ("shape", "pass bad: weight 0.weight: shape [63, 64] for [64, 64]"),
        ("raise", "pass bad: it raised KeyError: 'missing'"),
        ("unknown", "pass bad: it raised KeyError: 'no.such'"),
    ],
)
def test_what_a_graph_pass_gets_wrong_is_named(what: str, found: str) -> None:
    with pytest.raises(VerifyError) as caught:
        sparsify.compile(net(), [Bad(what)], calibration=[X])
    assert found in str(caught.value)


@pytest.mark.parametrize("passes", [[3], [Wanda], 3, [None]])
def test_what_is_no_pass_is_refused(passes: list[str]) -> None:
    with pytest.raises(SpecError, match="no pass"):
        sparsify.compile(net(), passes, calibration=[X])
    with pytest.raises(SpecError, match="no pass that prunes or rounds weights"):
        sparsify.GraphPrune(Scale(), [X])  # type: ignore[arg-type]


def test_a_pass_that_changes_the_graph_has_no_folder(tmp_path: Path) -> None:
    made = sparsify.compile(net(), [Admitted()], calibration=[X])
    assert sum(n.target is torch.ops.aten.relu.default for n in made.program.graph.nodes) == 2
    for spec in (Admitted(), "lower-sparse:choice=smallest"):
        with pytest.raises(SpecError, match=r"writes the parameters of a model, and .* changes its graph"):
            sparsify.compile(net(), ["magnitude:2:4", spec], calibration=[X], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_lowering_gives_the_module_that_runs() -> None:
    pruned = sparsify.compile(net(), ["magnitude:2:4"], calibration=[X]).model
    made = sparsify.compile(net(), ["magnitude:2:4", "lower-sparse:choice=smallest"], calibration=[X])
    assert made.lowered is made.model and isinstance(made.model, torch.fx.GraphModule)
    assert [record.layout for record in made.model.meta["sparsify"]] == ["packed24", "packed24"]
    out = made.model(X)
    with torch.no_grad():
        torch.testing.assert_close(out[0] if isinstance(out, (tuple, list)) else out, pruned(X), rtol=1e-4, atol=1e-5)


def test_the_seam_times_verifies_and_tells() -> None:
    told: list[tuple[str, float]] = []
    seen: list[Progress] = []

    def after(own: Pass, program: Program) -> None:
        program.verify()
        told.append((own.name, float((program.weights.read("0.weight") == 0).float().mean())))

    made = sparsify.compile(
        net(), ["magnitude:50%", Scale(), "wanda:2:4"], calibration=[X], after=after, observe=seen.append
    )
    assert told == [("magnitude", 0.5), ("scale", 0.5), ("wanda", told[2][1])] and told[2][1] >= 0.5
    assert all(run.seconds > 0 for run in made.runs) and [len(run.written) for run in made.runs] == [2, 2, 2]
    assert any(step.phase == "running scale" for step in seen)
    assert [entry["name"] for entry in made.manifest["passes"]] == ["magnitude", "scale", "wanda"]


def command(*words: object, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sparsify", *map(str, words)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "COLUMNS": "120", **more},
    )  # fmt: skip


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package with a graph pass of its own, as pip would install it."""
    place = tmp_path / "site"
    (place / "halving").mkdir(parents=True)
    (place / "halving" / "__init__.py").write_text(
        '"""A package of somebody else."""\n'
        "from dataclasses import dataclass\n"
        "from typing import ClassVar\n"
        "from sparsify.analysis.graph_pass import GraphPass\n"
        "from sparsify.analysis.linear import find_sites\n\n\n"
        "@dataclass(frozen=True)\n"
        "class Halve(GraphPass):\n"
        "    times: int = 1\n"
        '    name: ClassVar[str] = "halve"\n'
        '    summary: ClassVar[str] = "halves the weights of linear layers"\n\n'
        "    def apply(self, program, batches, context):\n"
        "        for name in {site.parameter: None for site in find_sites(program)[0] if site.block}:\n"
        "            program.weights.write(name, program.weights.read(name) / 2**self.times)\n"
    )
    facts = place / "halving-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: halving\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(
        "[sparsify.passes]\nhalve = halving:Halve\ngone = halving:Gone\nlost = nowhere:X\n"
    )
    return place


@pytest.mark.slow
def test_a_graph_pass_of_another_package_at_the_command_line(package: Path, bundled: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = command(
        "compile", bundled, "--pass", "magnitude:2:4", "--pass", "halve:times=2", "-o", out, "--print-after", "halve",
        PYTHONPATH=str(package),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    name = "model.layers.0.self_attn.q_proj.weight"
    dense, halved = sparsify.load(bundled).get_parameter(name), sparsify.load(out).get_parameter(name)
    assert torch.equal(halved, torch.where(halved != 0, dense / 4, 0)) and bool((halved == 0).any())
    assert "# after halve" in done.stdout and "# after magnitude" not in done.stdout
    assert f"  {name} [256, 256] " in done.stdout and "50.00% zeros, 2:4" in done.stdout
    assert "halve:times=2: " in done.stdout and "weights written" in done.stdout
    wrong = command("compile", bundled, "--pass", "halve:tims=2", "-o", tmp_path / "x", PYTHONPATH=str(package))
    assert wrong.returncode == 2 and "Near names: times" in wrong.stderr
    listed = command("passes", PYTHONPATH=str(package))
    assert "gone  cannot be used: its entry point halving:Gone does not load" in listed.stdout
    assert "lost  cannot be used: its entry point nowhere:X does not load" in listed.stdout
    assert "halve  halves the weights" in listed.stdout and "times=a whole number (default 1)" in listed.stdout


def test_print_after_names_a_pass_of_the_command(bundled: Path, tmp_path: Path) -> None:
    done = command("compile", bundled, "--pass", "magnitude:2:4", "-o", tmp_path / "x", "--print-after", "wanda")
    assert done.returncode == 2 and "--print-after wanda: no such pass in this command (magnitude)" in done.stderr


def test_magnitude_is_a_pass_like_any_other() -> None:
    assert Magnitude(NM(2, 4)).kind == "weights" and not Magnitude(NM(2, 4)).needs_data
