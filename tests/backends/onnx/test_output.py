"""The folder as its users load it, and every way in which none is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import transformers
from support.command_line import sparsify as command
from support.onnx_models import greedy, logits, padded, shallow

import sparsify
from sparsify.backends.onnx import export_onnx
from sparsify.backends.onnx.backend import ONNX
from sparsify.backends.onnx.running.runner import Runner, Sampling
from sparsify.backends.verify.onnx_folder import verify_onnx
from sparsify.data.batches import evaluation_windows
from sparsify.errors import SparsifyError
from sparsify.evaluation.evaluate import evaluate
from sparsify.files.companions import copy_companions, rewrite_config
from sparsify.frontend.source import open_source


@pytest.fixture(scope="module")
def pruned(bundled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks of the bundled model, pruned 2:4 and exported by the command line."""
    root = tmp_path_factory.mktemp("bundled")
    model, out = root / "dense", root / "out"
    whole = transformers.AutoModelForCausalLM.from_pretrained(bundled)
    whole.config.num_hidden_layers, whole.model.layers = 2, whole.model.layers[:2]
    whole.save_pretrained(model)
    copy_companions(bundled, model)
    rewrite_config(model, lambda config: {**config, "num_hidden_layers": 2})
    drawn = ("--calibration", "python-stdlib", "--samples", 8, "--sequence-length", 64)
    done = command("compile", model, "--pass", "wanda:2:4", *drawn, "--to", "onnx", "-o", out)
    assert done.returncode == 0, done.stderr
    assert "model.onnx: opset 23, decoder" in done.stdout
    return out


def test_one_copy_of_the_weights_and_nothing_strange(pruned: Path) -> None:
    files = {p.name: p.stat().st_size for p in pruned.iterdir()}
    assert {"config.json", "model.safetensors", "model.onnx", "genai_config.json", "sparsify.json"} <= files.keys()
    assert files["model.onnx"] < 20_000 * 2 and "model.onnx.data" not in files
    assert not any(p.is_symlink() or p.stat().st_nlink > 1 for p in pruned.iterdir())
    onnx.checker.check_model(str(pruned / "model.onnx"), full_check=True)
    graph = ir.load(pruned / "model.onnx").graph
    assert not any("pkg.torch" in key for node in graph for key in node.metadata_props)
    assert [str(d) for d in graph.inputs[0].shape] == ["batch_size", "sequence_length"]
    manifest = json.loads((pruned / "sparsify.json").read_text())
    assert manifest["onnx"]["weights"] == "link" and manifest["onnx"]["kind"] == "decoder"


def test_transformers_onnxruntime_and_genai_write_the_same_tokens(pruned: Path) -> None:
    og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai has no wheel here")
    tokenizer = transformers.AutoTokenizer.from_pretrained(pruned)
    ids = tokenizer("def main(", return_tensors="pt")["input_ids"]
    model = transformers.AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    want = greedy(model, ids, torch.ones_like(ids), 40)[0]
    got = [int(t[0]) for t in Runner(pruned).generate(ids.numpy(), tokens=40)]
    assert got == want.tolist()
    params = og.GeneratorParams(og.Model(str(pruned)))
    params.set_search_options(max_length=ids.shape[1] + 40, do_sample=False)
    generator = og.Generator(og.Model(str(pruned)), params)
    generator.append_tokens(ids.numpy().astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    theirs = [int(t) for t in generator.get_sequence(0)][ids.shape[1] :]
    assert theirs == got[: len(theirs)] and len(theirs) == 40


def test_run_and_verify_at_the_command_line(pruned: Path) -> None:
    said = command("run", pruned, "def main(", "--tokens", 8)
    assert said.returncode == 0 and said.stdout.startswith("def main(") and "8 tokens" in said.stderr
    checked = command("verify", pruned)
    assert checked.returncode == 0 and "sound" in checked.stdout and "14 of 14 sparse weights" in checked.stdout
    wrong = command("verify", pruned, "--pattern", "1:4", "--weights-only", "--json")
    told = json.loads(wrong.stdout)
    assert wrong.returncode == 1 and "1:4 does not hold" in told["problems"][0] and len(told["weights"]) == 15


@pytest.mark.slow
def test_run_is_repeatable_and_commands_refuse_in_sentences(pruned: Path, tmp_path: Path) -> None:
    drawn = ("--tokens", 8, "--temperature", 1.0)
    again = [command("run", pruned, "import", *drawn, "--seed", seed).stdout for seed in (1, 1, 2)]
    assert again[0] == again[1] != again[2]
    for words in (("run", tmp_path, "x"), ("verify", tmp_path), ("expand", pruned)):
        refused = command(*words)
        assert refused.returncode == 1 and "error: " in refused.stderr, refused.stderr


def perplexity(folder: Path, windows: torch.Tensor) -> float:
    """The papers' protocol over onnxruntime's logits."""
    runner, losses = Runner(folder), []
    for row in windows.long():
        ids = row[None].numpy()
        scores, _ = runner.forward(ids, np.ones_like(ids), runner.empty(1))
        losses.append(torch.nn.functional.cross_entropy(torch.from_numpy(scores[0, :-1]), row[1:]))
    return float(torch.stack(losses).mean().exp())


def test_perplexity_of_the_bundled_model_equals_torchs(pruned: Path) -> None:
    windows, _ = evaluation_windows("python-stdlib", open_source(pruned), 64, 6)
    model = transformers.AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32)
    with torch.no_grad():
        scores = model(windows.long()).logits
    losses = [torch.nn.functional.cross_entropy(s[:-1], w[1:]) for s, w in zip(scores, windows.long(), strict=True)]
    assert abs(perplexity(pruned, windows) / float(torch.stack(losses).mean().exp()) - 1) < 1e-4


