"""``sparsify report``: what a page says is what the manifest says, whatever names it holds and whatever lies there."""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from support.command_line import sparsify as command_line
from support.families import save
from support.folders import SMALLEST
from support.manifests import as_format_1, edit_manifest

import sparsify
from sparsify.errors import BackendError, CheckpointError
from sparsify.files.manifest import MANIFEST
from sparsify.words import format_bytes

WORDS: dict[str, Any] = {"calibration": "random", "samples": 2, "sequence_length": 16}
EVIL = "<script>alert('x')</script>&\"]]>\x1b[31m"


class Shown(HTMLParser):
    """What a browser makes of a page: its elements with their attributes, and the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.parts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.parts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.parts).split())

    def cells(self) -> list[str]:
        """What stands on every cell of a heat map."""
        return [
            own["title"] or "" for tag, own in self.elements if "cell" in (own.get("class") or "") and "title" in own
        ]


def shown(folder: Path, page: Path, **options: Any) -> Shown:
    return Shown(sparsify.report(folder, page, overwrite=True, **options).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned model, one kind of layer of which stayed dense."""
    root = tmp_path_factory.mktemp("report")
    sparsify.compile(save("llama", root / "dense"), "wanda:2:4", ignore="*.q_proj", output=root / "out", **WORDS)
    return root / "out"


def test_what_each_of_several_processes_did_is_told(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out, tmp_path / "two")
    ranks = [{"worked": 12.34, "waited": 1.5, "sent": 2048}, {"worked": 11.0, "waited": 2.5, "sent": 1024}]
    told = {"count": 2, "bytes": 3072, "tokens_per_second": 4321.0, "ranks": ranks}
    edit_manifest(tmp_path / "two", lambda manifest: manifest.update(processes=told))
    text = shown(tmp_path / "two", tmp_path / "r.html").text
    assert f"sent by 2 processes {format_bytes(3072)}" in text and "tokens a second, by all processes 4,321" in text
    assert f"0 12.3 s 1.5 s {format_bytes(2048)} 1 11.0 s 2.5 s {format_bytes(1024)}" in text


def test_a_page_says_what_the_manifest_says(out: Path, tmp_path: Path) -> None:
    page, manifest = shown(out, tmp_path / "r.html"), json.loads((out / MANIFEST).read_text())
    (run,), (own,) = manifest["history"], manifest["passes"]
    whole = run["whole"]
    assert f"Of the whole model's {whole['numbers']:,} numbers {1 - whole['kept']:.2%} are zero." in page.text
    assert f"wanda:2:4 kept 50.00% of {len(own['sites'])} weight matrices" in page.text
    cells = page.cells()
    for site in own["sites"]:
        block, kind = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", site["name"]).groups()  # type: ignore[union-attr]
        said = f"model.layers.{block} {kind}: kept 50.00% (2:4), error {site['error']:.4f}"
        assert cells.count(said) == 2, "once on each map"
        assert f"{site['error']:.4f}" in page.text, "and as text in the table"
    for skipped in own["skipped"]:
        assert skipped["name"] in page.text
    assert sum("not pruned: named by --ignore" in cell for cell in cells) == 4  # two blocks, two maps
    assert {run["date"], run["source"]["weights"], run["calibration"]["sha256"]} <= {*page.text.split()}
    for name, number in run["versions"].items():
        assert f"{name} {number}" in page.text
    assert "--ignore '*.q_proj'" in page.text and "not measured when it was written" in page.text
    assert "seconds" not in page.text and "training" not in page.text, "what nobody timed is not told"


