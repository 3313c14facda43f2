"""``README.md`` of an output: what it says is so, whoever named the files."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from support.families import save
from support.folders import SMALLEST

import sparsify
from sparsify.backends.onnx.expand import expand
from sparsify.backends.packed.unpack import unpack_folder
from sparsify.files.ledger import Ledger
from sparsify.frontend.source import open_source
from sparsify.provenance.card import write_card
from sparsify.provenance.dense_card import kept_header
from sparsify.provenance.markdown import code
from sparsify.tensors import digest_of_span

HEADER = """\
license: other
license_name: llama9
license_link: LICENSE
language:
- en
- no
pipeline_tag: text-generation
datasets: [secret]
model-index:
- name: x
"""
DENSE = f"---\n{HEADER}---\n# Llama\nPerplexity 5.68!\n"


def head(folder: Path) -> dict[str, Any]:
    """The header as the hub reads it."""
    found: dict[str, Any] = ModelCard((folder / "README.md").read_text()).data.to_dict()
    return found


def text(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a card."""
    folder = save("llama", tmp_path_factory.mktemp("dense") / "llama9-8b")
    (folder / "README.md").write_text(DENSE)
    return folder


def test_what_a_card_says(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = sparsify.compile(dense, "wanda:2:4", calibration="random", samples=2, sequence_length=16, output=out)
    assert head(out) == {
        "base_model": "llama9-8b", "library_name": "transformers", "tags": ["sparsify", "pruned", "2:4"],
        "license": "other", "license_name": "llama9", "license_link": "LICENSE", "language": ["en", "no"],
        "pipeline_tag": "text-generation",
    }  # fmt: skip
    said, (run,), data = text(out), made.runs, made.manifest["calibration"]["data"]
    errors = [site.error for site in run.sites if site.error is not None]
    assert f"| 1 | `wanda:2:4` | {len(run.sites)} | 50.00% | {sum(errors) / len(errors):.4f} | `{data}` |" in said
    whole = made.manifest["history"][0]["whole"]
    assert f"In all {whole['kept']:.2%} of the model's {whole['numbers']:,} numbers are not zero." in said
    for skipped in run.skipped:
        assert f"| `{skipped.reason}` | " in said
    assert "What it lost in quality was not measured" in said and "5.68" not in said
    assert (
        f"sparsify compile {dense} --pass wanda:2:4 --calibration random --samples 2 --sequence-length 16 -o OUT"
        in said
    )


def test_the_card_of_the_dense_model_stays_beside_it(dense: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    sparsify.compile(dense, "magnitude:2:4", output=one)
    sparsify.compile(one, "magnitude:75%", output=two, to=SMALLEST)
    unpack_folder(two, tmp_path / "three")
    for out in (one, two, tmp_path / "three"):
        assert (out / "README.dense.md").read_text() == DENSE, "the first of all, and not ours of the step before"
        assert "[Its own card](README.dense.md)" in text(out)
        assert head(out)["license"] == "other" and head(out)["base_model"] == "llama9-8b"
        files = Ledger.of(out).files
        assert {name: files[name] for name in ("README.md", "README.dense.md")} == {
            name: digest_of_span(out / name) for name in ("README.md", "README.dense.md")
        }
        assert {p.name for p in out.iterdir() if p.name.startswith("README")} == {"README.md", "README.dense.md"}
    assert "| 2 | `magnitude:75%` |" in text(two) and "import sparsify" in text(two)
    assert "| 3 | `unpack` |" in text(tmp_path / "three") and "import sparsify" not in text(tmp_path / "three")


def test_a_model_without_a_card(folder: Callable[[str], Path], tmp_path: Path) -> None:
    sparsify.compile(folder("llama"), "magnitude:2:4", output=tmp_path / "out")
    assert head(tmp_path / "out").keys() == {"base_model", "library_name", "tags"}
    assert "Its own card" not in text(tmp_path / "out") and not (tmp_path / "out" / "README.dense.md").exists()
    sparsify.compile(tmp_path / "out", "magnitude:75%", output=tmp_path / "more")
    assert not (tmp_path / "more" / "README.dense.md").exists(), "ours is no dense model's"


def test_a_file_of_the_name_that_the_dense_card_gets_is_kept(tmp_path: Path) -> None:
    dense = save("llama", tmp_path / "dense")
    (dense / "README.md").write_text(DENSE)
    (dense / "README.dense.md").write_text("mine")
    for number, model in enumerate((dense, tmp_path / "0")):
        out = tmp_path / str(number)
        sparsify.compile(model, "magnitude:2:4", output=out)
        assert (out / "README.dense.md").read_text() == "mine" and (out / "README.dense-2.md").read_text() == DENSE
        assert "[Its own card](README.dense-2.md)" in text(out) and head(out)["license"] == "other"


def snippet(folder: Path) -> str:
    """The first Python of the card, with the folder in its place."""
    found = re.search(r"```python\n(.*?)```", text(folder), flags=re.S)
    assert found is not None
    return found[1].replace("FOLDER", str(folder))


FORMS = {
    "hf": ("transformers", {"sparsify", "pruned", "2:4"}),
    "packed:choice=smallest": ("transformers", {"sparsify", "pruned", "2:4", "packed"}),
    "onnx:weights=link": ("onnx", {"sparsify", "pruned", "2:4", "onnx"}),
    "onnx:weights=packed": ("onnx", {"sparsify", "pruned", "2:4", "onnx"}),
}


@pytest.mark.parametrize("to", FORMS)
def test_every_form_is_loaded_as_its_card_says(to: str, dense: Path, tmp_path: Path) -> None:
    sparsify.compile(dense, "magnitude:2:4", output=tmp_path / "out", to=to)
    library, tags = FORMS[to]
    assert head(tmp_path / "out")["library_name"] == library and set(head(tmp_path / "out")["tags"]) == tags
    scope: dict[str, Any] = {}
    exec(snippet(tmp_path / "out"), scope)
    if library == "onnx":
        assert scope["session"].get_inputs()[0].name == "input_ids"
        assert ("transformers loads those" in text(tmp_path / "out")) == (to == "onnx:weights=link")
    else:
        assert int((scope["model"].get_parameter("model.norm.weight") != 0).sum()) > 0


def test_folders_for_gpus_say_so(tmp_path: Path) -> None:
    dense = save("llama", tmp_path / "dense", hidden_size=64, intermediate_size=128)
    made = sparsify.compile(dense, "magnitude:2:4", output=tmp_path / "out", to="cuda:tune=false")
    assert "packed" in made.manifest and 'device_map="cuda"' in snippet(tmp_path / "out")


def test_ragged_models_and_modules(folder: Callable[[str], Path], tmp_path: Path) -> None:
    sparsify.compile(folder("llama"), "llm-pruner:50%,importance=l1,scope=global", output=tmp_path / "out")
    assert head(tmp_path / "out")["library_name"] == "sparsify"
    scope: dict[str, Any] = {}
    exec(snippet(tmp_path / "out"), scope)
    assert isinstance(scope["model"], torch.nn.Module)
    net = torch.nn.Sequential(torch.nn.Linear(8, 8))
    sparsify.compile(net, "magnitude:2:4", calibration=[torch.randn(4, 8)], output=tmp_path / "net")
    exec(snippet(tmp_path / "net"), scope)
    assert scope["state"].keys() == {"0.weight", "0.bias"} and "no command line" in text(tmp_path / "net")


def test_graphs_and_wide_graphs(dense: Path, tmp_path: Path) -> None:
    sparsify.compile(dense, "magnitude:2:4", output=tmp_path / "packed", to="onnx:weights=packed")
    expand(tmp_path / "packed", tmp_path / "wide")
    assert "sparsify expand FOLDER" in text(tmp_path / "packed")
    assert "transformers loads those" in text(tmp_path / "wide") and "| 2 | `expand` |" in text(tmp_path / "wide")
    assert head(tmp_path / "wide")["license"] == "other"


# Names are whatever a file system and a manifest hold.
NAMES = [
    "a|b", "](http://evil)", "<script>alert(1)</script>", "`", "``x", "x`", " ", "", "a\n# b", "---", "\x1b[31m",
    "\u202egnp",
    "!!python/object/apply:os.system [id]", "key: [", "'\"", "#", "*", "- x", "{{7*7}}", "null", "no", "é" * 500,
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_make_no_markup(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["import os; x"]}')
    passes = [{"spec": name, "pruned": 1, "left": 0.5, "error": 0.1}]
    run = {
        "command": "compile", "source": {"name": name}, "passes": passes, "data": name, "validation": name,
        "perplexity": [1.0, float("nan")], "recipe": {"model": name, "passes": [name], name or "x": name},
        "versions": {name: name},
    }  # fmt: skip
    sites = [{"pattern": name}]
    skipped = {"spec": name, "sites": sites, "skipped": [{"name": name, "reason": name}] * 5}
    write_card(tmp_path, {"history": [run], "passes": [skipped], "search": {
        "data": name, "dense_perplexity": 1.0, "perplexity": 2.0}, "evaluation": {
        "data": name, "windows": 1, "sequence_length": 2, "dense": 1.0, "pruned": 2.0, "verdict": name}})  # fmt: skip
    said = text(tmp_path)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202a-\u202e]", said)
    header, body = said.split("\n---\n", 1)
    data = yaml.safe_load(header.removeprefix("---\n"))
    assert ModelCard(said).data.to_dict() == data and set(data) <= {"base_model", "library_name", "tags"}
    assert all(isinstance(tag, str) for tag in data["tags"])
    # Outside code there are our own words alone: the same card of a tame name has the same.
    assert outside(body) == outside(body.replace(code(name), "`tame`").replace(code(name, cell=True), "`tame`"))
    assert "<script" not in outside(body) and "evil" not in outside(body) and "alert" not in outside(body)
    for table in re.findall(r"(?:^\|.*\n)+", body, flags=re.M):
        rows = table.splitlines()
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1, "no cell more, none less"


def outside(body: str) -> str:
    """Markdown without its code: fences first, then spans of as many backticks as they begin with."""
    body = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", body, flags=re.S | re.M)
    return re.sub(r"(?<!`)(`+)(?!`)(.*?)(?<!`)\1(?!`)", "", body)


CARDS = {
    "no header": (b"# Llama\n", {}),
    "another": (b"---\nlicense: mit\nlanguage: no\n---\n", {"license": "mit", "language": "no"}),
    "windows": (b"\xef\xbb\xbf---\r\nlicense: mit\r\n---\r\nx", {"license": "mit"}),
    "not closed": (b"---\nlicense: mit\n", {}),
    "no YAML": (b"---\nlicense: [\n---\n", {}),
    "a list": (b"---\n- mit\n---\n", {}),
    "an object": (b"---\nlicense: !!python/object/apply:os.system [id]\n---\n", {"license": ["id"]}),
    "deep": (b"---\nlicense: " + b"[" * 5000 + b"\n---\n", {}),
    "a table": (b"---\nlicense: {a: b}\nlanguage: [[en]]\n---\n", {}),
    "controls": (b'---\nlicense: "a\\nb"\nlanguage: ["\\e[0m"]\n---\n', {}),
    "endless": (b"---\nlicense: " + b"a" * 400 + b"\n---\n", {}),
    "huge": (b"---\n" + b"# \n" * 50000 + b"license: mit\n---\n", {}),
    "bytes": (b"---\nlicense: \xff\xfe\n---\n", {"license": "\ufffd\ufffd"}),
    "laughs": (b"---\na: &a [x]\nlanguage: " + b"*a" + b"\n---\n", {"language": ["x"]}),
    "our keys": (b"---\nbase_model: evil\ntags: [evil]\nlibrary_name: evil\nignore_metadata_errors: 1\n---\n", {}),
}


@pytest.mark.parametrize("name", CARDS)
def test_headers_of_dense_cards(name: str, tmp_path: Path) -> None:
    content, wanted = CARDS[name]
    (tmp_path / "README.md").write_bytes(content)
    assert kept_header(tmp_path / "README.md") == wanted
    write_card(tmp_path, {})
    assert (tmp_path / "README.dense.md").read_bytes() == content
    assert head(tmp_path).items() >= wanted.items() and "evil" not in text(tmp_path)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "", ".", "gone.md"])
def test_a_manifest_that_names_another_place_for_the_card(name: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "x").write_text("---\nlicense: stolen\n---\n")
    manifest: dict[str, Any] = {"card": {"dense": name}}
    write_card(tmp_path / "out", manifest)
    assert manifest["card"] == {"dense": None} and "license" not in head(tmp_path / "out")


def test_a_folder_in_the_place_of_the_card(tmp_path: Path) -> None:
    dense = save("llama", tmp_path / "dense")
    (dense / "README.md").mkdir()
    (dense / "README.md" / "a.txt").write_text("a")
    sparsify.compile(dense, "magnitude:2:4", output=tmp_path / "out")
    assert (tmp_path / "out" / "README.dense.md" / "a.txt").read_text() == "a"
    assert "Its own card" not in text(tmp_path / "out") and open_source(tmp_path / "out").checked == "blake2b-256"
