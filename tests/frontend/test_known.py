"""Habits of Python that ask tensors for numbers: answered from constants, asked of a batch, or refused in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from support.regions import execute
from torch import Tensor, nn

import sparsify
from sparsify.errors import CalibrationError, TraceError
from sparsify.frontend.capture import capture
from sparsify.frontend.source import open_source
from sparsify.ir.graph import runnable
from sparsify.ir.program import Program


class Habit(nn.Module):
    """A layer, and a habit in the way that it is used; ``stride`` is a buffer that a model makes for itself."""

    def __init__(self, habit: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 8)
        self.register_buffer("stride", torch.tensor(3), persistent=False)
        self.habit = habit

    def forward(self, x: Tensor) -> Tensor:
        return self.habit(self, x)


def pads(own: Any, x: Tensor) -> Tensor:
    """EnCodec, Mimi, WavTokenizer: how far to pad is computed with buffers of one number."""
    frames = torch.ceil((x.shape[1] - own.stride + 1) / own.stride + 1).to(torch.int64)
    right = frames * own.stride - x.shape[1]
    if x.shape[1] <= max(own.stride, right):
        right = right + 1
    return own.layer(nn.functional.pad(x, (0, 0, own.stride, right))[:, : x.shape[1] + own.stride])


def windows(own: Any, x: Tensor) -> Tensor:
    """Qwen2.5-VL: windows as long as a difference of sums of a tensor of sizes."""
    ends = torch.cumsum(torch.tensor([2, 3, x.shape[1] - 5]), 0)
    starts = nn.functional.pad(ends, (1, 0))
    parts = torch.split(x, (starts[1:] - starts[:-1]).tolist(), dim=1)
    return torch.cat([own.layer(part).cumsum(1) for part in parts], 1)


def shapes(own: Any, x: Tensor) -> Tensor:
    """SAM 3: a tensor of heights and widths, read again for a grid."""
    height, width = torch.tensor([(x.shape[0], x.shape[1])])[0]
    grid = torch.arange(0, height)[:, None] * 2 + torch.arange(0, width)
    return own.layer(x + grid[..., None].to(x.dtype))


def masks(own: Any, x: Tensor) -> Tensor:
    """Longformer without a mask: one of ones, and whether it marks anything; a row for each that it leaves."""
    mask = torch.ones(x.shape[:2], dtype=torch.long)
    mask[:, -2:] = 0
    if (mask > 1).any():
        return x
    kept = mask[0].nonzero()[:, 0]
    rows = [own.layer(x[:, int(i)]) for i in kept]
    filled = torch.zeros_like(x)
    filled[:, kept] = torch.stack(rows, 1)
    return filled


def loops(own: Any, x: Tensor) -> Tensor:
    """Qwen4: for every position those before it, by a mask of numbers alone."""
    visible = torch.tril(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool))
    rows = [x[:, torch.nonzero(row).flatten()].mean(1) for row in visible]
    return own.layer(torch.stack(rows, 1))


@pytest.mark.parametrize("habit", [pads, windows, shapes, masks, loops])
@pytest.mark.parametrize("length", [7, 9])
def test_what_follows_from_shapes_is_answered(habit: Callable[[Any, Tensor], Tensor], length: int) -> None:
    model = Habit(habit)
    program = capture(open_source(model), {"0": torch.zeros(2, length, 8)})
    assert not program.ways
    for seed in (1, 2):
        x = torch.randn(2, length, 8, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(execute(program, [{"0": x}])[0], model(x))
    assert int(model.stride) == 3


def rewritten(own: Any, x: Tensor) -> Tensor:
    """A tensor of zeros is no constant any more once it holds what a layer gave."""
    found = torch.zeros(x.shape[0], x.shape[1])
    view = found[:, 1]
    found.copy_(own.layer(x).sum(-1))
    return x if view.sum() > 0 else -x


def chosen(own: Any, x: Tensor) -> Tensor:
    """UDOP, FastSpeech 2: as many rows as a layer's numbers say."""
    kept = own.layer(x)[0, :, 0] > 0
    return x[:, kept].sum(1) if kept.any() else x


@pytest.mark.parametrize("habit", [rewritten, chosen])
def test_what_depends_on_a_run_is_refused_in_words(habit: Callable[[Any, Tensor], Tensor]) -> None:
    with pytest.raises(
        TraceError, match=r"chooses a way or a size at test_known\.py:\d+ \(.*only a run can give"
    ) as told:
        capture(open_source(Habit(habit)), {"0": torch.zeros(2, 7, 8)})
    assert "u0" not in told.value.found


class Marked(nn.Module):
    """FSMT's habit: a mask where any token is padding, none where there is none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layer = nn.Embedding(16, 8), nn.Linear(8, 8)

    def forward(self, input_ids: Tensor) -> Tensor:
        mask = input_ids.eq(0)
        x = self.layer(self.embed(input_ids))
        if not mask.any():
            return x
        return x.masked_fill(mask[..., None], 0.0)


class Unmarked(Marked):
    """The other way round: a mask of ones is none."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
        x = self.layer(self.embed(input_ids))
        return x if attention_mask.bool().all() else x * attention_mask[..., None]


def test_a_mask_of_ones_is_the_usual_way() -> None:
    model, ones = Unmarked(), torch.ones(2, 6, dtype=torch.long)
    program = capture(open_source(model), {**tokens(0), "attention_mask": ones})
    batch = {**tokens(1), "attention_mask": ones}
    assert torch.equal(execute(program, [batch])[0], model(**batch))
    with pytest.raises(CalibrationError, match="goes another way"):
        execute(program, [{**tokens(1), "attention_mask": ones.tril()}])


