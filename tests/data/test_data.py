from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.families import build
from torch import Tensor, nn

from sparsify.data.batches import load_calibration
from sparsify.data.inputs import as_inputs
from sparsify.data.sources import Documents, python_stdlib, read_documents
from sparsify.data.windows import disjoint_windows, random_windows
from sparsify.errors import CalibrationError, SpecError
from sparsify.frontend.source import Source, open_source
from sparsify.frontend.text_config import text_config


def no_encoder(text: str, special: bool = True) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.long)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=8),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(0, 9),
)
def test_windows_are_whole_and_from_one_document(lengths, samples, length, seed) -> None:  # type: ignore[no-untyped-def]
    documents = [torch.arange(n) + 100 * i for i, n in enumerate(lengths)]
    try:
        windows = random_windows(Documents("x", list(documents)), no_encoder, samples, length, seed)
    except CalibrationError:
        assert max(lengths) <= length
        return
    assert windows.shape == (samples, length)
    for window in windows:
        assert torch.equal(window, torch.arange(length) + window[0]) and len(documents[window[0] // 100]) > length


def test_windows_repeat_with_the_seed_and_change_with_it() -> None:
    documents = Documents("x", [torch.arange(1000)])
    one, again, other = (random_windows(documents, no_encoder, 8, 16, seed) for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)


@pytest.mark.parametrize("more", [1, 2, 3])
def test_windows_begin_wherever_the_papers_do(more: int) -> None:
    """Of n tokens a window of L begins at 0 … n − L − 1, each of them as likely: the last token is never drawn."""
    windows = random_windows(Documents("x", [torch.arange(8 + more)]), no_encoder, 200, 8, 0)
    assert {int(w[0]) for w in windows} == set(range(more))


def test_too_short_names_the_counts() -> None:
    documents = Documents("x", [torch.arange(5), torch.arange(9)])
    with pytest.raises(CalibrationError, match="4 samples of 16 tokens from x: 2 documents, the longest of 9 tokens"):
        random_windows(documents, no_encoder, 4, 16, 0)
    with pytest.raises(CalibrationError, match="14 tokens in all"):
        disjoint_windows(documents, no_encoder, 16)


def test_one_long_document_among_many_is_found() -> None:
    documents = Documents("x", [torch.arange(3)] * 500 + [torch.arange(100)])
    assert random_windows(documents, no_encoder, 3, 16, 0).shape == (3, 16)


def test_evaluation_windows_join_by_a_blank_line_and_drop_the_rest() -> None:
    windows = disjoint_windows(Documents("x", ["abc", "defg"]), no_encoder, 4)
    assert ["".join(map(chr, w)) for w in windows.tolist()] == ["abc\n", "\ndef"]


def test_the_standard_library_splits_in_two_that_never_meet() -> None:
    one, two = set(python_stdlib("calibration")), set(python_stdlib("heldout"))
    assert len(one) > 100 and len(two) > 100 and not one & two


def test_file_sources(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "a.jsonl").write_text('{"text": "one", "body": "uno"}\n\n{"text": "two", "body": "dos"}\n')
    (tmp_path / "ids.jsonl").write_text('{"text": [1, 2, 3]}\n')
    assert list(read_documents(str(tmp_path / "a.txt"), "calibration").documents) == ["hello"]
    assert list(read_documents(str(tmp_path / "a.jsonl"), "calibration").documents) == ["one", "two"]
    assert list(read_documents(f"{tmp_path}/a.jsonl:body", "heldout").documents) == ["uno", "dos"]
    assert read_documents(str(tmp_path / "ids.jsonl"), "calibration").documents[0].tolist() == [1, 2, 3]
    save_file({"input_ids": torch.arange(6).view(2, 3), "other": torch.zeros(1)}, tmp_path / "a.safetensors")
    assert read_documents(str(tmp_path / "a.safetensors"), "calibration").fixed


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="the data extra is not installed")
    import pyarrow.parquet as parquet

    parquet.write_table(pyarrow.table({"text": ["one", "two"], "n": [1, 2]}), tmp_path / "a.parquet")
    assert list(read_documents(str(tmp_path / "a.parquet"), "calibration").documents) == ["one", "two"]
    with pytest.raises(CalibrationError, match="body"):
        read_documents(f"{tmp_path}/a.parquet:body", "calibration")


@pytest.mark.parametrize(
    ("spec", "content", "says"),
    [
        ("none.txt", None, "no such file"),
        ("none.jsonl", None, "no such file"),
        ("empty.txt", b"  \n", "no documents"),
        ("bin.txt", b"a\n\x00\xff\x80", "not a UTF-8 text file: line 2, byte 2 (0x00) is NUL"),
        ("bad.jsonl", b'{"text": "x"}\n{oops\n', "line 2 is not JSON"),
        ("field.jsonl:body", b'{"text": "x"}\n', "no field 'body'"),
        ("number.jsonl", b'{"text": 3}\n', "line 1': a number. A document is"),
        ("broken.safetensors", b"123", "no sound safetensors"),
        ("broken.parquet", b"123", "cannot be read"),
    ],
)
def test_broken_sources(tmp_path: Path, spec: str, content: bytes | None, says: str) -> None:
    if content is not None:
        (tmp_path / spec.partition(":")[0]).write_bytes(content)
    with pytest.raises(CalibrationError) as caught:
        read_documents(f"{tmp_path}/{spec}", "calibration")
    assert says in str(caught.value)


def test_a_float_tensor_is_no_token_file(tmp_path: Path) -> None:
    save_file({"input_ids": torch.rand(3)}, tmp_path / "a.safetensors")
    with pytest.raises(CalibrationError, match="Token ids are whole numbers"):
        read_documents(str(tmp_path / "a.safetensors"), "calibration")


@pytest.fixture(scope="module")
def llama(folder: Callable[[str], Path]) -> Source:
    return open_source(folder("llama"))


def test_a_data_set_that_cannot_be_had_says_what_forms_there_are(llama: Source) -> None:
    with pytest.raises(CalibrationError, match="python-stdlib"):
        load_calibration("nobody/nothing-at-all", llama)


def test_python_batches_of_ids_need_no_tokenizer(llama: Source, ids: Tensor) -> None:
    for data in ([ids], ids, list(ids), [{"input_ids": ids}], iter([ids[:2], ids[2:]])):
        found = load_calibration(data, llama)
        assert [b["input_ids"].tolist() for b in found.batches] == [ids.tolist()], "however they came, they run at once"
        assert found.digest == load_calibration([ids], llama).digest
    assert load_calibration([ids.flip(0)], llama).digest != load_calibration([ids], llama).digest


def test_batches_of_uneven_size_become_even(llama: Source, ids: Tensor) -> None:
    mask = torch.ones_like(ids)
    data = [
        {"input_ids": ids[:3], "attention_mask": mask[:3]},
        {"input_ids": ids[3:], "attention_mask": mask[3:]},
    ]
    found = load_calibration(data, llama)
    assert len({tuple(b["input_ids"].shape) for b in found.batches}) == 1 and found.sequences == 4


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([], "no batches"),
        ([torch.zeros(2, 0, dtype=torch.long)], "an empty tensor"),
        ([torch.full((1, 4), 64)], "vocabulary has 64 tokens"),
        ([torch.full((1, 4), -1)], "token id -1"),
        ([torch.rand(2, 4)], "whole numbers"),
        (["text"], "the longest of 0 tokens"),
        (3, "not an iterable"),
        ([torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 5, dtype=torch.long)], "pad to one length"),
        ([{"input_ids": torch.zeros(1, 4, dtype=torch.long)}, {"ids": torch.zeros(1, 4)}], "in another"),
    ],
)
def test_batches_that_cannot_be_used(llama: Source, data: Any, says: str) -> None:
    with pytest.raises(CalibrationError) as caught:
        load_calibration(data, llama)
    assert says in str(caught.value)


