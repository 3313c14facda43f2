"""Image classifiers on folders named by class: top-1 and top-5 against the slow way, classes, and what is refused."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from support.command_line import sparsify as command
from support.families import VISION, build
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import sparsify
from sparsify.errors import CalibrationError, TraceError
from sparsify.quality.pictures.classes import match_classes

LABELS = ("tench, Tinca tinca", "goldfish", "great white shark", "hammerhead", "electric_ray", "ray", "cock", "hen")


def classifier(folder: Path, labels: tuple[str, ...] = LABELS) -> Path:
    torch.manual_seed(0)
    named: dict[str, Any] = {"id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}}
    model = hf.ViTForImageClassification(hf.ViTConfig(**VISION, **named)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.dim() > 1 else 1)
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def pictures(folder: Path, names: tuple[str, ...], each: int = 5) -> Path:
    random = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir(parents=True)
        for number in range(each):
            pixels = random.integers(0, 255, (40 + number, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def slow_ranks(folder: Path, images: Path, classes: dict[str, int]) -> list[int]:
    """Of each picture the place of its class among the model's answers, one picture at a time."""
    model = hf.AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = hf.AutoImageProcessor.from_pretrained(folder)
    ranks = []
    for path in sorted(images.rglob("*.png")):
        with torch.no_grad():
            logits = model(**processor(Image.open(path), return_tensors="pt")).logits[0]
        ranks.append(logits.argsort(descending=True).tolist().index(classes[path.parent.name]))
    return ranks


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier(tmp_path_factory.mktemp("vit") / "vit")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("images") / "images", ("goldfish", "Tinca tinca", "electric ray", "hen"))


CLASSES = {"goldfish": 1, "Tinca tinca": 0, "electric ray": 4, "hen": 7}


def ranks(found: sparsify.Evaluation, images: Path) -> tuple[list[float], list[float]]:
    one, five = (found.score("images", metric) for metric in ("top-1", "top-5"))
    return list(one.samples), list(five.samples)


def test_top_1_and_top_5_are_those_of_the_slow_way(vit: Path, images: Path) -> None:
    found, slow = sparsify.evaluate(vit, images), slow_ranks(vit, images, CLASSES)
    assert 0 < sum(rank < 1 for rank in slow) < sum(rank < 5 for rank in slow) < len(slow) == 20
    assert ranks(found, images) == ([float(r < 1) for r in slow], [float(r < 5) for r in slow])
    score = found.score("images", "top-5")
    assert score.value == statistics.fmean(score.samples) and score.n == 20 and score.chance == 5 / 8
    assert score.standard_error == pytest.approx(statistics.stdev(score.samples) / math.sqrt(20), rel=1e-12)
    assert found.notes == () and math.isnan(found.perplexity)
    assert ranks(sparsify.evaluate(vit, images, batch_size=3), images) == ranks(found, images)


@pytest.mark.first(1)
@pytest.mark.slow
@pytest.mark.parametrize("to", ["hf", "packed:choice=smallest", "onnx"])
def test_every_kind_of_folder(vit: Path, images: Path, tmp_path: Path, to: str) -> None:
    sparsify.compile(vit, "magnitude:2:4", output=tmp_path / "hf")
    out = tmp_path / "hf" if to == "hf" else tmp_path / "out"
    if to != "hf":
        sparsify.compile(vit, "magnitude:2:4", output=out, to=to)
    slow = slow_ranks(tmp_path / "hf", images, CLASSES)
    assert slow != slow_ranks(vit, images, CLASSES)
    assert ranks(sparsify.evaluate(out, images), images) == ([float(r < 1) for r in slow], [float(r < 5) for r in slow])


def test_two_classifiers_at_the_command_line(vit: Path, images: Path, tmp_path: Path) -> None:
    sparsify.compile(vit, "magnitude:75%", output=tmp_path / "out")
    done = command("eval", vit, tmp_path / "out", "--data", images)
    assert done.returncode == 0, done.stderr
    assert "top-1" in done.stdout and "top-5" in done.stdout and "perplexity" not in done.stdout
    said = json.loads(command("eval", vit, tmp_path / "out", "--data", images, "--limit", 8, "--json").stdout)
    assert [row["scores"][0]["n"] for row in said] == [8, 8]
    assert said[1]["notes"] == ["8 of 20 pictures, spread over all classes"]
    assert said[1]["scores_against_the_first"][0]["verdict"]
    # Two of each of the four classes.
    found = sparsify.evaluate(vit, images, limit=8)
    every = sparsify.evaluate(vit, images).score("images", "top-5").samples
    assert found.score("images", "top-5").samples == tuple(every[n] for n in (0, 2, 5, 7, 10, 12, 15, 17))


def test_a_classifier_in_memory(vit: Path, images: Path) -> None:
    """It brings no image processor: the folder has it."""
    with pytest.raises(CalibrationError, match="no preprocessor_config"):
        sparsify.evaluate(hf.ViTForImageClassification.from_pretrained(vit), images)
    made = sparsify.compile(vit, "magnitude:2:4")
    assert sparsify.evaluate(made, images).scores != sparsify.evaluate(vit, images).scores