def tokens(seed: int, low: int = 1) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(low, 16, (2, 6), generator=torch.Generator().manual_seed(seed))}


def marked() -> tuple[Marked, Program]:
    model = Marked()
    return model, capture(open_source(model), tokens(0))


def test_what_is_asked_of_tokens_is_asked_of_every_batch() -> None:
    model, program = marked()
    (way,) = program.ways
    assert way.inputs == ["input_ids"] and "test_known.py" in way.where and "mask.any()" in way.where
    module = runnable(program, torch.device("cpu"))
    for seed in (1, 2):
        assert torch.equal(execute(program, [tokens(seed)])[0], model(**tokens(seed)))
        assert torch.equal(module(**tokens(seed)), model(**tokens(seed)))
    padded = {"input_ids": torch.zeros(2, 6, dtype=torch.long)}
    with pytest.raises(AssertionError, match=r"other inputs than the graph is for, at test_known\.py"):
        module(**padded)
    with pytest.raises(CalibrationError, match=r"input input_ids of batch 1: .*another way .*mask\.any\(\)"):
        execute(program, [tokens(1), padded])


def test_a_compile_refuses_the_batch_that_goes_another_way() -> None:
    model = Marked()
    sparsify.compile(model, ["wanda:2:4"], calibration=[tokens(1), tokens(2)])
    with pytest.raises(CalibrationError, match="goes another way"):
        sparsify.compile(Marked(), ["wanda:2:4"], calibration=[tokens(1), {"input_ids": tokens(2)["input_ids"] * 0}])


SMALL = {"vocab_size": 64, "pad_token_id": 0, "decoder_start_token_id": 0}
SWITCH = {
    **SMALL, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 2,
    "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 4,
}  # fmt: skip
MODELS: dict[str, Callable[[], Any]] = {
    "longformer": lambda: hf.LongformerForMaskedLM(hf.LongformerConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        attention_window=4, max_position_embeddings=64)),
    "longt5": lambda: hf.LongT5ForConditionalGeneration(hf.LongT5Config(
        **SMALL, d_model=32, d_kv=8, d_ff=64, num_heads=4, num_layers=2, num_decoder_layers=2, local_radius=3)),
    "switch": lambda: hf.SwitchTransformersForConditionalGeneration(hf.SwitchTransformersConfig(**SWITCH)),
}  # fmt: skip


def built(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def words(name: str, seed: int) -> dict[str, Tensor]:
    chance = torch.Generator().manual_seed(seed)
    names = ("input_ids",) if name == "longformer" else ("input_ids", "decoder_input_ids")
    return {n: torch.randint(3, 64, (3, 12), generator=chance) for n in names}


@pytest.mark.first(1)
@pytest.mark.parametrize("name", MODELS)
def test_the_graph_is_the_model(name: str) -> None:
    model = built(name)
    program = capture(open_source(model), words(name, 0))
    for seed in (1, 2):
        with torch.no_grad():
            exact = model(**words(name, seed)).logits
        torch.testing.assert_close(execute(program, [words(name, seed)])[0], exact)


@pytest.mark.slow
def test_a_mask_reaches_longformer_and_marks_nothing_in_silence() -> None:
    model, ones = built("longformer"), torch.ones(3, 12, dtype=torch.long)
    program = capture(open_source(model), {**words("longformer", 0), "attention_mask": ones})
    padded = ones.clone()
    padded[:, 9:] = 0
    batch = {**words("longformer", 1), "attention_mask": padded}
    with torch.no_grad():
        torch.testing.assert_close(execute(program, [batch])[0], model(**batch).logits)
    # Two is a token of global attention.
    padded[:, 0] = 2
    with pytest.raises(CalibrationError, match=r"attention_mask of batch 0: .*modeling_longformer\.py"):
        execute(program, [{**batch, "attention_mask": padded}])


def test_experts_that_transformers_loops_over_are_pruned_by_their_own_tokens() -> None:
    model, batches = built("switch"), [words("switch", seed) for seed in (1, 2)]
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "expert_" in n}
    squares = {name: torch.zeros(layer.in_features) for name, layer in layers.items()}

    def counted(name: str) -> Callable[[Any, Any], None]:
        def count(_: Any, args: Any) -> None:
            squares[name] += args[0].reshape(-1, args[0].shape[-1]).square().sum(0)

        return count

    for name, layer in layers.items():
        layer.register_forward_pre_hook(counted(name))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    done = sparsify.compile(built("switch"), ["wanda:2:4"], calibration=batches, schedule="dense")
    compared = 0
    for name, layer in layers.items():
        if not squares[name].any():
            continue
        scores = (layer.weight.detach().abs() * squares[name].sqrt()).reshape(layer.out_features, -1, 4)
        order = scores.sort(-1, descending=True)
        kept = torch.zeros_like(scores).scatter(-1, order.indices[..., :2], 1).bool()
        # Of two scores alike, zeros behind a ReLU say, either may stay.
        apart = order.values[..., 1] - order.values[..., 2] > 1e-5 * order.values[..., 0]
        got = done.weight(f"{name}.weight").reshape(scores.shape) != 0
        assert torch.equal(got[apart], kept[apart]) and apart.float().mean() > 0.5, name
        compared += 1
    assert compared >= 12