def test_a_detector_that_reads_text_has_no_decoder_ids() -> None:
    class Detector(nn.Module):
        def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
            return input_ids + pixel_values

    source: Any = SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=True), module=Detector())
    assert as_inputs(torch.ones(1, 4, dtype=torch.long), source).keys() == {"input_ids"}


def test_the_config_of_what_reads_text_among_several() -> None:
    parts = {"text_encoder": hf.T5Config(), "audio_encoder": hf.EncodecConfig(), "decoder": hf.MusicgenDecoderConfig()}
    config = hf.MusicgenConfig(**parts)
    assert text_config(config) is config
    assert text_config(config, decoder=True) is config.decoder
    assert text_config(hf.BertConfig()).model_type == "bert" and text_config(None) is None


def test_a_plain_module_is_given_tensors_tuples_or_dictionaries() -> None:
    source = open_source(nn.Linear(4, 4))
    x = torch.randn(3, 4)
    assert load_calibration([x], source).batches[0].keys() == {"0"}
    assert load_calibration([(x, x)], source).batches[0].keys() == {"0", "1"}
    assert load_calibration([{"input": x}], source).batches[0].keys() == {"input"}
    with pytest.raises(CalibrationError, match="no transformers model"):
        load_calibration("random", source)


def test_random_is_seeded_and_said_loudly(llama: Source) -> None:
    one = load_calibration("random", llama, samples=4, sequence_length=8)
    assert "NOT text" in one.label and one.sequences == 4 and one.sequence_length == 8
    assert one.digest == load_calibration("random", llama, samples=4, sequence_length=8).digest
    assert one.digest != load_calibration("random", llama, samples=4, sequence_length=8, seed=1).digest


