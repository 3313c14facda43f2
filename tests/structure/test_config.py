"""What a model's config can say of its widths, and what it cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import transformers
from support.families import GQA

import sparsify
from sparsify.analysis.dimensions.groups import coupled_dimensions
from sparsify.analysis.dimensions.kinds import by_kind, group_kind, roles_of
from sparsify.errors import BackendError, SpecError
from sparsify.frontend.source import open_source
from sparsify.ir.program import Program
from sparsify.structure.config import Widths, by_part, changed, together

# Families whose config cannot say fewer channels: BLOOM's are four times its width, say.
REFUSED = ("bloom", "convnext", "mamba2")


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_whose_config_cannot_say_it(family: str, folder: Callable[[str], Path], tmp_path: Path) -> None:
    dense = folder(family)
    with pytest.raises(SpecError, match=r"the model's config cannot say|a norm is taken over them"):
        sparsify.compile(dense, ["llm-pruner:50%,importance=l2"], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "kind", "left", "says"),
    [
        ("llama", "channels", 48, {"intermediate_size": 48}),
        ("llama", "heads", 1, {"num_attention_heads": 2, "num_key_value_heads": 1}),
        # What a division gave until now is said from here on.
        ("qwen2", "heads", 1, {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}),
        ("qwen2", "width", 24, {"hidden_size": 24, "head_dim": 8}),
        # None stands for four times the width: from here on it is said.
        ("gpt2", "channels", 100, {"n_inner": 100}),
        ("mixtral", "experts", 3, {"num_local_experts": 3}),
        ("t5", "channels", 8, {"d_ff": 8}),
        ("bloom", "channels", 100, None),
    ],
)
def test_which_fields_say_a_width(
    family: str,
    kind: str,
    left: int,
    says: dict[str, int] | None,
    folder: Callable[[str], Path],
    captured: Callable[[str], Program],
) -> None:
    program, widths = captured(family), Widths(open_source(folder(family)))
    roles = roles_of(program)
    dimensions = coupled_dimensions(program)
    group = next(g for g in dimensions.prunable if group_kind(g, roles) == kind)
    said = widths.nearest(group, kind, left, by_kind(dimensions.prunable, roles)[kind])
    if says is None:
        assert (said.left, said.fields) == (len(group.free), {}) and "config cannot say" in str(said.reason)
    else:
        assert (said.left, said.fields, said.reason) == (left, says, None)


def test_a_config_is_changed_where_the_text_is_told_and_the_old_one_stays() -> None:
    plain = transformers.LlamaConfig(**GQA, architectures=["LlamaForCausalLM"])
    new = changed(plain, {"intermediate_size": 48})
    assert (new.intermediate_size, plain.intermediate_size) == (48, 64) and new.architectures == plain.architectures
    nested = transformers.LlavaConfig(text_config=plain)
    new = changed(nested, {"intermediate_size": 48})
    assert (new.text_config.intermediate_size, nested.text_config.intermediate_size) == (48, 64)
    assert type(new) is transformers.LlavaConfig
    new = changed(nested, {"intermediate_size": 48, "vision_config.intermediate_size": 32})
    assert (new.text_config.intermediate_size, new.vision_config.intermediate_size) == (48, 32)
    assert by_part(nested, {"a": 1, "vision_config.b": 2}) == {("text_config",): {"a": 1}, ("vision_config",): {"b": 2}}
    assert by_part(plain, {"a": 1}) == {(): {"a": 1}}


def test_the_fields_of_all_groups_must_agree() -> None:
    assert together([{"a": 1}, {"b": 2}, {"a": 1}]) == {"a": 1, "b": 2}
    with pytest.raises(BackendError, match="layers of different widths, a of 1 and of 2"):
        together([{"a": 1}, {"a": 2}])


def test_heads_come_in_the_nearest_number_that_a_config_takes() -> None:
    """A model of which only even numbers build: of three heads four stay, which is as near as two and loses less."""

    class Even(Widths):
        def __init__(self) -> None:
            self._found = {}

        def _candidates(self, kind: str, before: int, after: int) -> Any:
            yield {"num_attention_heads": after}

        def _builds(self, group: Any, changes: Any, count: int, alike: Any) -> bool:
            return count % 2 == 0

    group = SimpleNamespace(members=[SimpleNamespace(parameter="q", axis=0)], channels=8, free=numpy.arange(8))
    said = Even().nearest(group, "heads", 3, ())  # type: ignore[arg-type]
    assert (said.left, said.fields) == (4, {"num_attention_heads": 4})
    assert said.reason == "4 heads and not 3: nearest that the config takes"
