from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from sparsify.errors import SpecError
from sparsify.ir.program import Program
from sparsify.method.pattern import parse_pattern
from sparsify.prune.names import Wanted
from sparsify.prune.targets import choose


@pytest.fixture(scope="module")
def program(captured: Callable[[str], Program]) -> Callable[[str], Program]:
    return captured


def chosen(
    program: Program, pattern: str = "2:4", only: Sequence[str] = (), ignore: Sequence[str] = ()
) -> tuple[list[str], dict[str, str]]:
    targets, skipped = choose(program, parse_pattern(pattern), Wanted.of(program.weights, only, ignore))
    return [t.site.name for t in targets], {s.node: s.reason for s in skipped}


def test_by_default_what_is_inside_the_blocks(program: Callable[[str], Program]) -> None:
    names, skipped = chosen(program("llama"))
    assert len(names) == 14 and all(name.startswith("model.layers.") for name in names)
    assert "outside the repeated blocks" in skipped["lm_head"]


def test_a_tied_head_is_left_alone_even_when_asked_for(program: Callable[[str], Program]) -> None:
    _, skipped = chosen(program("opt"))
    assert "shared with the embedding" in skipped["model.decoder.embed_tokens"]
    with pytest.raises(SpecError, match=r"nothing to prune.*shared with the embedding"):
        chosen(program("opt"), only=["lm_head"])


def test_an_untied_head_can_be_asked_for(program: Callable[[str], Program]) -> None:
    assert chosen(program("llama"), only=["lm_head"])[0] == ["lm_head"]


def test_routers_are_left_dense_and_named(program: Callable[[str], Program]) -> None:
    names, skipped = chosen(program("mixtral"))
    assert "a router" in skipped["model.layers.0.mlp.gate"]
    assert not any(name.endswith("mlp.gate") for name in names)


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("model.layers.0.self_attn.q_proj", 1),
        ("model.layers.0.self_attn.q_proj.weight", 1),
        ("model.layers.0", 7),
        ("model.layers.0.mlp", 3),
        ("*.q_proj", 2),
        ("mlp*", 6),
        ("*layers.1.*", 7),
        ("re:.*q_proj$", 2),
        (r"re:.*(gate|up)_proj\.weight", 4),
        ("re:.*self_attn", 8),
    ],
)
def test_name_patterns(program: Callable[[str], Program], pattern: str, count: int) -> None:
    assert len(chosen(program("llama"), only=[pattern])[0]) == count
    assert len(chosen(program("llama"), ignore=[pattern])[0]) == 14 - count


def test_only_and_ignore_together(program: Callable[[str], Program]) -> None:
    names, skipped = chosen(program("llama"), only=["mlp*"], ignore=["*down_proj"])
    assert len(names) == 4 and skipped["model.layers.0.mlp.down_proj"] == "named by --ignore"
    assert skipped["model.layers.0.self_attn.q_proj"] == "not named by --only"


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("q_proj", "Names that contain it: model.layers.0.self_attn.q_proj"),
        ("Linera", "Near names"),
        ("*.k_porj", "*.k_proj"),
        ("re:[", "not a regular expression"),
        ("model.layers.7", "matches no parameter"),
    ],
)
@pytest.mark.parametrize("flag", ["only", "ignore"])
def test_what_matches_nothing_is_an_error(
    program: Callable[[str], Program], pattern: str, says: str, flag: str
) -> None:
    with pytest.raises(SpecError) as caught:
        chosen(program("llama"), **{flag: [pattern]})
    assert says in str(caught.value)


def test_names_are_the_checkpoints_own(program: Callable[[str], Program]) -> None:
    """transformers renames and stacks Mixtral's experts; users know the names in the files."""
    vit = program("vit")
    assert len(chosen(vit, only=["vit.encoder.layer.0.attention.attention.query"])[0]) == 1
    mixtral = program("mixtral")
    wanted = Wanted.of(mixtral.weights, ["model.layers.0.block_sparse_moe.experts.1.w1"])
    targets, _ = choose(mixtral, parse_pattern("2:4"), wanted)
    assert [(t.site.name, t.sources) for t in targets] == [
        (
            "model.layers.0.mlp.experts.gate_up_proj",
            frozenset(["model.layers.0.block_sparse_moe.experts.1.w1.weight"]),
        )
    ]


def test_sites_that_do_not_fit_are_listed(program: Callable[[str], Program]) -> None:
    names, skipped = chosen(program("mamba"), "2:4")
    assert skipped["backbone.layers.0.mixer.dt_proj"] == "in_features 2 is not a multiple of 4"
    assert "backbone.layers.0.mixer.x_proj" in names


def test_nothing_that_fits_is_an_error(program: Callable[[str], Program]) -> None:
    with pytest.raises(SpecError, match="in_features 32 is not a multiple of 7"):
        chosen(program("llama"), "3:7")


def test_tensors_by_the_names_that_they_come_to_have(program: Callable[[str], Program]) -> None:
    """A smaller model renames some; who was named stays named, and who was not does not become so."""
    wanted = Wanted(frozenset({"block.3.up", "block.5.up", "head"}), frozenset({"block.5.down"}))
    after = wanted.renamed(
        {
            "block.3.up": "block.2.up",
            "block.5.up": "block.3.up",
            "block.5.down": "block.3.down",
            "block.4.up": "block.4.up",
        }
    )
    assert after == Wanted(frozenset({"block.2.up", "block.3.up", "head"}), frozenset({"block.3.down"}))
    assert Wanted(ignored=frozenset({"head"})).renamed({"head": "tail"}) == Wanted(None, frozenset({"tail"}))
    assert Wanted().renamed({"a": "b"}) == Wanted(), "everything is still everything"
    gone = Wanted(frozenset({"experts.0", "experts.1"}), frozenset({"experts.0"}))
    assert gone.renamed({"experts.0": None, "experts.1": "experts.0"}) == Wanted(frozenset({"experts.0"}), frozenset())
    named = Wanted.of(program("llama").weights, ["model.layers.1.mlp"], ["*.up_proj"])
    assert named.only is not None
    moved = named.renamed({n: n.replace("layers.1.", "layers.0.") for n in named.only | named.ignored})
    assert moved.only == Wanted.of(program("llama").weights, ["model.layers.0.mlp"]).only
    assert "model.layers.0.mlp.up_proj.weight" in moved.ignored
