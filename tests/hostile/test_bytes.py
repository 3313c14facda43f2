"""One bit of a folder of ours changed: whoever reads the folder names what differs, and writes nothing."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from support.command_line import sparsify as run
from support.families import save
from support.manifests import as_format_1, edit_manifest

import sparsify
from sparsify.backends.bench.measure import bench
from sparsify.backends.onnx.expand import expand
from sparsify.backends.onnx.running.runner import Runner
from sparsify.backends.packed.loaded.loading import load_model
from sparsify.backends.packed.unpack import unpack_folder
from sparsify.backends.verify.checkpoint import verify_checkpoint
from sparsify.backends.verify.onnx_folder import verify_onnx
from sparsify.errors import CheckpointError, SparsifyError
from sparsify.files.checkpoint import Checkpoint
from sparsify.files.manifest import MANIFEST, read_manifest
from sparsify.inspection.sites import inspect

NAME = "model.layers.0.mlp.down_proj.weight"
IDS = torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(0))
BACKENDS = {
    "hf": "hf",
    "packed": "packed:choice=smallest",
    "link": "onnx",
    "external": "onnx:weights=external",
    "onnx-packed": "onnx:weights=packed",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder that each backend writes, made once, with a tokenizer's file beside it; do not write to it."""
    root = tmp_path_factory.mktemp("made")
    save("llama", root / "dense")
    (root / "dense" / "chat_template.jinja").write_text("{{ messages }}")
    (root / "dense" / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')

    def get(name: str) -> Path:
        if not (root / name).exists():
            sparsify.compile(root / "dense", ["magnitude:2:4"], output=root / name, to=BACKENDS[name])
        return root / name

    return get


@pytest.fixture
def copy(made: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(made(name), tmp_path / name))


def flip(path: Path, at: int, bit: int = 1) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        value = file.read(1)[0]
        file.seek(at)
        file.write(bytes([value ^ bit]))


def flip_tensor(folder: Path, name: str = NAME) -> None:
    path, start, size = Checkpoint(folder).span(name)
    flip(path, start + size // 2)


def again(folder: Path, out: Path) -> object:
    return sparsify.compile(folder, ["magnitude:2:4"], only=["*.1.mlp.*"], output=out)


READERS: dict[str, dict[str, Callable[[Path, Path], object]]] = {
    "hf": {
        "compile again": again,
        "load": lambda folder, out: sparsify.load(folder),
        "weights in memory": lambda folder, out: sparsify.compile(folder, ["magnitude:2:4"]).model,
        "structural": lambda folder, out: sparsify.compile(folder, ["llm-pruner:50%,importance=l2"], output=out),
        "packed": lambda folder, out: sparsify.compile(folder, output=out, to=BACKENDS["packed"]),
        "onnx": lambda folder, out: sparsify.compile(folder, output=out, to="onnx"),
        "bench against": lambda folder, out: load_model(folder),
    },
    "packed": {
        "compile again": again,
        "load": lambda folder, out: sparsify.load(folder),
        "unpack": unpack_folder,
        "from_pretrained": lambda folder, out: transformers.LlamaForCausalLM.from_pretrained(folder),
        "bench": lambda folder, out: bench(folder, prompt=2, tokens=2, rounds=1),
    },
    "link": {"run": lambda folder, out: Runner(folder), "compile again": again},
    "external": {"run": lambda folder, out: Runner(folder)},
    "onnx-packed": {"run": lambda folder, out: Runner(folder), "expand": expand},
}
CASES = [(kind, reader) for kind, readers in READERS.items() for reader in readers]


def refuses(kind: str, reader: str, folder: Path, *names: str) -> None:
    """It says which of ``names`` differs, and leaves nothing."""
    out = folder.parent / "out"
    with pytest.raises(SparsifyError) as caught:
        READERS[kind][reader](folder, out)
    assert any(name in str(caught.value) for name in names), str(caught.value)
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]


@pytest.mark.parametrize(("kind", "reader"), CASES)
def test_a_changed_tensor_is_named_and_nothing_is_written(kind: str, reader: str, copy: Callable[[str], Path]) -> None:
    folder = copy(kind)
    if (folder / "model.safetensors").exists():
        flip_tensor(folder)
        refuses(kind, reader, folder, NAME)
    else:
        flip(folder / "model.onnx.data", (folder / "model.onnx.data").stat().st_size // 2)
        refuses(kind, reader, folder, "model.onnx.data")


@pytest.mark.parametrize(("kind", "reader"), [case for case in CASES if case[0] in ("hf", "packed")])
@pytest.mark.parametrize("change", ["taken out", "put in"])
def test_a_tensor_too_few_or_too_many_is_named(
    kind: str, reader: str, change: str, copy: Callable[[str], Path]
) -> None:
    """Not only the file whose header says so."""
    folder, name = copy(kind), "model.norm.weight" if change == "taken out" else "model.other.weight"
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if change == "taken out":
        del tensors[name]
    else:
        tensors[name] = torch.ones(4)
    save_file(tensors, path, metadata=metadata)
    refuses(kind, reader, folder, f"tensor {name}")
    assert any(name in problem for problem in problems_of(folder))


@pytest.mark.parametrize(("kind", "reader"), CASES)
@pytest.mark.parametrize("file", ["config.json", "special_tokens_map.json", "chat_template.jinja", MANIFEST])
def test_a_changed_file_is_named_and_nothing_is_written(
    kind: str, reader: str, file: str, copy: Callable[[str], Path]
) -> None:
    folder = copy(kind)
    text = (folder / file).read_text()
    changes = {
        "config.json": ("1e-06", "1.0"),
        "special_tokens_map.json": ("/s", "s"),
        "chat_template.jinja": ("me", "he"),
        MANIFEST: ('"kept": 0.5', '"kept": 0.7'),
    }
    old, new = changes[file]
    assert old in text
    (folder / file).write_text(text.replace(old, new, 1))
    refuses(kind, reader, folder, file)


@pytest.mark.parametrize(("kind", "reader"), CASES)
def test_every_file_beside_the_weights_is_checked(kind: str, reader: str, copy: Callable[[str], Path]) -> None:
    """Also those that the reader itself has no use for, and that its output does not carry."""
    folder = copy(kind)
    beside = [p for p in sorted(folder.iterdir()) if p.suffix in (".json", ".jinja") and p.name != MANIFEST]
    assert {"config.json", "chat_template.jinja"} <= {p.name for p in beside}
    assert (kind in ("link", "external", "onnx-packed")) == ((folder / "genai_config.json") in beside)
    for path in beside:
        whole = path.read_bytes()
        path.write_bytes(whole + b" ")
        refuses(kind, reader, folder, path.name)
        path.write_bytes(whole)


def problems_of(folder: Path) -> list[str]:
    if list(folder.glob("*.onnx")):
        return verify_onnx(folder, run=False).problems
    return verify_checkpoint(folder).problems


@pytest.mark.first(2)
@pytest.mark.parametrize("kind", BACKENDS)
def test_verify_sees_any_bit_of_any_file(kind: str, copy: Callable[[str], Path]) -> None:
    """Seeded places in every file, the manifest too; only the padding of JSON and of data files says nothing."""
    folder, draw = copy(kind), random.Random(kind)
    assert problems_of(folder) == []
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for _ in range(3):
            at = draw.choice([i for i, byte in enumerate(whole) if byte not in b" \n\0"] or [0])
            flip(path, at, 1 << draw.randrange(8))
            try:
                found = problems_of(folder)
            except SparsifyError as error:
                found = [str(error)]
            assert found, (path.name, at)
            path.write_bytes(whole)
    assert problems_of(folder) == []


@pytest.mark.parametrize("kind", BACKENDS)
def test_every_file_and_tensor_is_listed(kind: str, made: Callable[[str], Path]) -> None:
    folder = made(kind)
    digests = read_manifest(folder)["digests"]
    listed = digests["files"].keys() | digests["headers"].keys()
    assert listed == {path.name for path in folder.iterdir()} - {MANIFEST}
    assert digests["algorithm"] == "blake2b-256" and NAME in digests["tensors"]


@pytest.mark.parametrize("kind", ["hf", "packed", "link"])
def test_verify_names_what_the_manifest_does_not_know_and_what_is_gone(kind: str, copy: Callable[[str], Path]) -> None:
    folder = copy(kind)
    (folder / "modeling_new.py").write_text("")
    (folder / "special_tokens_map.json").unlink()
    verify = verify_checkpoint if kind != "link" else verify_onnx
    result = verify(folder)
    assert any(line.startswith("modeling_new.py: not in sparsify.json") for line in result.unchecked)
    assert result.problems == ["special_tokens_map.json: sparsify.json names it, and it is not here"]


def test_a_header_that_says_another_dtype_is_seen(copy: Callable[[str], Path]) -> None:
    """The tensors' bytes are those that were written; what they mean is not."""
    folder = copy("hf")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"', 1))
    refuses("hf", "compile again", folder, "model.safetensors")
    assert any("header" in problem for problem in problems_of(folder))


def test_weights_that_the_manifest_does_not_know(copy: Callable[[str], Path]) -> None:
    folder = copy("hf")
    content = (folder / "model.safetensors").read_bytes()
    names = list(Checkpoint(folder).names())
    (folder / "model.safetensors").unlink()
    (folder / "other.safetensors").write_bytes(content)
    index = {"weight_map": dict.fromkeys(names, "other.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refuses("hf", "compile again", folder, "model.safetensors.index.json")


@pytest.mark.slow
def test_a_folder_of_format_1_is_checked_by_what_it_has(copy: Callable[[str], Path], tmp_path: Path) -> None:
    for kind in ("hf", "packed"):
        folder = copy(kind)
        as_format_1(folder)
        again(folder, tmp_path / "out")
        assert read_manifest(tmp_path / "out")["source_check"] == "crc-32"
        assert read_manifest(tmp_path / "out")["format"] == 2 and "checksums" not in read_manifest(tmp_path / "out")
        result = verify_checkpoint(folder)
        assert result.sound and any("format 1" in line for line in result.unchecked)
        shutil.rmtree(tmp_path / "out")
        flip_tensor(folder)
        for reader in READERS[kind]:
            refuses(kind, reader, folder, NAME)
        assert any(NAME in problem for problem in problems_of(folder))
        shutil.rmtree(folder)


def test_what_is_not_to_be_checked_is_taken_as_it_is_and_said(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder, out = copy("hf"), tmp_path / "out"
    again(folder, out)
    assert read_manifest(out)["source_check"] == "blake2b-256"
    flip_tensor(folder, "model.norm.weight")
    sparsify.compile(folder, ["magnitude:2:4"], output=out, overwrite=True, check=False)
    assert read_manifest(out)["source_check"] == "skipped" and problems_of(out) == []
    sparsify.load(folder, check=False)
    packed = copy("packed")
    flip_tensor(packed, "model.norm.weight")
    assert read_manifest(unpack_folder(packed, tmp_path / "dense", check=False))["source_check"] == "skipped"
    config = transformers.AutoConfig.from_pretrained(packed)
    config.quantization_config["check"] = False
    model = transformers.LlamaForCausalLM.from_pretrained(packed, config=config)
    model.save_pretrained(tmp_path / "saved")
    assert "check" not in json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    graph = copy("onnx-packed")
    (graph / "chat_template.jinja").write_text("other")
    Runner(graph, check=False)
    assert read_manifest(expand(graph, tmp_path / "wide", check=False))["source_check"] == "skipped"


def test_the_command_line(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("packed")
    flip_tensor(folder, "model.norm.weight")
    words = ["unpack", str(folder), "-o", str(tmp_path / "dense")]
    done = run(*words)
    assert done.returncode == 1 and "model.norm.weight" in done.stderr and "--no-check" in done.stderr
    assert not (tmp_path / "dense").exists()
    assert run(*words, "--no-check").returncode == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.update(format=3), "newer sparsify"),
        (lambda m: m.update(format="2"), "format '2'"),
        (lambda m: m.pop("digests"), "no digests"),
        (lambda m: m["digests"].update(tensors=5), "digests that are none"),
        (lambda m: m["digests"].update(algorithm="md5"), "digests by 'md5'"),
        (lambda m: (m.pop("digests"), m.update(format=1, checksums={"a": "b"})), "no numbers"),
    ],
)
def test_a_manifest_of_another_form(change: Callable[[Any], object], says: str, copy: Callable[[str], Path]) -> None:
    folder = copy("hf")
    edit_manifest(folder, change)
    refuses("hf", "load", folder, says)


def test_inspecting_reads_no_weight_and_still_sees_a_config_that_changed(copy: Callable[[str], Path]) -> None:
    folder = copy("hf")
    flip_tensor(folder)
    inspect(folder)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("1e-06", "1.0"))
    with pytest.raises(CheckpointError, match=r"file config\.json"):
        inspect(folder)
    inspect(folder, check=False)
