"""Measure how easy the code is to enter: modules at the top, words, lengths and copies.

    python scripts/measure_code.py

Status 1 where a bound is passed (`BOUNDS`).
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Words that the field says otherwise; CONTRIBUTING.md has the table.
REPLACED = re.compile(
    r"\b(told|lacks?|mends?|mended|anew|whole|go(es|ing|ne)? on|text towers?|pictures?|drawn|draws?"
    r"|drawing|drew|embedded stor(y|ies))\b|(?<!image )\bcodecs?\b",
    re.IGNORECASE,
)
FUNCTION_LINES, FILE_LINES, TEST_LINES, COPIED_LINES = 60, 450, 500, 6
BOUNDS = {
    "modules at the package's top": 6,
    "replaced words in 1,000 of docstrings": 1.0,
    "replaced words in 1,000 of README and docs": 2.0,
    f"functions over {FUNCTION_LINES} lines": 3,
    f"files over {FILE_LINES} lines": 0,
    f"test files over {TEST_LINES} lines": 0,
    f"copies of {COPIED_LINES} or more lines": 8,  # signatures, most of them
}


def tracked(*patterns: str) -> list[Path]:
    """Files that git tracks."""
    command = ["git", "ls-files", "--", *patterns]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / line for line in listed.splitlines()]


def rate(texts: list[str]) -> float:
    """Replaced words in 1,000 words of texts; code between backquotes counts for nothing."""
    prose = [re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL) for text in texts]
    found = sum(len(REPLACED.findall(text)) for text in prose)
    return 1000 * found / max(sum(len(text.split()) for text in prose), 1)


def definitions(path: Path) -> Iterator[ast.AST]:
    """The module, its classes and its functions."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds))


def docstrings(paths: list[Path]) -> list[str]:
    """All docstrings of source files."""
    nodes = [node for path in paths for node in definitions(path)]
    return [ast.get_docstring(node) or "" for node in nodes]  # type: ignore[arg-type]


def long_functions(paths: list[Path]) -> list[str]:
    """Functions over the bound, each as `file:line name`."""
    return [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in paths
        for node in definitions(path)
        if isinstance(node, ast.FunctionDef)
        and (node.end_lineno or 0) - node.lineno + 1 > FUNCTION_LINES
    ]


def long_files(paths: list[Path], most: int) -> list[str]:
    """Files over a bound."""
    return [
        str(path.relative_to(ROOT)) for path in paths if len(path.read_text().splitlines()) > most
    ]


def code_lines(path: Path) -> list[tuple[int, str]]:
    """Line numbers and stripped lines, without blank lines, comments and imports."""
    text = path.read_text()
    nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Import | ast.ImportFrom)]
    imports = {number for n in nodes for number in range(n.lineno, (n.end_lineno or 0) + 1)}
    lines = ((number, line.strip()) for number, line in enumerate(text.splitlines(), 1))
    return [(n, line) for n, line in lines if line and line[0] != "#" and n not in imports]


def copies(paths: list[Path]) -> list[str]:
    """Pairs of places that share `COPIED_LINES` or more consecutive lines of code."""
    code = {path: code_lines(path) for path in paths}
    windows = defaultdict(list)
    for path, lines in code.items():
        texts = [line for _, line in lines]
        for start in range(len(lines) - COPIED_LINES + 1):
            windows[tuple(texts[start : start + COPIED_LINES])].append((path, start))
    pairs = {pair for places in windows.values() for pair in combinations(places, 2)}
    firsts = [(a, b) for a, b in pairs if ((a[0], a[1] - 1), (b[0], b[1] - 1)) not in pairs]
    return sorted(
        " = ".join(f"{path.relative_to(ROOT)}:{code[path][start][0]}" for path, start in pair)
        for pair in firsts
    )


def measure() -> dict[str, tuple[float, list[str]]]:
    """Each figure of `BOUNDS`, and the things that it counts."""
    ours = tracked("contextualstory_jax/*.py", "scripts/*.py", "configs/*.py", "convert_weights.py")
    pages = [path.read_text() for path in tracked("README.md", "docs/*.md", "CONTRIBUTING.md")]
    top = [path.name for path in tracked("contextualstory_jax/*.py") if path.parent.parent == ROOT]
    lists = (top, [], [], long_functions(ours), long_files(ours, FILE_LINES))
    lists += (long_files(tracked("tests/*.py"), TEST_LINES), copies(ours))
    values = [float(len(things)) for things in lists]
    values[1:3] = rate(docstrings(ours)), rate(pages)
    return dict(zip(BOUNDS, zip(values, lists, strict=True), strict=True))


def main() -> int:
    """Print the figures; returns the exit status."""
    status = 0
    for name, (value, things) in measure().items():
        too_much = value > BOUNDS[name]
        status |= too_much
        print(f"{value:8.4g}  {name}, at most {BOUNDS[name]}{'  <-- over' if too_much else ''}")
        for thing in things:
            print(f"          {thing}")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
