"""Conversations with images: what the processor makes of them, in batches of one shape; padding counts nowhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from support.families import save
from support.vision import asks, llava, pictures, written
from torch import Tensor

import sparsify
from sparsify.data.batches import load_calibration
from sparsify.data.pictures import image_text, images
from sparsify.errors import CalibrationError
from sparsify.evaluation.evaluate import evaluate
from sparsify.frontend.source import Source, open_source

pytest.importorskip("PIL")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llava(tmp_path_factory.mktemp("llava") / "model")


@pytest.fixture(scope="module")
def source(model: Path) -> Source:
    return open_source(model)


@pytest.fixture
def names(tmp_path: Path) -> list[str]:
    return pictures(tmp_path, [(20 + i, 30) for i in range(6)])


def texts(data: Any, source: Source) -> list[str]:
    """The text of each batch, without its padding."""
    return [
        source.tokenizer().decode(batch["input_ids"][batch["attention_mask"] != 0]).replace("<image>", "")
        for batch in data.batches
    ]


def test_batches_are_what_the_processor_makes(source: Source, model: Path, names: list[str], tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", [asks("what" + "?" * i, name) for i, name in enumerate(names)])
    data = load_calibration(path, source, samples=6)
    assert len(data.batches) == data.sequences == 6
    processor = hf.AutoProcessor.from_pretrained(model)
    longest = 0
    for batch, text in zip(data.batches, texts(data, source), strict=True):
        number = text.count("?")
        row = asks("what" + "?" * number, str(tmp_path / names[number]))
        expected = processor.apply_chat_template(row["messages"], tokenize=True, return_dict=True, return_tensors="pt")
        count = expected["input_ids"].shape[1]
        longest = max(longest, count)
        assert batch.keys() == expected.keys()
        assert torch.equal(batch["input_ids"][:, :count], expected["input_ids"])
        assert batch["attention_mask"][0].tolist() == [1] * count + [0] * (batch["input_ids"].shape[1] - count)
        assert int(batch["input_ids"][0, count:].abs().sum()) == 0, "the padding token is the first"
        assert torch.allclose(batch["pixel_values"], expected["pixel_values"])
    assert data.sequence_length == longest and f"padded to {longest} tokens" in data.label
    assert "6 of 6 conversations of" in data.label and "pixel_values (1, 3, 16, 16)" in data.label
    again, other = (load_calibration(path, source, samples=3, seed=seed) for seed in (0, 1))
    assert again.digest != data.digest and other.digest != again.digest
    assert again.digest == load_calibration(path, source, samples=3).digest
    assert load_calibration(path, source, samples=6, rows=1).digest == data.digest


FORMS: dict[str, Callable[[str], dict[str, Any]]] = {
    "image": lambda name: {"messages": [{"role": "user", "content": [{"type": "image", "image": name}]}]},
    "url of a file": lambda name: {"messages": [{"role": "user", "content": [{"type": "image", "url": name}]}]},
    "image_url": lambda name: {
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": name}}]}]
    },
    "beside": lambda name: {"messages": [{"role": "user", "content": [{"type": "image"}]}], "images": [name]},
    "llava's": lambda name: {"conversations": [{"from": "human", "value": "<image>\n"}], "image": name},
}


@pytest.mark.parametrize("form", FORMS)
def test_wherever_an_image_is_named(form: str, source: Source, names: list[str], tmp_path: Path) -> None:
    plain = {"messages": [{"role": "user", "content": [{"type": "image", "path": names[3]}]}]}
    expected = load_calibration(written(tmp_path / "a.jsonl", [plain]), source, samples=1)
    row = FORMS[form](names[3])
    (tmp_path / "b.json").write_text(json.dumps([row]))
    found = load_calibration(f"{tmp_path}/b.json", source, samples=1).batches[0]
    assert torch.equal(found["pixel_values"], expected.batches[0]["pixel_values"])
    assert int((found["input_ids"] == 5).sum()) == 4


def test_the_most_frequent_shape_is_taken(source: Source, names: list[str], tmp_path: Path) -> None:
    rows = [asks("one", names[i]) for i in range(3)] + [asks("two", names[3], names[4])] * 2 + [asks("none")]
    data = load_calibration(written(tmp_path / "a.jsonl", rows), source, samples=16)
    assert texts(data, source) == ["<s><turn>user\none</turn><turn>assistant\na thing</turn>"] * 3
    assert "3 of 6 conversations" in data.label and "left out: 3 with other images or none" in data.label
    rows = [asks("one", names[0])] * 2 + [asks("w" * 60, names[1])] * 3
    data = load_calibration(written(tmp_path / "b.jsonl", rows), source, samples=16, sequence_length=64)
    assert data.sequences == 2 and data.label.endswith("left out: 3 of more than 64 tokens")
    with pytest.raises(CalibrationError, match="5 looked at, 5 of them longer than 8 tokens"):
        load_calibration(f"{tmp_path}/b.jsonl", source, sequence_length=8)


def test_images_come_before_text_alone(source: Source, names: list[str], tmp_path: Path) -> None:
    rows = [asks("none")] * 5 + [asks("one", names[0])] * 2
    data = load_calibration(written(tmp_path / "a.jsonl", rows), source, samples=2)
    assert "pixel_values" in data.batches[0] and data.sequences == 2


def test_a_place_without_an_image_is_refused(source: Source, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "<image>\nwhat is it?"}]} for _ in range(20)]
    with pytest.raises(CalibrationError, match="the place of an image in the text, and no image"):
        load_calibration(written(tmp_path / "a.jsonl", rows), source, samples=2, sequence_length=32)


def test_text_alone_calibrates_the_language_model(source: Source, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"question {i}"}]} for i in range(20)]
    data = load_calibration(written(tmp_path / "a.jsonl", rows), source, samples=2, sequence_length=32)
    assert data.batches[0].keys() == {"input_ids"} and data.sequence_length == 32


def test_both_towers_are_pruned_by_what_they_see(source: Source, model: Path, names: list[str], tmp_path: Path) -> None:
    """Wanda's choice with transformers' own inputs, each conversation alone and without padding."""
    path = written(tmp_path / "a.jsonl", [asks("what" + "?" * (3 * i), name) for i, name in enumerate(names)])
    options: dict[str, Any] = {"calibration": path, "samples": 6, "schedule": "dense", "only": ["*.layers.*"]}
    made = sparsify.compile(model, ["wanda:2:4"], output=tmp_path / "out", **options)
    sites = {site.name: site.tokens for run in made.runs for site in run.sites}
    assert {name.split(".")[1] for name in sites} >= {"vision_tower", "language_model"}
    network = hf.LlavaForConditionalGeneration.from_pretrained(model).eval()
    # Of which numbers a skeleton's buffers are is the affair of tests/frontend.
    for name, buffer in network.named_buffers():
        buffer.copy_(source.module.get_buffer(name))
    processor = hf.AutoProcessor.from_pretrained(model)
    norms: dict[str, Tensor] = {}
    layers = {n: m for n, m in network.named_modules() if n in sites}

    def add(name: str, value: Tensor) -> None:
        rows = value.flatten(0, -2).double()
        norms[name] = norms.get(name, 0) + rows.square().sum(0)
        sites[name] -= len(rows)

    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, given, name=name: add(name, given[0].detach()))
    for i, image in enumerate(names):
        row = asks("what" + "?" * (3 * i), str(tmp_path / image))
        with torch.no_grad():
            network(
                **processor.apply_chat_template(row["messages"], tokenize=True, return_dict=True, return_tensors="pt")
            )
    assert not any(sites.values()), "as many rows as there are tokens and patches"
    pruned = hf.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    for name, layer in layers.items():
        scores = (layer.weight.double().abs() * norms[name].sqrt()).view(-1, 4)
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(2).indices, True)
        assert torch.equal(kept.view_as(layer.weight), pruned.get_submodule(name).weight != 0), name


def test_only_one_tower(model: Path, names: list[str], tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", [asks("what", name) for name in names])
    made = sparsify.compile(model, ["wanda:2:4"], calibration=path, only=["*vision_tower*"], dry_run=True)
    assert {target.parameter.split(".")[1] for target in made.runs[0].targets} == {"vision_tower"}


def part(**content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "image", **content}]}]}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (part(url="https://example.org/a.png"), "an image at https://example.org/a.png, which is no file"),
        (part(path="file:///etc/passwd"), "an image at file:///etc/passwd, which is no file"),
        (part(image="data:image/png;base64,AAAA"), "an image at data:image/png;base64,AAAA, which is no file"),
        (part(path="none.png"), r"image .*none\.png: no such file"),
        (part(path="."), "no such file"),
        (part(path="a.jsonl"), "cannot identify image file"),
        (part(), "an image without a file"),
        (part(image=3), "an image without a file"),
        (
            {"messages": [{"role": "user", "content": "hm"}], "images": ["pictures/0.png"]},
            "1 images beside the messages",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image", "path": "pictures/0.png"}, {"type": "video"}]}
                ]
            },
            "a part of type 'video'",
        ),
    ],
)
def test_images_that_are_not_read(row: Any, says: str, source: Source, names: list[str], tmp_path: Path) -> None:
    assert names
    with pytest.raises(CalibrationError, match=says):
        load_calibration(written(tmp_path / "a.jsonl", [row]), source, samples=1)


def test_images_that_are_too_large(
    source: Source, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 500)
    with pytest.raises(CalibrationError, match=r"20 × 30 pixels, more than 500"):
        load_calibration(written(tmp_path / "a.jsonl", [asks("what", names[0])]), source, samples=1)


def test_who_cannot_read_images_says_so(model: Path, names: list[str], tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", [asks("what", names[0])])
    with pytest.raises(CalibrationError, match=r"a\.jsonl, line 1': images, where .* name their one \.jsonl"):
        evaluate(model, path, sequence_length=8)
    (tmp_path / "folder").mkdir()
    written(tmp_path / "folder" / "a.jsonl", [asks("what", names[0])])
    plain = save("llama", tmp_path / "plain")
    with pytest.raises(CalibrationError, match=r"images, where text alone is read\. The model reads text alone"):
        load_calibration(path, open_source(plain), samples=1)
    with pytest.raises(
        CalibrationError, match=r"folder': images in a\.jsonl, .* Name that file itself \(.*/folder/a\.jsonl\)"
    ):
        load_calibration(str(tmp_path / "folder"), open_source(model), samples=1, sequence_length=8)
    for file, says in (("processor_config.json", "the processor of bare"), ("chat_template.jinja", "without a chat")):
        bare = llava(tmp_path / file / "bare")
        (bare / file).unlink()
        with pytest.raises(CalibrationError, match=says):
            load_calibration(path, open_source(bare), samples=1)
    (tmp_path / "t").write_text(
        "<image>{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    )
    from sparsify.data.chat import Chat

    source = open_source(bare)
    assert load_calibration(path, source, samples=1, chat=Chat(source, tmp_path / "t")).template is not None


class Patches:
    """A processor of Qwen2-VL's kind, which makes as many patches as an image has; its own needs torchvision."""

    chat_template = "one"

    def __init__(self, source: Source) -> None:
        self.image_processor, self.tokenizer = object(), source.tokenizer()

    def apply_chat_template(self, messages: list[dict[str, Any]], tokenize: bool, **_: Any) -> Any:
        if not tokenize:
            return str([part for message in messages for part in message["content"]]).replace("'", "")
        found = [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
        grids = torch.tensor([[1, image.height // 10 * 2, image.width // 10 * 2] for image in found])
        ids = torch.cat([torch.tensor([1]), torch.full((int(grids.prod(1).sum()) // 4,), 5), torch.tensor([9, 10])])
        return {
            "input_ids": ids[None],
            "mm_token_type_ids": (ids == 5).long()[None],
            "pixel_values": torch.randn(int(grids.prod(1).sum()), 12),
            "image_grid_thw": grids,
            "names": ["no tensor"],
        }


def test_images_of_as_many_patches_laid_out_otherwise(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_text, "_processor", Patches)
    names = pictures(tmp_path, [(20, 40), (40, 20), (20, 40), (40, 40)])
    data = load_calibration(written(tmp_path / "a.jsonl", [asks("what", name) for name in names]), source, samples=8)
    assert [batch["image_grid_thw"].tolist() for batch in data.batches] == [[[1, 8, 4]]] * 2
    assert data.batches[0].keys() == {
        "input_ids",
        "attention_mask",
        "mm_token_type_ids",
        "pixel_values",
        "image_grid_thw",
    }
    assert data.batches[0]["pixel_values"].shape == (32, 12) and data.sequence_length == 11
    assert data.sequences == 2 and "left out: 2 with other images or none" in data.label
