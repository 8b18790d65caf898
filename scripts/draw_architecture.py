"""Write the diagram and the table of docs/architecture.md from the package's imports.

python scripts/draw_architecture.py           # writes them
python scripts/draw_architecture.py --check   # status 1 where they differ from the imports
"""

from __future__ import annotations

import argparse
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "contextualstory_jax"
DOCUMENT = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- rooms: scripts/draw_architecture.py -->\n", "<!-- end of rooms -->\n"
COMMANDS = "commands"  # the modules at the package's top belong with the subcommands


def room_of(path: Path) -> str:
    """The folder of a source file, by its path below the package."""
    return path.parts[0] if len(path.parts) > 1 else COMMANDS


def room_imports(package: Path) -> dict[str, set[str]]:
    """The folders that each folder imports, inside functions too."""
    imports: dict[str, set[str]] = {}
    for path in package.rglob("*.py"):
        here = room_of(path.relative_to(package))
        found = imports.setdefault(here, set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{PACKAGE}."):
                there = (node.module or "").split(".")[1]
                found.add(there if (package / there).is_dir() else COMMANDS)
    return {room: found - {room} for room, found in imports.items()}


def floors(imports: dict[str, set[str]]) -> list[list[str]]:
    """The folders from the top down: each imports only folders of later lists."""
    height: dict[str, int] = {}

    def measure(room: str) -> int:
        if room not in height:
            height[room] = max((measure(below) + 1 for below in imports[room]), default=0)
        return height[room]

    for room in imports:
        measure(room)
    return [
        sorted(room for room in imports if height[room] == floor)
        for floor in range(max(height.values()), -1, -1)
    ]


def direct(imports: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The arrows of the diagram: without those that follow from others."""

    def reached(room: str) -> set[str]:
        return imports[room].union(*(reached(below) for below in imports[room]))

    return [
        (room, below)
        for room in sorted(imports)
        for below in sorted(imports[room])
        if not any(below in reached(other) for other in imports[room] - {below})
    ]


def first_line(package: Path, room: str) -> str:
    """First line of a folder's docstring."""
    docstring = ast.get_docstring(ast.parse((package / room / "__init__.py").read_text()))
    return (docstring or "").split("\n")[0].rstrip(".")


def draw(package: Path) -> str:
    """The Mermaid diagram and the table, as Markdown."""
    imports = room_imports(package)
    arrows = [f"    {room} --> {below}" for room, below in direct(imports)]
    rows = [
        f"| `{PACKAGE}/{room}/` | {first_line(package, room)} "
        f"| {' '.join(sorted(imports[room])) or 'none'} |"
        for floor in floors(imports)
        for room in floor
    ]
    return "\n".join(
        (
            "```mermaid",
            "graph TD",
            *arrows,
            "```",
            "",
            "| folder | holds | imports |",
            "|---|---|---|",
            *rows,
            "",
        )
    )


def main(argv: list[str] | None = None) -> int:
    """Write the document, or compare with it; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    check = parser.parse_args(argv).check
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    new = f"{before}{BEGIN}\n{draw(ROOT / PACKAGE)}\n{END}{after}"
    if not check:
        DOCUMENT.write_text(new, encoding="utf-8")
    elif new != text:
        print(f"{DOCUMENT.name} is not what the imports say; run {sys.argv[0]}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