def test_it_is_one_file_that_loads_and_runs_nothing(out: Path, tmp_path: Path) -> None:
    page = shown(out, tmp_path / "r.html")
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "a"}
    assert not [own for _, own in page.elements if {"src", "href", "onclick", "onload"} & own.keys()]
    assert "url(" not in (text := (tmp_path / "r.html").read_text()) and "@import" not in text
    policy = next(own["content"] for tag, own in page.elements if own.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'")


def test_the_same_folder_gives_the_same_bytes(out: Path, tmp_path: Path) -> None:
    pages = [sparsify.report(out, tmp_path / f"{n}.html").read_bytes() for n in range(2)]
    assert pages[0] == pages[1]


def everywhere(value: Any) -> Any:
    """``value`` with every text in it that says something of a model made an evil one."""
    if isinstance(value, dict):
        return {key: everywhere(each) for key, each in value.items()}
    if isinstance(value, list):
        return [everywhere(each) for each in value]
    return f"{value}{EVIL}" if isinstance(value, str) else value


def test_names_are_text_whatever_they_hold(out: Path, tmp_path: Path) -> None:
    import shutil

    evil = tmp_path / "<b>bold"
    shutil.copytree(out, evil)
    kept = ("digests", "format", "source_check")

    def change(manifest: dict[str, Any]) -> None:
        manifest |= {key: everywhere(value) for key, value in manifest.items() if key not in kept}
        manifest["evaluation"] = {"data": EVIL, "dense": 2.0, "pruned": 3.0, "verdict": EVIL, "windows": 1}
        manifest["passes"][0]["regions"] = [{"name": EVIL, "loss": EVIL, "before": 1.0, "after": 0.5, "rate": 0.1}]
        manifest["passes"][0]["options"] = {EVIL: EVIL}
        manifest["structure"] = [
            {
                "spec": EVIL,
                "ragged": True,
                "cuts": [{"kind": EVIL, "name": EVIL, "before": 3, "after": 2, "members": []}],
            }
        ]
        manifest["packed"] = {
            "sites": [{"name": EVIL, "layout": "dense", "reason": EVIL, "dense_bytes": 1, "bytes": 1}]
        }
        manifest["not_understood"] = [{"tensors": [EVIL], "reason": EVIL}]
        manifest["history"][0] |= {"training": {EVIL: EVIL}, "versions": {EVIL: EVIL}}

    edit_manifest(evil, change)
    page, harmless = shown(evil, tmp_path / "evil.html"), shown(out, tmp_path / "r.html")
    text = (tmp_path / "evil.html").read_text()
    assert "<script" not in text and "<b>bold" not in text and "\x1b" not in text
    assert {tag for tag, _ in page.elements} - {tag for tag, _ in harmless.elements} <= {"i"}, "bars, and nothing else"
    assert page.text.count("alert('x')") > 20 and html.escape("<script>") in text


def test_damaged_and_other_folders(out: Path, tmp_path: Path) -> None:
    import shutil

    for found, made in (("nothing there", None), ("no sparsify.json in it", out.parent / "dense")):
        with pytest.raises(CheckpointError, match=found) as raised:
            sparsify.report(made or tmp_path / "none", tmp_path / "r.html")
        assert made is None or "sparsify verify" in raised.value.do
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    manifest = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps(manifest | {"model": "another"}))
    with pytest.raises(CheckpointError, match="its content is not what was written"):
        sparsify.report(copy, tmp_path / "r.html")
    assert "another" not in shown(copy, tmp_path / "r.html", check=False).parts[0]
    damages: dict[str, Any] = {
        "error": ({"passes": [{"sites": [{**manifest["passes"][0]["sites"][0], "error": "x"}]}]}, "error is 'x'"),
        "skipped": ({"passes": [{"sites": [], "skipped": [{"name": 3, "reason": ""}]}]}, "name is 3"),
        "date": ({"history": [{"command": "compile", "date": 7}]}, "date is 7"),
        "not JSON": (None, "not JSON"),
        "newer": ({"format": 99}, "format 99"),
    }
    for content, found in damages.values():
        (copy / MANIFEST).write_text("{" if content is None else json.dumps(manifest | content))
        with pytest.raises(CheckpointError, match=re.escape(found)):
            sparsify.report(copy, tmp_path / "r.html")


def test_where_a_page_may_be_written(out: Path, tmp_path: Path) -> None:
    page = sparsify.report(out, tmp_path / "new" / "folder" / "r.html")
    with pytest.raises(BackendError, match="exists already"):
        sparsify.report(out, page)
    before = page.read_bytes()
    page.write_bytes(before[:2000])
    assert sparsify.report(out, page, overwrite=True).read_bytes() == before
    (mine := tmp_path / "mine.html").write_text("<p>my own page")
    (link := tmp_path / "link.html").symlink_to(page)
    for place, found in (
        (mine, "did not write"),
        (tmp_path, "a folder. Name a file in it"),
        (link, "a link"),
        (out / "r.html", "it lies in"),
    ):
        with pytest.raises(BackendError, match=found):
            sparsify.report(out, place, overwrite=True)
    assert mine.read_text() == "<p>my own page" and not (out / "r.html").exists()


