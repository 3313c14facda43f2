"""``sparsify report``: one page of HTML about a folder that sparsify wrote, which loads nothing and runs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from sparsify.errors import BackendError
from sparsify.files.reading import kind_at
from sparsify.files.single import check_file, put_file
from sparsify.provenance.places import folder_of
from sparsify.reporting.changes import left_dense, structure, trained
from sparsify.reporting.facts import Facts, facts_of
from sparsify.reporting.maps import layers
from sparsify.reporting.markup import Markup, joined, tag, text
from sparsify.reporting.past import again, history
from sparsify.reporting.sections import costs, head, quality
from sparsify.reporting.style import STYLE
from sparsify.words import path_given, paths_given

if TYPE_CHECKING:
    from sparsify.compiler.result import Compiled

# By which a page of ours is told from what else is called so.
_OURS = '<meta name="generator" content="sparsify report">'
# A browser that reads this fetches nothing and runs nothing, whatever a name in the manifest might be.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def report(
    folder: str | Path | Compiled,
    output: str | Path = "report.html",
    *,
    evaluation: str | Path | Sequence[str | Path] = (),
    overwrite: bool = False,
    check: bool = True,
) -> Path:
    """Write a page about ``folder``, which sparsify wrote: what was done to its model, how many of its numbers are
    zero, what that cost, layer by layer, and how to do it again. No weight is read.

    Args:
        folder: its path, or a result of :func:`sparsify.compile` that was written.
        evaluation: files of what ``sparsify eval MODEL OUT --json`` printed of the folder: perplexity and tasks.
        output: the page. overwrite: replace an older page of this kind, and no other file.
        check: hold ``sparsify.json`` against the digest that it has of itself.

    Returns:
        where the page lies.

    Raises:
        SpecError: a result that was not written. CheckpointError: no folder of ours, or a damaged ``sparsify.json``;
            an evaluation of another folder, or a file that is none.
        BackendError: ``output`` is there already, is no place for a file, or lies in ``folder``.
    """
    own = Path(folder_of(folder, "a page")).expanduser().absolute()
    into = path_given(output, "a page").absolute()
    facts = facts_of(own, check, paths_given(evaluation, "--eval"))
    _check_place(into, own, overwrite)
    put_file(into, page(facts).encode())
    return into


def page(facts: Facts) -> str:
    """The whole page. The same facts give the same bytes."""
    title = f"{facts.base}, by sparsify"
    parts = (head, layers, trained, structure, quality, costs, left_dense, history, again)
    made = f"Made by sparsify {version('sparsify-fx')} of sparsify.json (BLAKE2b {facts.digest}). "
    footer = tag("footer", made, "This page is one file: it loads nothing and runs nothing.")
    top = [
        tag("meta", charset="utf-8"),
        Markup(_OURS),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", text(title)),
        Markup(f"<style>{STYLE}</style>"),
    ]
    main = tag("main", *(part(facts) for part in parts), footer)
    whole = joined(
        [Markup('<!DOCTYPE html>\n<html lang="en">'), tag("head", *top), tag("body", main), Markup("</html>\n")]
    )
    # Lines at which a person can look at it, and a program compare two.
    return whole.replace("><section", ">\n<section").replace("><tr", ">\n<tr").replace("<article", "\n<article")


def _check_place(into: Path, folder: Path, overwrite: bool) -> None:
    asked, here = f"page {into}", into.resolve()
    if folder.resolve() in here.parents:
        found = f"it lies in {folder}, whose files sparsify.json lists"
        raise BackendError(asked, found=found, do="Choose another place with -o")
    if kind_at(into) == "folder":
        raise BackendError(asked, found="a folder", do=f"Name a file in it: -o {into / 'report.html'}")
    check_file(into, "page", (_OURS,), "sparsify report", overwrite=overwrite, option="-o")