@pytest.mark.slow
def test_perplexity_of_stories_equals_torchs(stories: Path, tmp_path: Path) -> None:
    data = stories.parents[1] / "data" / "stories" / "heldout.txt"
    if not data.exists():
        pytest.skip("shared/data/stories is not here")
    sparsify.compile(stories, ["magnitude:2:4"], to="onnx", output=tmp_path / "out")
    windows, _ = evaluation_windows(str(data), open_source(tmp_path / "out"), 128, 8)
    want = evaluate(tmp_path / "out", str(data), sequence_length=128, windows=8).perplexity
    assert abs(perplexity(tmp_path / "out", windows) / want - 1) < 1e-4


@pytest.mark.slow
def test_a_bfloat16_checkpoint_runs_on_a_cpu_at_its_own_size(tmp_path: Path) -> None:
    model = shallow("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "dense")
    sparsify.compile(tmp_path / "dense", to="onnx", output=tmp_path / "out")
    ids, mask = padded()
    runner = Runner(tmp_path / "out")
    got, _ = runner.forward(ids.numpy(), mask.numpy(), runner.empty(2))
    want = logits(model.float(), ids, mask).numpy()
    assert np.abs(got - want)[mask.numpy() == 1].max() <= 1e-5
    small = sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    assert small < 0.55 * sum(t.numel() * 4 for t in model.state_dict().values()) + 4000


@pytest.mark.slow
def test_a_sharded_checkpoint_is_linked_shard_by_shard(tmp_path: Path) -> None:
    model = shallow("gpt2")
    model.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    sparsify.compile(tmp_path / "dense", ["magnitude:50%"], to="onnx", output=tmp_path / "out")
    graph = ir.load(tmp_path / "out" / "model.onnx").graph
    files = {
        v.const_value.location for v in graph.initializers.values() if isinstance(v.const_value, ir.ExternalTensor)
    }
    assert len(files) > 1 and files == {p.name for p in (tmp_path / "out").glob("*.safetensors")}
    assert verify_onnx(tmp_path / "out").sound


@pytest.mark.parametrize(
    ("family", "to"), [pytest.param("mixtral", "onnx", marks=pytest.mark.slow), ("gpt2", "onnx:opset=20")]
)
def test_experts_and_conv1d_are_verified_along_their_own_axis(
    family: str, to: str, written: Callable[[str, str], Path]
) -> None:
    result = verify_onnx(written(family, to), run=False)
    assert result.sound, result.problems
    pruned = [w for w in result.weights if w.pattern == "2:4"]
    assert {w.axis for w in pruned} == ({0} if family == "gpt2" else {1})
    if family == "mixtral":
        assert sum("experts" in w.name for w in pruned) == 2 * 4 * 3


@pytest.mark.slow
def test_compile_gives_the_pruned_weights_back_whatever_was_written(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    kept = [
        sparsify.compile(folder("llama"), ["magnitude:2:4"], to=to, output=tmp_path / f"out{i}").weight(name)
        for i, to in enumerate(("hf", "onnx", "onnx:weights=packed"))
    ]
    assert torch.equal(kept[0], kept[1]) and torch.equal(kept[0], kept[2])


def test_sampling_draws_from_the_likeliest(pruned: Path) -> None:
    runner = Runner(pruned)
    ids = np.array([[5, 6, 7]])
    scores, _ = runner.forward(ids, np.ones_like(ids), runner.empty(1))
    best = set(scores[0, -1].argsort()[-3:].tolist())
    drawn = {int(next(runner.generate(ids, tokens=1, sampling=Sampling(5.0, 3, s)))[0]) for s in range(40)}
    assert drawn == best
    assert int(next(runner.generate(ids, tokens=1, sampling=Sampling(5.0, 1, 3)))[0]) == int(scores[0, -1].argmax())


class Sorted(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvalsh(self.linear(x).T @ self.linear(x))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"opset": 17}, "only opsets 18 to 24"),
        ({"dtype": "float16"}, "weights=link points at the checkpoint's own bytes"),
    ],
)
def test_options_that_cannot_be_meant(options: dict[str, Any], says: str) -> None:
    with pytest.raises(SparsifyError, match=says) as caught:
        ONNX(**options)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("to", ["onnx:opset=twenty", "onnx:weigths=link", "onnx:weights", "onyx"])
