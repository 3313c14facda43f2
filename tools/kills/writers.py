"""The writers that tools/kills kills, each of what sparsify puts into a place that a user named."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import sparsify  # noqa: E402
from sparsify.files.ownership import Claim, Scratch  # noqa: E402
from sparsify.files.single import put_file  # noqa: E402
from sparsify.files.staging import Staging, check_output  # noqa: E402
from sparsify.journal.left import left_of, remove  # noqa: E402
from sparsify.runtime.cache import put_whole  # noqa: E402

# Of so small a model nothing is worth packing for speed.
SMALLEST = "packed:choice=smallest"


@dataclass(frozen=True)
class Scene:
    """``place`` is emptied before every run: ``out`` lies in it, and ``temporary`` for what is not an output."""

    folder: Path

    @property
    def place(self) -> Path:
        return self.folder / "place"

    @property
    def out(self) -> Path:
        # A name for anything, that a state of tuning may have too.
        return self.place / "out.tuning"

    @property
    def temporary(self) -> Path:
        return self.place / "temporary"

    def made(self, what: str) -> Path:
        """What was made before the first kill: ``model``, ``packed``, ``onnx``, ``text``."""
        return self.folder / what


@dataclass(frozen=True)
class Writer:
    """``write(scene, overwrite)`` writes ``scene.out``. ``next_run``: what the next run to it does before its work."""

    name: str
    write: Callable[[Scene, bool], None]
    next_run: Callable[[Scene], None]
    older: Callable[[Scene], None]
    fresh: bool = True
    is_folder: bool = True


def make_scene(folder: Path, writers: Sequence[str]) -> Scene:
    """A small model, and what some of ``writers`` begin from."""
    from support.families import deep

    scene = Scene(folder)
    scene.temporary.mkdir(parents=True)
    deep("llama", 1).save_pretrained(scene.made("model"))
    if "unpack" in writers:
        sparsify.compile(scene.made("model"), ["magnitude:2:4"], to=SMALLEST, output=scene.made("packed"))
    if {"expand", "expand-in-place"} & set(writers):
        to = "onnx:weights=packed"
        sparsify.compile(scene.made("model"), ["magnitude:2:4"], to=to, output=scene.made("onnx"))
    save_file({"input_ids": torch.arange(2000) % 57 + 3}, scene.made("text"))
    scene.made("text").rename(scene.made("text.safetensors"))
    return scene


def _compile(to: str, *passes: str) -> Callable[[Scene, bool], None]:
    def write(scene: Scene, overwrite: bool) -> None:
        sparsify.compile(
            scene.made("model"), list(passes) or ["magnitude:2:4"], to=to, output=scene.out, overwrite=overwrite
        )

    return write


def _plain(scene: Scene, overwrite: bool) -> None:
    with Staging(scene.out, overwrite=overwrite) as staging:
        (staging.folder / "inner").mkdir()
        for name in ("sparsify.json", "inner/new.txt"):
            (staging.folder / name).write_text('"new"')
        staging.commit()


def _unpack(scene: Scene, overwrite: bool) -> None:
    from sparsify.backends.packed.unpack import unpack_folder

    unpack_folder(scene.made("packed"), scene.out, overwrite=overwrite)


def _expand(scene: Scene, overwrite: bool) -> None:
    from sparsify.backends.onnx.expand import expand

    expand(scene.made("onnx"), scene.out, overwrite=overwrite)


def _expand_in_place(scene: Scene, overwrite: bool) -> None:
    from sparsify.backends.onnx.expand import expand

    # Already dense where the writer is run over its own output.
    if (scene.out / "model.safetensors").exists():
        return
    expand(scene.out)


def _graph(scene: Scene, overwrite: bool) -> None:
    from sparsify.backends.onnx.api import export_onnx

    torch.manual_seed(0)
    graph = torch.export.export(torch.nn.Linear(8, 4), (torch.zeros(2, 8),))
    export_onnx(graph, scene.out, overwrite=overwrite)


def _compare(scene: Scene, overwrite: bool) -> None:
    from sparsify.evaluation.compare import compare

    ids = [torch.arange(32).view(2, 16) % 57 + 3]
    compare(scene.made("model"), ["magnitude:2:4"], calibration=ids, output=scene.out, overwrite=overwrite)


def _tune(*, adapter: bool) -> Callable[[Scene, bool], None]:
    def write(scene: Scene, overwrite: bool) -> None:
        from sparsify.tuning.recipe import Recipe
        from sparsify.tuning.tune import tune

        recipe = Recipe(steps=2, batch=4, micro=4, samples=8, length=16, warmup=1, rate=1e-2, dropout=0.0)
        text = str(scene.made("text.safetensors"))
        tune(scene.made("model"), text, scene.out, recipe, adapter=adapter, save_every=1, overwrite=overwrite)

    return write


def _after_tune(scene: Scene) -> None:
    """The state, where there is one, is whole; then it is not a hidden thing of ours that is left."""
    _check(scene)
    state = scene.out.with_name(f"{scene.out.name}.tuning")
    Claim(state).release()
    if state.exists():
        assert sorted(p.name for p in state.iterdir()) == ["state.json", "state.safetensors"]


def _state(scene: Scene, overwrite: bool) -> None:
    from sparsify.tuning.recipe import Recipe
    from sparsify.tuning.state import TuneState

    torch.manual_seed(0)
    network = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    with TuneState.of(scene.out.with_suffix(""), Recipe(), network, resume=False) as state:
        state.save(optimizer)


def _dot(scene: Scene, overwrite: bool) -> None:
    put_file(scene.out, b"digraph {}")


def _cache(scene: Scene, overwrite: bool) -> None:
    put_whole(scene.out, b"machine code")


def _check(scene: Scene) -> None:
    if (claim := check_output(scene.out, overwrite=True, source=None)) is not None:
        claim.release()
    # A journal goes when it is told to.
    for left in left_of(scene.out):
        assert remove(left)
    for name in ("sparsify-compare", "sparsify-smaller"):
        Scratch(name).cleanup()


def _older(scene: Scene) -> None:
    scene.out.mkdir()
    for name in ("sparsify.json", "oldest.txt"):
        (scene.out / name).write_text('"old"')


def _older_file(scene: Scene) -> None:
    scene.out.write_text("old")


def _older_packed(scene: Scene) -> None:
    shutil.copytree(scene.made("onnx"), scene.out)


def _files(name: str, write: Callable[[Scene, bool], None]) -> Writer:
    """One of a single file, which the next run writes again."""
    return Writer(name, write, lambda scene: write(scene, True), _older_file, is_folder=False)


WRITERS = {
    writer.name: writer
    for writer in (
        Writer("staging", _plain, _check, _older),
        _files("file", _dot),
        _files("cache", _cache),
        Writer("state", _state, _check, _older),
        Writer("unpack", _unpack, _check, _older),
        Writer("expand", _expand, _check, _older),
        Writer("expand-in-place", _expand_in_place, _check, _older_packed, fresh=False),
        Writer("graph", _graph, _check, _older),
        Writer("hf", _compile("hf"), _check, _older),
        Writer("packed", _compile(SMALLEST), _check, _older),
        Writer("onnx", _compile("onnx"), _check, _older),
        Writer("smaller", _compile("hf", "llm-pruner:25%,importance=l1"), _check, _older),
        Writer("compare", _compare, _check, _older),
        Writer("tune", _tune(adapter=False), _after_tune, _older),
        Writer("adapter", _tune(adapter=True), _after_tune, _older),
    )
}
