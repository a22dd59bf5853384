"""Make instruction data for code from Python's own standard library: signature and docstring in, body out.

    python scripts/build_functions.py python-functions

Each line has a prompt (a function down to the end of its docstring, like a HumanEval problem), its completion (the
body) and an id (file and line). Functions that are long, trivial or undocumented are left out, and so are the library's
tests. Modules go to one split whole, by a hash of their name: a tenth each to validation and test. The text is that of
the Python which runs this (PSF licence); nothing of it is kept in this repository.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LONGEST = 24
"""Lines of a body."""

_LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "__pycache__", "turtledemo"}


def functions(file: Path, name: str) -> Iterator[dict[str, Any]]:
    """The documented functions and methods of a module, as prompts and completions."""
    try:
        source = file.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError):
        return
    lines = source.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or not ast.get_docstring(node) or len(node.body) < 2:
            continue
        docstring, first, last = node.body[0], node.body[1].lineno, node.end_lineno or 0
        if not 2 <= last - first + 1 <= LONGEST or docstring.end_lineno is None or docstring.end_lineno >= first:
            continue
        # Comments between the docstring and the first statement belong to the body.
        body = lines[docstring.end_lineno : last]
        prompt = textwrap.dedent("\n".join(lines[node.lineno - 1 : docstring.end_lineno]) + "\n")
        completion = "\n".join(line.removeprefix(" " * node.col_offset) for line in body) + "\n"
        yield {"id": f"{name}:{node.lineno}", "prompt": prompt, "completion": completion}


def split_of(name: str) -> str:
    """The split of a module: its submodules go where it goes."""
    digit = hashlib.sha256(name.partition("/")[0].encode()).digest()[0] % 10
    return {0: "test", 1: "validation"}.get(digit, "train")


def main() -> None:
    """Write train, validation and test files into the folder named on the command line."""
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/build_functions.py FOLDER")
    library, out = Path(sysconfig.get_path("stdlib")), Path(sys.argv[1])
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    seen: set[str] = set()
    for file in sorted(library.rglob("*.py")):
        name = file.relative_to(library).as_posix()
        if _LEFT_OUT & set(name.split("/")):
            continue
        for row in functions(file, name):
            if row["completion"] not in seen:
                seen.add(row["completion"])
                rows[split_of(name)].append(row)
    out.mkdir(parents=True, exist_ok=True)
    for split, of in rows.items():
        (out / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of), encoding="utf-8")
        print(f"{out / split}.jsonl: {len(of)} functions")


if __name__ == "__main__":
    main()