def test_self_is_sampled_from_the_model_and_leaves_the_random_state(llama: Source) -> None:
    state = torch.random.get_rng_state()
    one = load_calibration("self", llama, samples=3, sequence_length=10)
    assert torch.equal(torch.random.get_rng_state(), state)
    ids = torch.cat([b["input_ids"] for b in one.batches])
    assert ids.shape == (3, 10) and len(set(ids.flatten().tolist())) > 3
    assert one.digest == load_calibration("self", llama, samples=3, sequence_length=10).digest


def test_self_of_a_module_in_memory() -> None:
    assert load_calibration("self", open_source(build("gpt2")), samples=2, sequence_length=8).sequences == 2


def test_without_a_hub_the_default_is_self_and_says_so(llama: Source) -> None:
    found = load_calibration(None, llama, samples=2, sequence_length=8)
    assert found.label.startswith("self (") and "C4 is not to be had" in found.label


@pytest.mark.parametrize("family", ["vit", "bert"])
def test_self_of_a_model_that_cannot_generate(family: str, folder: Callable[[str], Path]) -> None:
    with pytest.raises(CalibrationError, match=r"not text|generate|causal"):
        load_calibration("self", open_source(folder(family)), samples=2, sequence_length=8)


def test_counts_below_one_are_refused(llama: Source) -> None:
    with pytest.raises(SpecError, match="fewer than one"):
        load_calibration("random", llama, samples=0)
    with pytest.raises(SpecError, match="fewer than two"):
        load_calibration("random", llama, sequence_length=1)


def test_text_becomes_windows_through_the_models_tokenizer(bundled: Path, tmp_path: Path) -> None:
    text = "def f(x):\n    return x + 1\n\n" * 200
    (tmp_path / "a.txt").write_text(text)
    source = open_source(bundled)
    found = load_calibration(str(tmp_path / "a.txt"), source, samples=4, sequence_length=32)
    assert found.sequences == 4
    for row in torch.cat([b["input_ids"] for b in found.batches]):
        assert source.tokenizer().decode(row)[8:40] in text
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "x"}) + "\n")
    with pytest.raises(CalibrationError, match="1 documents"):
        load_calibration(str(tmp_path / "rows.jsonl"), source, samples=4, sequence_length=32)


def test_a_folder_without_a_tokenizer_says_what_to_do(llama: Source, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text " * 100)
    with pytest.raises(Exception, match="token ids"):
        load_calibration(str(tmp_path / "a.txt"), llama, samples=1, sequence_length=8)
