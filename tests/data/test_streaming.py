"""Data read and tokenised as a stream: the same samples as of whole lists, and of long text only what is drawn."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from sparsify.data import rows, texts, windows
from sparsify.data.rows import Lines, Table
from sparsify.data.sources import Documents, python_stdlib, read_documents
from sparsify.data.texts import LongText, pieces, text_in_memory
from sparsify.data.windows import disjoint_windows, random_windows
from sparsify.errors import CalibrationError
from sparsify.frontend.source import open_source

# (a NUL stands in no text, and is refused)
WRITTEN = st.characters(codec="utf-8", exclude_characters="\0")

CODE = "".join(python_stdlib("heldout")[:12])[:60_000]


def of_bytes(text: str, special: bool = True) -> Tensor:
    """Every byte a token, with a begin and an end token."""
    return torch.tensor([300, *text.encode(), 301] if special else list(text.encode()), dtype=torch.long)


def slow_random_windows(documents: list[Any], encode: Any, samples: int, length: int, seed: int) -> Tensor | None:
    """What the draw was before it was a stream; every document is a list item, tokenised whole."""
    draw, misses = random.Random(seed), 0
    ids = [d if isinstance(d, Tensor) else encode(d) for d in documents]
    candidates = list(range(len(ids)))
    found: list[Tensor] = []
    while len(found) < samples:
        one = ids[draw.choice(candidates)]
        if len(one) > length:
            start = draw.randint(0, len(one) - length - 1)
            found.append(one[start : start + length])
            continue
        misses += 1
        if misses == 64 and not (candidates := [i for i in candidates if len(ids[i]) > length]):
            return None
    return torch.stack(found)


def slow_disjoint_windows(documents: list[str], encode: Any, length: int, limit: int | None) -> Tensor | None:
    taken, total = [], 0
    for text in documents:
        if limit is not None and total >= length * limit:
            break
        taken.append(text)
        total += len(encode(text))
    ids = encode("\n\n".join(taken))
    count = len(ids) // length
    return ids[: count * length].view(count, length)[:limit] if count else None


def or_none(call: Callable[[], Tensor]) -> Tensor | None:
    try:
        return call()
    except CalibrationError:
        return None


def same(one: Tensor | None, other: Tensor | None) -> bool:
    return (one is None) == (other is None) and (one is None or one.tolist() == other.tolist())  # type: ignore[union-attr]


@settings(deadline=None, max_examples=80)
@given(
    st.lists(
        st.text(WRITTEN, max_size=30) | st.lists(st.integers(0, 99), max_size=30).map(torch.tensor),
        min_size=1,
        max_size=6,
    ),
    st.integers(1, 9),
    st.integers(2, 12),
    st.integers(0, 9),
)
def test_random_windows_are_those_of_whole_lists(documents: Any, samples: int, length: int, seed: int) -> None:
    documents = [d.long() if isinstance(d, Tensor) else d for d in documents]
    found = or_none(lambda: random_windows(Documents("x", documents), of_bytes, samples, length, seed))
    assert same(found, slow_random_windows(documents, of_bytes, samples, length, seed))


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.text(WRITTEN, max_size=30), min_size=1, max_size=6), st.integers(2, 12), st.none() | st.integers(1, 9)
)
def test_disjoint_windows_are_those_of_whole_lists(documents: list[str], length: int, limit: int | None) -> None:
    found = or_none(lambda: disjoint_windows(Documents("x", documents), of_bytes, length, limit))
    assert same(found, slow_disjoint_windows(documents, of_bytes, length, limit))


def of_subwords(kind: str) -> tokenizers.Tokenizer:
    """Small tokenizers of the kinds that there are, with what they put before and behind a text."""
    special = ["<s>", "</s>", "<unk>"]
    if kind == "byte-level":
        made = tokenizers.Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
    elif kind == "llama":
        made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        # Trained on words, as SentencePiece is, and run on whole texts.
        made.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("▁[^▁\n]*|\n"), "isolated")
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special)
    elif kind == "unigram":
        made = tokenizers.Tokenizer(models.Unigram())
        made.normalizer = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=special, unk_token="<unk>")
    else:
        made = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
        made.normalizer = normalizers.BertNormalizer()
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=special)
    made.train_from_iterator([CODE[:20_000]], trainer)
    if kind == "llama":
        made.pre_tokenizer = None
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return made


@pytest.mark.parametrize("kind", ["byte-level", "llama", "unigram", "wordpiece", "pycode-6m"])
def test_pieces_have_the_ids_of_the_whole(kind: str, bundled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = open_source(bundled).tokenizer()._tokenizer if kind == "pycode-6m" else of_subwords(kind)

    def encode(text: str, special: bool = True) -> Tensor:
        return torch.tensor(made.encode(text, add_special_tokens=special).ids, dtype=torch.long)

    documents = [CODE[i : i + 9000] for i in range(0, 54_000, 9000)]
    whole = disjoint_windows(Documents("x", documents), encode, 16)
    assert torch.equal(whole.flatten().long(), encode("\n\n".join(documents))[: whole.numel()])
    monkeypatch.setattr(windows, "WHOLE", 1000)
    for size in (500, 4096):
        monkeypatch.setattr(texts, "PIECE", size)
        assert torch.equal(disjoint_windows(Documents("x", documents), encode, 16), whole)
        assert torch.equal(disjoint_windows(Documents("x", documents), encode, 16, 100), whole[:100])


@settings(deadline=None, max_examples=100)
@given(st.text("ab \n\té𝄞", max_size=80), st.integers(1, 9), st.integers(1, 30))
def test_pieces_make_the_text(text: str, piece: int, chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "PIECE", piece)
        found = list(pieces(text[i : i + chunk] for i in range(0, len(text), chunk)))
    assert "".join(found) == text and all(0 < len(one) <= piece for one in found)


@settings(deadline=None, max_examples=100)
@given(st.text("ab \r\né𝄞", min_size=1, max_size=60), st.integers(0, 200), st.integers(8, 40), st.integers(1, 9))
def test_long_text_is_read_from_any_byte(text: str, start: int, count: int, piece: int) -> None:
    data = text.encode()
    start %= len(data)
    long = LongText(len(data), lambda begin, size: data[begin : begin + size], "x")
    part = long.at(start, count)
    assert part in text and len(part.encode()) <= count
    as_file = LongText(len(data), long.read, "x", file=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "PIECE", piece)
        assert "".join(long.chunks()) == text
        assert "".join(as_file.chunks()) == text.replace("\r\n", "\n").replace("\r", "\n")


def test_a_long_text_is_drawn_in_pieces_all_over_it(tmp_path: Path) -> None:
    lines = "".join(f"line {i} of a long text, é\r\n" for i in range(100_000))
    (tmp_path / "a.txt").write_bytes(lines.encode())
    documents = read_documents(str(tmp_path / "a.txt"), "calibration")
    read: list[int] = []

    def encode(text: str, special: bool = True) -> Tensor:
        read.append(len(text))
        return of_bytes(text, special)

    one, again = (random_windows(documents, encode, 40, 64, seed) for seed in (0, 0))
    assert torch.equal(one, again) and max(read) <= texts.PIECE
    whole = lines.replace("\r\n", "\n").encode()
    places = [whole.find(bytes(window.tolist())) for window in one]
    assert min(places) >= 0 and min(places) < len(whole) // 5 and max(places) > len(whole) * 4 // 5
    assert len({place * 4 // len(whole) for place in places}) == 4
    read.clear()
    found = disjoint_windows(documents, encode, 64, 3)
    assert bytes(found.flatten().tolist()[1:]) == whole[: 3 * 64 - 1] and sum(read) < 2 * texts.PIECE
    every = disjoint_windows(documents, of_bytes, 64)
    assert every.dtype == torch.int32 and bytes(every.flatten().byte().tolist()[1:]) == whole[: every.numel() - 1]


def test_a_text_that_the_tokenizer_makes_too_short_ends(tmp_path: Path) -> None:
    long = text_in_memory("x" * (texts.WHOLE + 1), "x")
    assert isinstance(long, LongText)
    with pytest.raises(CalibrationError, match="the longest of 1 tokens"):
        random_windows(Documents("x", [long]), lambda text, special=True: torch.zeros(1, dtype=torch.long), 4, 16, 0)


def test_the_look_for_long_documents_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond it the first documents that are long enough serve, as many as there are samples."""
    monkeypatch.setattr(windows, "LOOKED_THROUGH", 10_000)
    documents = ["a" * (1000 + (i % 100 == 0)) for i in range(4000)]
    looked: list[int] = []

    def encode(text: str, special: bool = True) -> Tensor:
        looked.append(len(text))
        return of_bytes(text, False)

    found = random_windows(Documents("x", documents), encode, 3, 1000, 0)
    assert found.shape == (3, 1000) and 200 < len(looked) < 300


