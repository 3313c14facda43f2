"""Folders of images as calibration data."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import sparsify
from sparsify.data.batches import load_calibration
from sparsify.errors import CalibrationError
from sparsify.frontend.source import open_source


@pytest.fixture
def vit(folder: Callable[[str], Path], tmp_path: Path) -> Path:
    path = tmp_path / "vit"
    shutil.copytree(folder("vit"), path)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(path)
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for label in ("0", "1"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(5):
            pixels = random.integers(0, 255, (40 + i, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{i}.png")
    return tmp_path / "images"


def test_images_go_through_the_models_processor(vit: Path, images: Path) -> None:
    data = load_calibration(str(images), open_source(vit), samples=10)
    pixels = torch.cat([batch["pixel_values"] for batch in data.batches])
    processor = AutoImageProcessor.from_pretrained(vit)
    paths = sorted(images.rglob("*.png"))
    expected = processor([Image.open(p) for p in paths], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, expected)
    assert data.labels is not None and torch.cat(data.labels).tolist() == [0] * 5 + [1] * 5
    assert data.size == "10 samples" and "with labels" in data.label


@pytest.mark.parametrize("spec", ["wanda:2:4", "gblm:2:4", "twin:2:4"])
def test_a_vision_model_from_its_folder(vit: Path, images: Path, tmp_path: Path, spec: str) -> None:
    result = sparsify.compile(vit, [spec], calibration=str(images), samples=6, output=tmp_path / "out")
    assert result.runs[0].kept == 0.5
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    weight = model.get_parameter(result.runs[0].targets[0].parameter)
    assert int((weight != 0).view(-1, 4).sum(dim=1).max()) == 2
    assert AutoImageProcessor.from_pretrained(tmp_path / "out") is not None


def test_labels_change_gblms_gradients(vit: Path, images: Path) -> None:
    source = open_source(vit)
    one = load_calibration(str(images), source, rows=1)
    (images / "1").rename(images / "dog")
    other = load_calibration(str(images), source, rows=1)
    assert len(one.batches) == 10 and one.labels is not None and other.labels is None


@pytest.mark.parametrize("broken", ["empty", "not an image", "no processor"])
def test_broken_folders(vit: Path, images: Path, tmp_path: Path, broken: str) -> None:
    if broken == "empty":
        images = tmp_path / "none"
        images.mkdir()
    elif broken == "not an image":
        (images / "0" / "0.png").write_bytes(b"GIF89a nonsense")
    else:
        (vit / "preprocessor_config.json").unlink()
    match = {"empty": "no image", "not an image": "0.png", "no processor": "preprocessor_config"}[broken]
    with pytest.raises(CalibrationError, match=match):
        load_calibration(str(images), open_source(vit))
