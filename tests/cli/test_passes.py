"""``sparsify passes``: what each method does, and what it takes."""

from __future__ import annotations

import json

from support.command_line import sparsify


def test_one_in_full() -> None:
    said = sparsify("passes", "wanda").stdout
    for line in ("sparsify compile MODEL --pass wanda:2:4", "Take it ", "norm=l2 or l1 or max  (default l2)"):
        assert line in said
    assert "Options of every pass that prunes weights" in said and "``" not in said and ":class:" not in said
    assert sparsify("passes", "wanda:2:4").stdout == said, "a spec names a pass too"
    wrong = sparsify("passes", "wnda")
    assert wrong.returncode == 2 and "Near names: wanda" in wrong.stderr


def test_as_json() -> None:
    every = {row["name"]: row for row in json.loads(sparsify("passes", "--json").stdout)}
    assert every["twin"] == json.loads(sparsify("passes", "twin", "--json").stdout)
    assert {o["name"] for o in every["twin"]["options"]} >= {"mask", "blend", "percdamp"}
    assert every["magnitude"]["common_options"][1] == {
        "name": "blocksize",
        "meaning": "how many neighbouring output neurons (or inputs) compete together.",
        "values": "a whole number",
        "default": 1,
    }


def test_the_list_has_every_pass_once() -> None:
    said = sparsify("passes").stdout
    assert said.count("wanda:PATTERN") == 1 and said.count("every pass that prunes weights has") == 1