def lines_of(path: Path, values: list[Any], blank: int) -> None:
    text = "".join(json.dumps({"n": 1, "text": v}) + "\n" * (1 + (i % 3 == 0) * blank) for i, v in enumerate(values))
    path.write_text("\n" * blank + text.rstrip("\n"))


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.text(WRITTEN, max_size=20), min_size=1, max_size=40),
    st.integers(1, 200),
    st.integers(0, 3),
    st.randoms(),
)
def test_lines_and_tables_are_lists(values: list[str], stride: int, blank: int, draw: random.Random) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import tempfile

    import pyarrow.parquet as parquet

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "_STRIDE", stride)
        patch.setattr(rows, "_ROWS", 3)
        lines_of(Path(folder) / "a.jsonl", values, blank)
        parquet.write_table(pyarrow.table({"n": [1] * len(values), "text": values}), f"{folder}/a.parquet", stride)
        for made in (Lines(Path(folder) / "a.jsonl", "text"), Table(Path(folder) / "a.parquet", "text")):
            assert len(made) == len(values) and list(made) == values
            order = draw.sample(range(len(values)), len(values))
            assert [made[i] for i in order] == [values[i] for i in order]
            assert made[-1] == values[-1]
            with pytest.raises(IndexError):
                made[len(values)]


def test_ids_of_a_table_and_of_lines(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    values = [[1, 2, 3], [4], []]
    parquet.write_table(pyarrow.table({"text": values}), tmp_path / "a.parquet")
    lines_of(tmp_path / "a.jsonl", values, 0)
    for name in ("a.parquet", "a.jsonl"):
        found = read_documents(f"{tmp_path}/{name}", "calibration").documents
        assert [d.tolist() for d in found] == values  # type: ignore[union-attr]


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    lines_of(tmp_path / "a.jsonl", ["one", "two"], 0)
    found = Lines(tmp_path / "a.jsonl", "text")
    lines_of(tmp_path / "a.jsonl", ["one"], 0)
    with pytest.raises(CalibrationError, match="became shorter"):
        found[1]


def test_text_and_ids_in_one_file_stay_in_order() -> None:
    def documents() -> Iterator[Any]:
        yield from (torch.tensor([1, 2]), "a", "b", torch.tensor([3]))

    found = disjoint_windows(Documents("x", list(documents())), lambda t, special=True: of_bytes(t, False), 7)
    assert found.tolist() == [[1, 2, *b"a\n\nb", 3]]
    with pytest.raises(CalibrationError, match="token ids from -1 to 3"):
        disjoint_windows(Documents("x", [torch.tensor([-1, 3])]), of_bytes, 2)
