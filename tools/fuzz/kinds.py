"""What is spoilt, and the command that meets it: one function a kind, from a generator to the words of a command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from commands import spoilt_words
from graphs import spoil_graph
from mutate import spoil_file, spoil_json_file, spoil_safetensors
from safetensors.torch import load_file, save_file
from support.manifests import reseal

_DRAWN = ("--samples", "2", "--sequence-length", "8", "--quiet")


@dataclass(frozen=True)
class Spoilt:
    """The words of a command about the folder ``model`` in the work folder.

    Attributes:
        sealed: the sound folder that it was, where every change of it has to be refused: it still holds digests.
    """

    words: Sequence[str]
    sealed: Path | None = None


# A function from (generator, sound folders, an empty folder) to what lies there then and a command.
Kind = Callable[[Random, Path, Path], Spoilt]


def checkpoints(random: Random, sound: Path, work: Path) -> Spoilt:
    """Weight files and indexes."""
    of, model = _copied(sound, work, random, "dense", "sharded", "hf", "wanda")
    target = random.choice(sorted(model.glob("*.safetensors*")))
    (spoil_json_file if target.suffix == ".json" else spoil_safetensors)(target, random)
    return _spoilt(of, model, random, _about(model, random, sound, work))


def packed(random: Random, sound: Path, work: Path) -> Spoilt:
    """Folders of ``--to packed``: any file of them."""
    of, model = _copied(sound, work, random, "packed24", "bitmask", "packed-experts")
    target = random.choice([p for p in sorted(model.iterdir()) if "tokenizer" not in p.name])
    {".safetensors": spoil_safetensors, ".json": spoil_json_file}.get(target.suffix, spoil_file)(target, random)
    unpack, verify = ("unpack", str(model), "-o", str(work / "out")), ("verify", str(model))
    return _spoilt(of, model, random, random.choice((unpack, verify, _about(model, random, sound, work))))


def jsons(random: Random, sound: Path, work: Path) -> Spoilt:
    """Every JSON file of a folder, and lines of calibration data."""
    of, model = _copied(
        sound, work, random, "dense", "sharded", "hf", "packed24", "smaller", "onnx-link", "onnx-packed"
    )
    data = work / "data.jsonl"
    shutil.copyfile(sound / "data.jsonl", data)
    target = random.choice([*sorted(model.glob("*.json")), data])
    if target == data:
        line = data.read_bytes().splitlines()[0]
        data.write_bytes(line)
        spoil_json_file(data, random)
        if data.exists():
            data.write_bytes(line + b"\n" + data.read_bytes().replace(b"\n", b" ") + b"\n" + line + b"\n")
    else:
        spoil_json_file(target, random)
    out = str(work / "out")
    if of.name.startswith("onnx"):
        words = random.choice(_about_graphs(model, out))
    elif target == data or "token" in target.name:
        pruned = ("compile", str(model), "--pass", "wanda:2:4", "--calibration", str(data), *_DRAWN, "-o", out)
        words = random.choice((pruned, ("eval", str(model), "--data", str(data), "--sequence-length", "8")))
    elif of.name == "packed24" and random.random() < 0.5:
        words = ("unpack", str(model), "-o", out)
    else:
        words = _about(model, random, sound, work)
    return _spoilt(of, model, random, words)


def graphs(random: Random, sound: Path, work: Path) -> Spoilt:
    """ONNX folders: the graph as a message and as bytes, and what lies beside it."""
    of, model = _copied(sound, work, random, "onnx-link", "onnx-external", "onnx-packed")
    beside = [p for p in sorted(model.iterdir()) if p.suffix in (".safetensors", ".data")]
    if beside and random.random() < 0.25:
        spoil_file(random.choice(beside), random)
    elif random.random() < 0.3:
        spoil_file(model / "model.onnx", random)
    else:
        spoil_graph(model / "model.onnx", random)
    return _spoilt(of, model, random, random.choice(_about_graphs(model, str(work / "out"))))


def words(random: Random, sound: Path, work: Path) -> Spoilt:
    """Command lines."""
    return Spoilt(spoilt_words(random, sound, work))


def sealed(random: Random, sound: Path, work: Path) -> Spoilt:
    """One byte or a few of any file of a folder that holds digests, and a command that reads all of it."""
    names = (
        "hf",
        "wanda",
        "smaller",
        "packed24",
        "bitmask",
        "packed-experts",
        "onnx-link",
        "onnx-external",
        "onnx-packed",
    )
    of, model = _copied(sound, work, random, *names)
    target = random.choice(sorted(model.iterdir()))
    content = bytearray(target.read_bytes())
    at = random.randrange(len(content))
    content[at : at + random.choice((1, 1, 4))] = random.randbytes(1)
    target.write_bytes(content)
    out = str(work / "out")
    if of.name.startswith("onnx"):
        words: Sequence[str] = random.choice(_about_graphs(model, out))
    elif "pack" in of.name or of.name == "bitmask":
        words = random.choice((("unpack", str(model), "-o", out), *_readers(model, sound, work)))
    else:
        words = random.choice(_readers(model, sound, work))
    return Spoilt(words, of if _differ(of, model) else None)


def poison(random: Random, sound: Path, work: Path) -> Spoilt:
    """NaN or infinity in one number of a folder that holds no digests, or digests that fit."""
    of, model = _copied(sound, work, random, "dense", "sharded", "hf", "packed24", "bitmask", "smaller")
    target = random.choice(sorted(model.glob("*.safetensors")))
    tensors = load_file(target)
    name = random.choice(sorted(n for n, t in tensors.items() if t.is_floating_point() and t.numel()))
    flat = tensors[name].view(-1)
    flat[random.randrange(len(flat))] = random.choice((float("nan"), float("inf"), -float("inf")))
    save_file(tensors, target, {"format": "pt"})
    if (model / "sparsify.json").exists():
        reseal(model)
    choices = [words for words in _readers(model, sound, work) if words[0] != "verify"]
    if of.name in ("packed24", "bitmask"):
        choices.append(("unpack", str(model), "-o", str(work / "out")))
    return Spoilt(random.choice(choices), of)


KINDS: dict[str, Kind] = {
    "checkpoints": checkpoints,
    "packed": packed,
    "json": jsons,
    "onnx": graphs,
    "words": words,
    "sealed": sealed,
    "poison": poison,
}


def _copied(sound: Path, work: Path, random: Random, *names: str) -> tuple[Path, Path]:
    """The sound folder, and its copy."""
    of, model = sound / random.choice(names), work / "model"
    shutil.copytree(of, model)
    return of, model


def _spoilt(of: Path, model: Path, random: Random, words: Sequence[str]) -> Spoilt:
    """As often as not behind the digests: taken out of the folder, or not asked for."""
    manifest = model / "sparsify.json"
    how = random.randrange(4)
    if how == 0 and words[0] != "verify":
        return Spoilt([*words, "--no-check"])
    if how == 1 and manifest.exists():
        try:
            content = json.loads(manifest.read_bytes())
            content = {name: value for name, value in content.items() if name != "digests"} | {"format": 1}
            manifest.write_text(json.dumps(content), encoding="utf-8")
        except (ValueError, AttributeError, RecursionError):
            pass
        return Spoilt(words)
    sealed = (of / "sparsify.json").exists() and words[0] != "inspect" and "--dry-run" not in words
    read = words[0] == "verify" or (model / "README.md").exists()
    return Spoilt(words, of if sealed and _differ(of, model, "" if read else "README.md") else None)


def _differ(one: Path, other: Path, without: str = "") -> bool:
    """Whether the folders hold other bytes; of a manifest, which says its own digest, what it says counts.

    Args:
        without: a file that only ``verify`` misses where it was deleted, because nothing is loaded from it.
    """
    names = {p.name for folder in (one, other) for p in folder.iterdir()} - {without}
    return any(_content(one / name) != _content(other / name) for name in names)


def _content(path: Path) -> object:
    if not path.exists():
        return None
    content = path.read_bytes()
    if path.name == "sparsify.json":
        try:
            return json.dumps(json.loads(content), sort_keys=True)
        except (ValueError, RecursionError):
            pass
    return content


def _about(model: Path, random: Random, sound: Path, work: Path) -> Sequence[str]:
    """A command about the folder ``model``."""
    others = (
        ("inspect", str(model)),
        ("inspect", str(model), "--graph"),
        ("compile", str(model), "--pass", "magnitude:2:4", "--dry-run"),
    )
    return random.choice((*others, *_readers(model, sound, work)))


def _readers(model: Path, sound: Path, work: Path) -> Sequence[Sequence[str]]:
    """Commands that read every byte of the folder ``model``."""
    out, data = str(work / "out"), str(sound / "data.jsonl")
    return (
        ("verify", str(model)),
        ("compile", str(model), "--pass", "magnitude:2:4", "--quiet", "-o", out),
        ("compile", str(model), "--pass", "wanda:50%", "--calibration", data, *_DRAWN, "-o", out),
        ("compile", str(model), "--pass", "magnitude:2:4", "--to", "packed:choice=smallest", "-o", out),
        ("eval", str(model), "--data", data, "--sequence-length", "8", "--windows", "2"),
    )


def _about_graphs(model: Path, out: str) -> Sequence[Sequence[str]]:
    """Commands that read an ONNX folder."""
    return (
        ("verify", str(model), "--weights-only"),
        ("verify", str(model), "--json"),
        ("expand", str(model), "-o", out),
        ("run", str(model), "w1 w2", "--tokens", "2"),
    )
