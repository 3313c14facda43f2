"""Top-1 and top-5 of an image classifier on folders of pictures, one for each class."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify.context import Context, Progress
from sparsify.data.pictures.images import find_images, image_processor, pixels_of
from sparsify.errors import CalibrationError, TraceError, first_line
from sparsify.files.reading import kind_at
from sparsify.frontend.source import Source
from sparsify.host import is_out_of_memory, within_memory
from sparsify.precision import exact_products
from sparsify.quality.evaluation import Evaluation, of_scores
from sparsify.quality.graphs import Graph
from sparsify.quality.pictures.classes import match_classes
from sparsify.quality.running import running_module
from sparsify.quality.scores import Score, mean_and_error

TOP = 5
# Logits of a batch of pixels [pictures, channels, height, width].
Namer = Callable[[Tensor], Tensor]


def takes_pictures(model: Source | Graph) -> bool:
    """Whether pictures alone go into it."""
    if isinstance(model, Source):
        return getattr(model.module, "main_input_name", None) == "pixel_values"
    return "pixel_values" in model.inputs and "input_ids" not in model.inputs


def is_folder(data: Any) -> bool:
    """Whether pictures may be meant: a folder that is there."""
    return isinstance(data, (str, Path)) and kind_at(data) == "folder"


@exact_products()
def on_pictures(model: Source | Graph, data: Any, context: Context, limit: int | None, batch_size: int) -> Evaluation:
    """``model`` on the pictures in the folder ``data``, DATA/<class>/<picture>; several processes share them, and each
    is given the whole.

    Args:
        limit: so many of them, spread over all classes. batch_size: of them at a time.

    Raises:
        CalibrationError: no such folder, no pictures, a broken one, or classes that the model has not.
        TraceError: a model that gives no logits of classes.
    """
    started = time.perf_counter()
    if not is_folder(data):
        raise CalibrationError(
            f"data for {model.name}, which names pictures",
            found=f"'{data}', which is no folder" if isinstance(data, (str, Path)) else f"a {type(data).__name__}",
            do="Give a folder with one folder of pictures for each class: IMAGES/<class>/<picture>",
        )
    folder = Path(data).expanduser().absolute()
    pictures = _pictures(folder)
    config = model.config if isinstance(model, Source) else model.config()
    classes, note = match_classes(sorted({path.parent.name for path in pictures}), config, str(folder))
    chosen = _spread(pictures, limit)
    digest = hashlib.sha256("\n".join(str(path.relative_to(folder)) for path in chosen).encode()).hexdigest()
    context.world.agree({"pictures": digest})
    processor = image_processor(_Owner.of(model))
    name, dtype = _namer(model, context.device)
    ranks: list[int] = []
    count = 0
    with within_memory(f"naming pictures with {model.name}", context.device, "Take --batch-size 1, or --device cpu"):
        # Whole batches are dealt out, so that each is that of one process.
        world, batches = context.world, list(_batches(chosen, 1 if name is None else batch_size))
        own = batches[slice(*world.bounds(len(batches)))]
        for batch in own:
            world.says(f"naming {len(chosen)} pictures")
            context.observe(Progress("naming pictures", len(ranks), sum(map(len, own))))
            pixels = _stacked([pixels_of(path, processor) for path in batch], folder)
            logits = _logits(model, name, pixels.to(dtype), context.device)
            count = logits.shape[1]
            wanted = torch.tensor([classes[path.parent.name] for path in batch])
            if int(wanted.max()) >= count:
                raise TraceError(
                    f"naming pictures with {model.name}",
                    found=f"{count} logits for class {int(wanted.max())}",
                    do="Its config.json names classes that it does not have: mend id2label",
                )
            right = logits.gather(1, wanted[:, None])
            # Of equal logits none is the right one's merit: those of lower numbers go before, as in argmax.
            before = (logits > right) | ((logits == right) & (torch.arange(count) < wanted[:, None]))
            ranks += before.sum(1).tolist()
        said = world.told([count, ranks])
        count, ranks = max(own_count for own_count, _ in said), [rank for _, of in said for rank in of]
        context.observe(Progress("naming pictures", len(ranks), len(chosen)))
    notes = [] if note is None else [note]
    kinds = [1, TOP]
    if count <= TOP:
        kinds = [1]
        notes.append(f"top-{TOP} is left out: the model has {count} classes")
    if len(chosen) < len(pictures):
        notes.append(f"{len(chosen)} of {len(pictures)} pictures, spread over all classes")
    scores = [_score(folder.name, top, ranks, count, digest) for top in kinds]
    return of_scores(scores, time.perf_counter() - started, notes)


class _Owner:
    """Whose image processor is asked for."""

    def __init__(self, name: str, folder: Path | None, trust_remote_code: bool) -> None:
        self.name, self.folder, self.trust_remote_code = name, folder, trust_remote_code

    @classmethod
    def of(cls, model: Source | Graph) -> _Owner:
        return cls(model.name, model.folder, isinstance(model, Source) and model.trust_remote_code)


def _pictures(folder: Path) -> list[Path]:
    asked = f"data '{folder}'"
    found = find_images(folder, asked)
    if not found:
        raise CalibrationError(
            asked, found="no picture in this folder or below it", do="Name a folder with one folder for each class"
        )
    if outside := [path for path in found if path.parent == folder]:
        raise CalibrationError(
            asked,
            found=f"{outside[0].name}, which lies in no folder of a class",
            do="Lay each picture into a folder named by its class: IMAGES/<class>/<picture>",
        )
    return found


def _spread(pictures: Sequence[Path], limit: int | None) -> list[Path]:
    """``limit`` of them at equal distances, so that every folder has its share."""
    if limit is None or limit >= len(pictures):
        return list(pictures)
    return [pictures[number * len(pictures) // limit] for number in range(limit)]


def _batches(pictures: Sequence[Path], size: int) -> Iterator[Sequence[Path]]:
    return (pictures[at : at + size] for at in range(0, len(pictures), size))


def _stacked(pixels: list[Tensor], folder: Path) -> Tensor:
    if len(shapes := {tuple(one.shape) for one in pixels}) > 1:
        raise CalibrationError(
            f"data '{folder}'",
            found=f"pictures that the model's processor leaves at sizes {sorted(shapes)[:3]}",
            do="Resize them to one size, or take --batch-size 1",
        )
    return torch.stack(pixels)


def _namer(model: Source | Graph, device: torch.device) -> tuple[Any, torch.dtype]:
    """The module of torch, None for a graph; and what dtype pixels are given in."""
    if isinstance(model, Source):
        return running_module(model, device), model.dtype
    return None, torch.float32


def _logits(model: Source | Graph, module: Any, pixels: Tensor, device: torch.device) -> Tensor:
    if not isinstance(model, Source):
        logits = model.logits({"pixel_values": pixels})
    else:
        try:
            with torch.no_grad():
                logits = module(pixel_values=pixels.to(device)).logits.float().cpu()
        except Exception as error:  # a model's own code
            if is_out_of_memory(error):
                raise
            raise TraceError(
                f"naming pictures with {model.name}",
                found=f"{type(model.module).__name__} gives no logits ({type(error).__name__}: {first_line(error)})",
                do="Give an image classifier",
            ) from error
    if logits.dim() != 2 or not bool(logits.isfinite().all()):
        found = f"logits of shape {list(logits.shape)}" if logits.dim() != 2 else "logits that are NaN or infinite"
        raise TraceError(f"naming pictures with {model.name}", found=found, do="Give an image classifier that works")
    return logits


def _score(folder: str, top: int, ranks: Iterable[int], count: int, digest: str) -> Score:
    samples = tuple(float(rank < top) for rank in ranks)
    value, error = mean_and_error(samples)
    return Score(
        task=folder,
        metric=f"top-{top}",
        value=value,
        standard_error=error,
        n=len(samples),
        share=True,
        chance=top / count,
        unit="picture",
        samples=samples,
        sha256=digest,
    )