def test_the_command(out: Path, tmp_path: Path) -> None:
    done = command_line("report", out, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == f"wrote {tmp_path / 'report.html'}\n", done.stderr
    assert command_line("report", out, cwd=tmp_path).returncode == 1
    done = command_line("report", out, "--overwrite", "--json", cwd=tmp_path)
    assert json.loads(done.stdout) == {"output": str(tmp_path / "report.html")}


@pytest.mark.slow
def test_folders_of_every_form(folder: Callable[[str], Path], tmp_path: Path) -> None:
    dense = folder("llama")
    made = {
        "packed": lambda out: sparsify.compile(dense, "magnitude:2:4", output=out, to=SMALLEST),
        "onnx": lambda out: sparsify.compile(dense, "magnitude:2:4", output=out, to="onnx"),
        "smaller": lambda out: sparsify.compile(dense, "llm-pruner:50%,widths=ragged", output=out, **WORDS),
        "dense": lambda out: sparsify.compile(dense, [], output=out, to="onnx"),
        "one": lambda out: sparsify.compile(dense, "magnitude:2:4", output=out),
        "twice": lambda out: sparsify.compile(tmp_path / "one", "magnitude:75%", output=out),
    }  # fmt: skip
    pages = {}
    for name, make in made.items():
        make(tmp_path / name)
        pages[name] = shown(tmp_path / name, tmp_path / f"{name}.html").text
    assert "The folder holds it packed." in pages["packed"] and "packed24" in pages["packed"]
    assert "The folder holds it as ONNX." in pages["onnx"]
    assert "Its layers differ in width" in pages["smaller"] and "What was taken out whole" in pages["smaller"]
    assert "Layer by layer" not in pages["smaller"] + pages["dense"]
    assert "Step 2, on the result" in pages["twice"] and "All is of step 2" in pages["twice"]
    assert "Step 2" not in pages["one"]
    as_format_1(tmp_path / "one")
    assert "magnitude:2:4" in shown(tmp_path / "one", tmp_path / "old.html").text


def test_figures_and_what_came_after(out: Path, tmp_path: Path) -> None:
    import shutil

    tuned = tmp_path / "tuned"
    shutil.copytree(out, tuned)

    def tune(manifest: dict[str, Any]) -> None:
        run = {"command": "tune", "source": {"name": "out"}, "data": "books", "validation": "more books"}
        manifest["history"].append({**run, "perplexity": [40.0, 30.0], "steps": 5, "passes": []})
        manifest["tuned"] = {"seconds": 61.5}

    edit_manifest(tuned, tune)
    page = shown(tuned, tmp_path / "t.html")
    assert "Step 2: the result was trained in 5 steps on books, its zeros held." in page.text
    assert "from 40.00 to 30.00 (tune, step 2), 0.750×" in page.text and "61.5 s" in page.text
    assert "They are from before the training that followed." in page.text
    no_number = {"data": "t", "windows": 1, "sequence_length": 8, "dense": 5.0, "pruned": None, "standard_error": None}
    edit_manifest(tuned, lambda manifest: manifest.update(evaluation={**no_number, "verdict": "predicts nothing"}))
    page = shown(tuned, tmp_path / "t.html")
    assert "from 5.00 to no number" in page.text and "predicts nothing" in page.text


def test_what_was_pruned_and_not_measured_is_not_called_dense(out: Path, tmp_path: Path) -> None:
    import shutil

    def legend(page: Shown) -> str:
        return page.text.partition("Relative error of outputs")[2].partition("Stronger colour")[0]

    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    assert "not pruned" in legend(page := shown(copy, tmp_path / "r.html")) and "not measured" not in legend(page)
    edit_manifest(copy, lambda manifest: manifest["passes"][0]["sites"][0].update(error=None))
    page = shown(copy, tmp_path / "r.html")
    classes = [own.get("class") for _, own in page.elements if "cell" in (own.get("class") or "") and "title" in own]
    assert classes.count("cell unknown") == 1 and classes.count("cell none") == 4
    assert sum(cell.endswith("kept 50.00% (2:4), error not measured") for cell in page.cells()) == 2
    assert "not pruned" in legend(page) and "not measured" in legend(page)