def test_words_that_name_nothing(to: str, folder: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(SparsifyError):
        sparsify.compile(folder("llama"), to=to, output=tmp_path / "out")


def test_an_operator_without_a_translation_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(SparsifyError, match=r"linalg_eigh"):
        export_onnx(Sorted(), tmp_path / "out", example_inputs=[torch.randn(2, 8)])
    assert not list(tmp_path.iterdir())


def net() -> torch.nn.Module:
    layer = torch.nn.Linear(64, 64)
    with torch.no_grad():
        layer.weight.view(-1, 4)[:, :2] = 0
    return layer


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sparsify.backends.onnx.writing.save_graph", full)
    with pytest.raises(SparsifyError, match="No space left"):
        export_onnx(net(), tmp_path / "out", example_inputs=[torch.randn(2, 64)])
    assert not list(tmp_path.iterdir())


def test_packed_weights_that_would_not_fit_in_memory_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsify.backends.onnx.writing._physical_memory", lambda: 10_000)
    with pytest.raises(SparsifyError, match=r"onnxruntime would need some .* to unpack it"):
        export_onnx(net(), tmp_path / "out", weights="packed", example_inputs=[torch.randn(2, 64)])
    assert not list(tmp_path.iterdir())


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SparsifyError, match="neither a model nor a graph"):
        export_onnx(42, tmp_path / "out")  # type: ignore[arg-type]


def test_no_pass_and_no_backend_that_does_without_one(folder: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(SparsifyError, match="nothing to do"):
        sparsify.compile(folder("llama"), to="hf", output=tmp_path / "out")


@pytest.mark.slow
def test_matmul_weights_lie_as_quantisers_look_for_them_and_read_back_as_they_were(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    result = sparsify.compile(
        folder("llama"), ["magnitude:2:4"], to="onnx:linear=matmul,weights=external", output=tmp_path / "out"
    )
    graph = ir.load(tmp_path / "out" / "model.onnx").graph
    (reader,) = graph.initializers[name].consumers()
    assert reader.op_type == "MatMul" and list(graph.initializers[name].shape) == [32, 64]
    assert list(result.weight(name).shape) == [64, 32]
    ids = torch.randint(3, 60, (2, 9))
    with torch.no_grad():
        assert result.model(ids).logits.shape == (2, 9, 64)
    checked = verify_onnx(tmp_path / "out")
    assert checked.sound and checked.behaviour is not None, (checked.problems, checked.unchecked)
    assert {w.axis for w in checked.weights if w.pattern == "2:4"} == {0}
