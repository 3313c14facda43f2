"""Chat templates that want parts, those that want text, and those that leave text out: nothing is dropped unsaid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from support.families import save
from support.tokenizers import of_bytes
from support.vision import asks, llava, pictures, written

from sparsify.data.batches import evaluation_windows, load_calibration
from sparsify.data.chat import Chat
from sparsify.data.content import as_wanted
from sparsify.data.sources import read_documents
from sparsify.errors import CalibrationError
from sparsify.frontend.source import open_source

# As in llava-1.5-7b-hf, abridged.
WALKS = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}<image>{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
    "{% endfor %}"
)
LOOP = "{% for m in messages %}{{ m.role }}:"
TEMPLATES = {
    "walks over parts": WALKS,
    "asks each part": LOOP + "{% for c in m.content %}"
    "{% if c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}{% endfor %}",
    "refuses text": LOOP + "{% if m.content is string %}{{ raise_exception('parts!') }}{% endif %}"
    "{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}",
    "writes text": LOOP + "{{ m.content | trim }}{% endfor %}",
    "adds text": LOOP + "{{ m.content + '' }}{% endfor %}",
    "prints what it gets": LOOP + "{{ m.content }}{% endfor %}",
    "both": LOOP + "{% if m.content is string %}{{ m.content }}"
    "{% else %}{{ m.content[0].text }}{% endif %}{% endfor %}",
    "text of one role, parts of another": LOOP + "{% if m.role == 'user' %}"
    "{% for c in m.content %}{{ c.text }}{% endfor %}{% else %}{{ m.content.strip() }}{% endif %}{% endfor %}",
}  # fmt: skip
PARTS = [
    {"role": "user", "content": [{"type": "text", "text": "first, "}, {"type": "text", "text": "second"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "third"}]},
]
PLAIN = [{"role": "user", "content": "first, second"}, {"role": "assistant", "content": "third"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save("llama", tmp_path_factory.mktemp("forms") / "model")
    of_bytes().save_pretrained(folder)
    return folder


def rendered(model: Path, template: str, rows: list[Any], folder: Path) -> list[str]:
    (folder / "t.jinja").write_text(template)
    source = open_source(model)
    found = read_documents(written(folder / "a.jsonl", rows), "calibration", Chat(source, folder / "t.jinja"))
    return [source.tokenizer().decode(ids.tolist()) for ids in found.documents]  # type: ignore[union-attr]


@pytest.mark.parametrize("given", ["parts", "text"])
@pytest.mark.parametrize("kind", TEMPLATES)
def test_all_text_is_written_in_whichever_form(kind: str, given: str, model: Path, tmp_path: Path) -> None:
    template = TEMPLATES[kind]
    (text,) = rendered(model, template, [{"messages": PARTS if given == "parts" else PLAIN}], tmp_path)
    user, assistant = ("USER: ", "ASSISTANT: ") if kind == "walks over parts" else ("user:", "assistant:")
    assert text == f"{user}first, second{assistant}third"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}", 1),
        (WALKS.replace("equalto', 'text", "equalto', 'words"), 1),
        ("a fixed text", 1),
        ("{{ messages[0].content }}", 2),
        ("{{ messages[0].content[0].text ~ messages[1].content.strip() }}", 3),
        ("{{ messages }}", None),
    ],
)  # fmt: skip
def test_text_that_is_left_out_is_said(template: str, message: int | None, model: Path, tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "system", "content": " "}, {"role": "user", "content": " "}]},
        {"messages": [{"role": "system", "content": "be"}, *PLAIN]},
    ]
    if message is None:
        assert "first, second" in rendered(model, template, rows[1:], tmp_path)[0]
        return
    with pytest.raises(CalibrationError, match=rf"line 2, message {message}': text \(role .* leaves out"):
        rendered(model, template, rows, tmp_path)


def test_what_is_silent_has_no_text_to_lose() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{}]}
    empty = {"role": "user", "content": "  "}
    assert as_wanted([call, empty], lambda messages: "", "x") == [call, empty]


def walking(folder: Path, template: str = WALKS) -> Path:
    llava(folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def test_a_model_whose_template_walks_over_parts(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    folder = walking(tmp_path / "model")
    source, digests = open_source(folder), []
    for name, text in (("a", "a story of a dog, "), ("b", "zzz qq ")):
        path = written(tmp_path / f"{name}.jsonl", [asks(text * 5)] * 20)
        data = load_calibration(path, source, samples=2, sequence_length=32)
        assert text[:5] in source.tokenizer().decode(data.batches[0]["input_ids"].flatten())
        windows, _ = evaluation_windows(path, source, 32, 2)
        assert text[:5] in source.tokenizer().decode(windows.flatten())
        digests.append(data.digest)
    assert digests[0] != digests[1]
    # The place of an image in a text part, and no image: alone, and beside conversations that have some.
    with pytest.raises(CalibrationError, match="the place of an image in the text, and no image"):
        load_calibration(
            written(tmp_path / "c.jsonl", [asks("<image> what?")] * 9), source, samples=1, sequence_length=8
        )
    rows = [asks("<image> what?"), asks("what?", pictures(tmp_path, [(20, 20)])[0])]
    with pytest.raises(
        CalibrationError, match=r"line 1': .*<image> tokens in the text but no images were passed|and no image. Name"
    ):
        load_calibration(written(tmp_path / "d.jsonl", rows), source, samples=2)


@pytest.mark.parametrize("template", [WALKS, TEMPLATES["writes text"].replace("m.content | trim", "m.content + ''")])
def test_processors_are_asked_too(template: str, tmp_path: Path) -> None:
    """Of conversations with images and without; one that wants text gets it where there is no image."""
    pytest.importorskip("PIL")
    source = open_source(walking(tmp_path / "model", template))
    image = pictures(tmp_path, [(20, 20)])[0]
    rows = [asks("what?"), asks("where?", image)]
    path = written(tmp_path / "a.jsonl", rows)
    if template != WALKS:
        with pytest.raises(CalibrationError, match=r"line 2"):
            load_calibration(path, source, samples=2)
        return
    (batch,) = load_calibration(path, source, samples=2).batches
    assert "where?" in source.tokenizer().decode(batch["input_ids"].flatten()) and "pixel_values" in batch
    processor = hf.AutoProcessor.from_pretrained(tmp_path / "model")
    assert (
        processor.apply_chat_template(json.loads(json.dumps(PARTS)), tokenize=False)
        == "USER: first, secondASSISTANT: third"
    )


def test_a_processors_template_that_leaves_text_out(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    source = open_source(walking(tmp_path / "model", "<image>{{ messages[0]['role'] }}"))
    row = asks("where?", pictures(tmp_path, [(20, 20)])[0])
    with pytest.raises(
        CalibrationError, match=r"line 1, message 1': text \(role user\) that the chat template leaves out"
    ):
        load_calibration(written(tmp_path / "a.jsonl", [row]), source, samples=1)
