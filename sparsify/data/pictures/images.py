"""A folder of images as calibration batches, through the model's own image processor.

Images in sub-folders are labelled by them where every sub-folder's name is one of the model's labels, or all of them
are its class numbers; the labels serve losses (GBLM-Pruner) and are left out otherwise.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sparsify.errors import CalibrationError, first_line
from sparsify.files.reading import kind_at
from sparsify.frontend.source import Source

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"})
# Decoders that run: pillow has others, and the one for PostScript runs a program.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# Pixels of an image before it is made smaller, and of a side of what the model's processor makes of it.
MAX_PIXELS, MAX_SIDE = 1 << 26, 8192
# Entries of a folder and those below it that are looked at.
MAX_ENTRIES = 1 << 22


@dataclass(frozen=True)
class Images:
    """``pixels`` [images, channels, height, width]; ``labels`` [images] or None; ``note`` for the user."""

    pixels: Tensor
    labels: Tensor | None
    note: str


def read_images(folder: Path, source: Source, samples: int, seed: int) -> Images:
    """``samples`` images of ``folder`` and the folders below it, drawn without repetition; all if there are fewer.

    Raises:
        CalibrationError: no images, one that cannot be read, no processor, or images of several sizes.
    """
    found = find_images(folder, f"calibration '{folder}'")
    if not found:
        raise CalibrationError(
            f"calibration '{folder}'",
            found="no image in this folder or below it",
            do=f"Name a folder of images ({', '.join(sorted(SUFFIXES))})",
        )
    chosen = sorted(random.Random(seed).sample(found, min(samples, len(found))))
    labels = _labels(folder, found, chosen, source)
    processor = image_processor(source)
    pixels = [pixels_of(path, processor) for path in chosen]
    if len(shapes := {tuple(p.shape) for p in pixels}) > 1:
        raise CalibrationError(
            f"calibration '{folder}'",
            found=f"images that the model's processor leaves at sizes {sorted(shapes)[:3]}",
            do="Resize them to one size; one graph is traced for one shape",
        )
    kind = "with labels from their folders" if labels is not None else "without labels"
    return Images(
        torch.stack(pixels).to(source.dtype), labels, f"{len(chosen)} of {len(found)} images of {folder}, {kind}"
    )


def find_images(folder: Path, asked: str) -> list[Path]:
    """The images in ``folder`` and the folders below it, in the order of their paths.

    Raises:
        CalibrationError: more files than are looked at; ``asked``: what for.
    """
    found = []
    for count, path in enumerate(folder.rglob("*")):
        if count == MAX_ENTRIES:
            raise CalibrationError(
                asked,
                found=f"more than {MAX_ENTRIES} files and folders below it",
                do="Name a folder of images alone",
            )
        if path.suffix.lower() in SUFFIXES and kind_at(path) == "file":
            found.append(path)
    return sorted(found)


class Owner(Protocol):
    """A model beside which an image processor lies."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def folder(self) -> Path | None:
        """Where it lies."""

    @property
    def trust_remote_code(self) -> bool:
        """Whether code in that folder may run."""


def image_processor(source: Owner) -> Any:
    """The image processor of ``source``.

    Raises:
        CalibrationError: there is none that loads, or one of sizes past all bounds.
    """
    from transformers import AutoImageProcessor

    where = source.folder
    if where is None or not any((where / n).exists() for n in ("preprocessor_config.json", "processor_config.json")):
        raise CalibrationError(
            f"images for {source.name}",
            found="no preprocessor_config.json beside the model",
            do="Add the model's image processor to its folder, or give batches from Python",
        )
    try:
        made = AutoImageProcessor.from_pretrained(
            where, trust_remote_code=source.trust_remote_code, local_files_only=True
        )
    except Exception as error:  # its settings may be anything
        raise CalibrationError(
            f"the image processor of {source.name}",
            found=first_line(error),
            do="Mend it, or give batches from Python",
        ) from error
    check_sizes(made, source)
    return made


def check_sizes(made: Any, source: Owner) -> None:
    """Raises:
    CalibrationError: an image processor that makes images of more than ``MAX_SIDE`` pixels a side.
    """
    for key in ("size", "crop_size", "pad_size"):
        sizes = getattr(made, key, None) or {}
        for name, side in sizes.items() if isinstance(sizes, Mapping) else vars(sizes).items():
            if isinstance(side, (int, float)) and not side <= MAX_SIDE:
                raise CalibrationError(
                    f"the image processor of {source.name}",
                    found=f"{key} {name} {side}, more than {MAX_SIDE}",
                    do="Mend it, or give batches from Python",
                )


def open_image(path: Path) -> Any:
    """The image in a file, as pillow's in RGB.

    Raises:
        CalibrationError: no such file, no image, or one of more than ``MAX_PIXELS``.
    """
    if kind_at(path) != "file":
        raise CalibrationError(f"image {path}", found="no such file", do="Name one, relative to where it is named")
    try:
        from PIL import Image
    except ImportError as error:
        raise CalibrationError(f"image {path}", found="no pillow", do="pip install pillow") from error
    try:
        with Image.open(path, formats=_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise CalibrationError(
                    f"image {path}",
                    found=f"{image.width} × {image.height} pixels, more than {MAX_PIXELS}",
                    do="Remove it or make it smaller",
                )
            return image.convert("RGB")
    except CalibrationError:
        raise
    except Exception as error:  # pillow's decoders raise many kinds
        raise CalibrationError(f"image {path}", found=first_line(error), do="Mend or remove it") from error


def pixels_of(path: Path, processor: Any) -> Tensor:
    """What ``processor`` makes of the image in a file.

    Raises:
        CalibrationError: no image that it takes.
    """
    image = open_image(path)
    try:
        value: Tensor = processor([image], return_tensors="pt")["pixel_values"][0]
    except Exception as error:  # whatever a processor raises
        raise CalibrationError(f"image {path}", found=first_line(error), do="Mend or remove it") from error
    return value


def _labels(folder: Path, found: list[Path], chosen: list[Path], source: Source) -> Tensor | None:
    names = {path.parent.name for path in found}
    if any(path.parent == folder for path in found):
        return None
    known = {str(name): int(number) for name, number in (getattr(source.config, "label2id", None) or {}).items()}
    count = getattr(source.config, "num_labels", 0)
    if names <= known.keys():
        return torch.tensor([known[path.parent.name] for path in chosen])
    if all(name.isdigit() and int(name) < count for name in names):
        return torch.tensor([int(path.parent.name) for path in chosen])
    return None