def test_five_classes_have_no_top_5(tmp_path: Path) -> None:
    model = classifier(tmp_path / "vit", LABELS[1:5])
    found = sparsify.evaluate(model, pictures(tmp_path / "images", ("goldfish", "hammerhead")))
    assert [score.metric for score in found.scores] == ["top-1"]
    assert found.notes == ("top-5 is left out: the model has 4 classes",)


def config(*labels: str) -> Any:
    return SimpleNamespace(id2label=dict(enumerate(labels)))


@pytest.mark.parametrize(
    ("labels", "names", "wanted"),
    [
        (LABELS, ["cock", "goldfish"], [6, 1]),
        (LABELS, ["Tench", "electric-ray", "GREAT_WHITE_SHARK"], [0, 4, 2]),
        (("n01440764 tench", "n01443537 goldfish"), ["n01443537", "tench"], [1, 0]),
        (("n01440764", "n01443537"), ["n01443537", "n01440764"], [1, 0]),
        (("LABEL_0", "LABEL_1", "LABEL_2"), ["LABEL_1", "LABEL_0"], [1, 0]),
        (("LABEL_0", "LABEL_1", "LABEL_2"), ["2", "00"], [2, 0]),
        # Labels that are numbers are labels first.
        (("3", "2", "1", "0"), ["0", "3"], [3, 0]),
        # A whole label before a part of another one.
        (("crane", "crane, bird", "cock"), ["crane"], [0]),
    ],
)
def test_folders_are_matched_to_classes(labels: tuple[str, ...], names: list[str], wanted: list[int]) -> None:
    assert match_classes(names, config(*labels), "images") == (dict(zip(names, wanted, strict=True)), None)


def test_folders_that_nothing_names_are_taken_in_order_and_it_is_said(tmp_path: Path) -> None:
    found, note = match_classes(["n03", "n01", "n02"], config("LABEL_0", "LABEL_1", "LABEL_2"), "images")
    assert found == {"n01": 0, "n02": 1, "n03": 2}
    assert note is not None and "named by none of the model's labels (LABEL_0, …)" in note and "order" in note
    model = classifier(tmp_path / "vit", LABELS)
    done = command("eval", model, "--data", pictures(tmp_path / "images", tuple("abcdefgh"), 1))
    assert done.returncode == 0 and "in the order of their names" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("labels", "names", "match"),
    [
        (LABELS, ["goldfish", "gold fsh"], r"class 'gold fsh' in images: none of the model's 8 labels\. .*goldfish"),
        (LABELS, ["a", "b", "c"], r"class 'a' in images: none of the model's 8 labels, nor 2 more"),
        (LABELS, ["1", "8"], "class '1' in images: none of"),
        (("crane, bird", "crane, machine"), ["crane"], r"class 'crane' .*: a name of 2 of .*, 0 and 1"),
    ],
)
def test_classes_that_are_refused(labels: tuple[str, ...], names: list[str], match: str) -> None:
    with pytest.raises(CalibrationError, match=match):
        match_classes(names, config(*labels), "images")


def _empty(images: Path) -> None:
    for path in images.rglob("*.png"):
        path.unlink()


def _broken(images: Path) -> None:
    (images / "hen" / "0.png").write_bytes(b"GIF89a nonsense")


def _outside(images: Path) -> None:
    (images / "hen" / "0.png").rename(images / "stray.png")


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (_empty, "data '.*': no picture in this folder"),
        (_broken, r"image .*hen/0\.png"),
        (_outside, r"stray\.png, which lies in no folder of a class"),
    ],
)
def test_broken_folders_of_pictures(vit: Path, tmp_path: Path, spoil: Callable[[Path], None], match: str) -> None:
    images = pictures(tmp_path / "images", ("hen",))
    spoil(images)
    with pytest.raises(CalibrationError, match=match):
        sparsify.evaluate(vit, images)


@pytest.mark.slow
def test_what_is_no_data_for_a_classifier(vit: Path, images: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a hen")
    for data in (text, "wikitext-2", [torch.zeros(1)]):
        with pytest.raises(CalibrationError, match="which names pictures"):
            sparsify.evaluate(vit, data)  # type: ignore[arg-type]
    with pytest.raises(TraceError, match=r"tasks for vit: .*ViTForImageClassification, which predicts no text"):
        sparsify.evaluate(vit, images, tasks="boolq")


def test_a_vision_model_that_names_no_classes(tmp_path: Path) -> None:
    hf.ViTModel(build("vit").config).save_pretrained(tmp_path / "vit")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    with pytest.raises(TraceError, match="ViTModel gives no logits"):
        sparsify.evaluate(tmp_path / "vit", pictures(tmp_path / "images", ("0", "1"), 1))
