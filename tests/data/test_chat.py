"""Chat messages become token ids through the chat template; what is no conversation is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from support.command_line import sparsify as command
from support.tokenizers import of_bytes
from torch import Tensor

import sparsify
from sparsify.data.batches import evaluation_windows, load_calibration
from sparsify.data.chat import Chat
from sparsify.data.sources import read_documents
from sparsify.errors import CalibrationError, SpecError
from sparsify.evaluation.evaluate import evaluate
from sparsify.frontend.source import Source, open_source

TURNS = [[("user", f"question {i}?"), ("assistant", f"answer {i}.")] for i in range(30)]
EXPECTED = ["<s>" + "".join(f"<turn>{role}\n{text}</turn>" for role, text in turns) for turns in TURNS]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "model"
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=264, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    hf.LlamaForCausalLM(config).save_pretrained(folder)
    of_bytes().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def source(model: Path) -> Source:
    return open_source(model)


def written(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def said(ids: Tensor, source: Source) -> str:
    text: str = source.tokenizer().decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def roles(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in turns]


FORMS: dict[str, Callable[[list[tuple[str, str]]], Any]] = {
    "messages": lambda turns: {"messages": roles(turns)},
    "conversations": lambda turns: {
        "id": 3,
        "conversations": [{"from": {"user": "human", "assistant": "gpt"}[r], "value": t} for r, t in turns],
    },
    "conversations with roles": lambda turns: {"conversations": roles(turns)},
    "parts": lambda turns: {
        "messages": [{"role": r, "content": [{"type": "text", "text": t[:3]}, {"type": "text", "text": t[3:]}]}
                     for r, t in turns]
    },
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_every_form_of_a_conversation(form: str, name: str, source: Source, tmp_path: Path) -> None:
    rows = [FORMS[form](turns) for turns in TURNS]
    if name == "a.json":
        (tmp_path / name).write_text(json.dumps(rows))
    elif name == "a.parquet":
        pyarrow = pytest.importorskip("pyarrow")
        import pyarrow.parquet as parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)
    else:
        written(tmp_path / name, rows)
    found = read_documents(f"{tmp_path}/{name}", "calibration", Chat(source))
    assert found.packed and found.label.endswith(":" + ("messages" if "messages" in rows[0] else "conversations"))
    assert [said(ids, source) for ids in found.documents] == EXPECTED


def test_sequences_are_filled_with_conversations(source: Source, tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", [FORMS["messages"](turns) for turns in TURNS])
    data = load_calibration(path, source, samples=6, sequence_length=64)
    text = said(torch.cat([batch["input_ids"].flatten() for batch in data.batches]), source)
    parts = ["<s>" + part for part in text.split("<s>")[1:]]
    assert len(text) > 6 * 40 and len(set(parts)) == len(parts), "none twice"
    assert set(parts[:-1]) <= set(EXPECTED) and any(whole.startswith(parts[-1]) for whole in EXPECTED)
    other = load_calibration(path, source, samples=6, sequence_length=64, seed=1)
    assert other.digest != data.digest and data.template is None
    with pytest.raises(CalibrationError, match=r"500 samples of 64 tokens .*: 30 conversations, \d+ tokens in all"):
        load_calibration(path, source, samples=500, sequence_length=64)
    windows, _ = evaluation_windows(path, source, 64, 4)
    assert said(windows.flatten(), source) == said(source.tokenizer()("".join(EXPECTED), return_tensors="pt",
                                                                      add_special_tokens=False)["input_ids"][0][:256],
                                                   source)  # fmt: skip


def test_a_template_of_ones_own(model: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", [FORMS["messages"](turns) for turns in TURNS])
    (tmp_path / "t.jinja").write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    source = open_source(model)
    found = read_documents(path, "calibration", Chat(source, tmp_path / "t.jinja"))
    assert said(found.documents[0], source) == "[question 0?][answer 0.]"
    out = tmp_path / "out"
    done = command("compile", model, "--pass", "wanda:2:4", "--calibration", path, "--samples", 4, "--sequence-length",
                   32, "--chat-template", tmp_path / "t.jinja", "-o", out)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(json.loads((out / "sparsify.json").read_text())["calibration"]["chat_template"]) == 64
    with_own = evaluate(model, path, sequence_length=32, chat_template=tmp_path / "t.jinja").perplexity
    assert with_own != evaluate(model, path, sequence_length=32).perplexity


def test_a_template_that_nothing_needs_or_that_is_none(model: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ messages[0]['content'] }}")
    (tmp_path / "a.txt").write_text("some text " * 300)
    text, options = str(tmp_path / "a.txt"), {"chat_template": tmp_path / "t.jinja"}
    for tried in (
        lambda: sparsify.compile(model, ["wanda:2:4"], calibration=text, samples=2, sequence_length=16, **options),
        lambda: sparsify.compile(model, ["magnitude:2:4"], **options),
        lambda: sparsify.compile(model, ["wanda:2:4"], calibration=[torch.zeros(1, 8, dtype=torch.long)], **options),
        lambda: evaluate(model, text, sequence_length=16, **options),
    ):
        with pytest.raises(SpecError, match=r"--chat-template.*Leave it out"):
            tried()
    for wrong, says in ((tmp_path / "none", "cannot be read"), (tmp_path, "cannot be read")):
        with pytest.raises(SpecError, match=says):
            Chat(open_source(model), wrong)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": [{"role": "user"}]}, "line 2, message 1': a table of role. A message is"),
        ({"messages": [{"content": "a"}]}, "message 1': a table of content"),
        ({"messages": [{"role": "user", "content": 3}]}, "a table of role, content"),
        ({"messages": [{"from": "alien", "value": "a"}]}, "from 'alien' and a value that is text. Speakers are human"),
        ({"messages": [{"from": "human", "value": None}]}, "from 'human' and a value that is null"),
        ({"messages": "text"}, None),
        ({"messages": []}, None),
        ({"messages": [{"role": "user", "content": "a"}], "tools": "none"}, "tools that are text"),
        ({"messages": [{"role": "user", "content": "a\0b"}]}, r"line 2, message 1': a NUL .* at character 2 of a text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "\0"}]}]},
            "message 1': a NUL",
        ),
        ({"messages": [{"from": "human", "value": "\0"}]}, "message 1': a NUL"),
        ({"messages": [{"role": "user", "content": [{"type": "video", "path": "a"}]}]}, "a part of type 'video'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "path": "a"}]}]},
            r"images, where text alone is read\. The model reads text alone",
        ),
    ],
)
def test_what_is_no_conversation(row: Any, says: str | None, source: Source, tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", [FORMS["messages"](TURNS[0]), row])
    if says is None:
        assert len(read_documents(path, "calibration", Chat(source)).documents) == 2
        return
    with pytest.raises(CalibrationError, match=says):
        list(read_documents(path, "calibration", Chat(source)).documents)


def test_tools_belong_to_a_conversation(source: Source, tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "add"}}]}
    row = {"messages": [{"role": "user", "content": "1+1"}, call], "tools": [{"name": "adder"}]}
    (ids,) = read_documents(written(tmp_path / "a.jsonl", [row]), "calibration", Chat(source)).documents
    assert said(ids, source) == "<s><turn>user\n1+1</turn><turn>assistant\nadd</turn>adder"  # type: ignore[arg-type]


def test_without_a_template_or_with_one_that_fails(model: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", [FORMS["messages"](TURNS[0])] * 9)
    with pytest.raises(CalibrationError, match="chat messages, and no model to read them"):
        list(read_documents(path, "calibration").documents)
    source = open_source(model)
    source.tokenizer().chat_template = None
    with pytest.raises(CalibrationError, match="a tokenizer without a chat template"):
        load_calibration(path, source, samples=1, sequence_length=16)
    (tmp_path / "t").write_text("{{ raise_exception('no such role') }}")
    with pytest.raises(CalibrationError, match=r"line 1': the chat template .*/t refuses it \(.*no such role\)"):
        read_documents(path, "calibration", Chat(source, tmp_path / "t")).documents[0]
    # What is wrong with the file itself is not said of the messages.
    (tmp_path / "t").write_text("\n{% if %}")
    with pytest.raises(CalibrationError, match=r"^the chat template .*/t: no Jinja template \(line 2: "):
        read_documents(path, "calibration", Chat(source, tmp_path / "t")).documents[0]
    (tmp_path / "t").write_text(" \n")
    with pytest.raises(SpecError, match="nothing in it"):
        Chat(source, tmp_path / "t")


def test_a_folder_of_conversations_and_text(source: Source, tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl", [FORMS["messages"](TURNS[0])])
    assert read_documents(str(tmp_path), "calibration", Chat(source)).packed
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(CalibrationError, match=r"chat messages in some files and none in b\.txt"):
        read_documents(str(tmp_path), "calibration", Chat(source))
