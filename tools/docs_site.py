"""What the documentation site (``mkdocs.yml``, ``make docs``) makes by itself: pages of every command, pass and name.

README.md and CONTRIBUTING.md are pages too, as they stand. Links in them and in docs/ go to files as they lie in the
repository, so that they work there; a link to what is no page of the site becomes plain words.
"""

from __future__ import annotations

import argparse
import json
import os
import posixpath
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# Pages of the site that lie elsewhere.
COPIED = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md"}
MADE = {"reference/commands.md": "commands", "reference/passes.md": "passes", "reference/api.md": "api"}
# What is code is passed over.
LINK = re.compile(r"```.*?```|`[^`\n]*`|\[([^\]]*)\]\(([^)\s#]*)(#[^)\s]*)?\)", flags=re.S)


def on_files(files: Any, config: Any) -> Any:
    """mkdocs' event: the pages that lie elsewhere or are made."""
    from mkdocs.structure.files import File  # type: ignore[import-not-found, unused-ignore]

    for name, source in COPIED.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text()))
    for name, kind in MADE.items():
        files.append(File.generated(config, name, content=PAGES[kind]()))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """mkdocs' event: links."""
    name = page.file.src_uri
    return markdown if name in MADE else relinked(markdown, COPIED.get(name, f"docs/{name}"))


def relinked(text: str, source: str) -> str:
    """``text`` of the file ``source`` of the repository, its links those of the site.

    Raises:
        ValueError: it links to what does not exist.
    """
    page = {original: f"docs/{name}" for name, original in COPIED.items()}

    def link(found: re.Match[str]) -> str:
        words, target, anchor = found[1], found[2], found[3] or ""
        if words is None or not target or "://" in target:
            return found[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if not (ROOT / path).exists():
            raise ValueError(f"{source} links to {target}, which does not exist")
        path = page.get(path, path)
        if not path.startswith("docs/"):
            return f"{words}"  # no page: a file of the repository
        here = posixpath.dirname(page.get(source, source))
        return f"[{words}]({posixpath.relpath(path, here)}{anchor})"

    return LINK.sub(link, text)


def said(*words: str) -> str:
    """What sparsify prints."""
    surroundings = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "sparsify", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=surroundings).stdout


def commands() -> str:
    """Every command's help."""
    listed = said("--help").partition("Commands:")[2]
    names = re.findall(r"^  (\w[\w-]*)  ", listed, flags=re.M)
    parts = [f"## sparsify {name}\n\n```text\n{said(name, '--help').strip()}\n```" for name in names]
    return "# Commands\n\nAs `sparsify COMMAND --help` says.\n\n" + "\n\n".join(parts) + "\n"


def passes() -> str:
    """Every pass and its options; those that many share once, at the end."""
    parts, shared = ["# Passes\n\nAs `sparsify passes NAME` says."], dict[str, list[str]]()
    for own in json.loads(said("passes", "--json")):
        taken = f"Take it {own['when']}." if own["when"] else ""
        example = f"    sparsify compile MODEL --pass {own['example']}" if own["example"] else ""
        lines = [f"## {own['name']}", own["does"], taken, example, options(own["options"])]
        parts.append("\n\n".join(line for line in lines if line))
        if own["common_options"]:
            shared.setdefault(options(own["common_options"]), []).append(own["name"])
    for table, names in shared.items():
        parts.append(f"## Options of {', '.join(names)}\n\n{table}")
    return "\n\n".join(parts) + "\n"


def options(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    lines = [f"| `{o['name']}` | {cell(o['values'])} | {cell(o['default'])} | {cell(o['meaning'])} |" for o in rows]
    return "\n".join(["| option | values | default | meaning |", "| --- | --- | --- | --- |", *lines])


def cell(value: Any) -> str:
    return "the method's own" if value is None else str(value).replace("|", "\\|").replace("\n", " ")


def api() -> str:
    """Every name that ``sparsify`` itself has."""
    import sparsify

    parts = [f"::: {getattr(sparsify, name).__module__}.{name}" for name in sorted(sparsify.__all__)]
    return "# Python\n\nThe stable names.\n\n" + "\n\n".join(parts) + "\n"


PAGES: dict[str, Callable[[], str]] = {"commands": commands, "passes": passes, "api": api}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", choices=PAGES, help="the page to print, as Markdown")
    print(PAGES[parser.parse_args().page]())


if __name__ == "__main__":
    main()
