"""docs/architecture.md speaks of files and names that exist."""

import ast
import re
from pathlib import Path

import pytest

from scripts import draw_architecture

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "architecture.md").read_text()
CODE = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL))
PACKAGE = ROOT / "contextualstory_jax"


def defined_names() -> set[str]:
    """Classes, functions, methods and top-level constants of the package, and Class.method."""
    names = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                methods = [n.name for n in node.body if isinstance(n, ast.FunctionDef)]
                names |= {node.name, *methods, *(f"{node.name}.{method}" for method in methods)}
            elif isinstance(node, ast.FunctionDef):
                names.add(node.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names |= {t.id for t in targets if isinstance(t, ast.Name)}
    return names


def test_named_files_exist():
    files = [c for c in CODE if re.fullmatch(r"[\w./]+(\.py|/)", c)]
    assert len(files) > 20
    for file in files:
        assert (ROOT / file).exists() or (PACKAGE / file).exists(), file


def test_named_functions_exist():
    words = [c for c in CODE if re.fullmatch(r"[A-Za-z_]\w*(\.[a-z]\w*)?", c)]
    words = [w for w in words if not w.endswith((".py", ".json"))]
    foreign = {"alpha", "attention_head_dim"}  # fields
    names = defined_names()
    assert len(words) > 40
    for word in set(words) - foreign:
        assert word in names, word


def test_the_picture_is_that_of_the_imports():
    assert draw_architecture.main(["--check"]) == 0


def test_an_import_that_the_picture_lacks_is_noticed(tmp_path, monkeypatch):
    document = tmp_path / "architecture.md"
    document.write_text(TEXT.replace("    data --> config\n", ""))
    monkeypatch.setattr(draw_architecture, "DOCUMENT", document)

    assert draw_architecture.main(["--check"]) == 1
    assert draw_architecture.main([]) == 0
    assert document.read_text() == TEXT


def test_rooms_stand_above_what_they_import():
    imports = {"top": {"middle", "base"}, "middle": {"base"}, "base": set()}

    assert draw_architecture.floors(imports) == [["top"], ["middle"], ["base"]]
    assert draw_architecture.direct(imports) == [("middle", "base"), ("top", "middle")]


@pytest.mark.parametrize("page", ["docs/architecture.md", "docs/where-is-it.md", "CONTRIBUTING.md"])
def test_linked_functions_are_in_the_files_of_their_links(page):
    path = ROOT / page
    links = re.findall(r"\[(`?)([\w./]+)`?\]\(([^)#:]+)\)", path.read_text())
    assert len(links) >= 8

    for code, name, link in links:
        file = path.parent / link
        assert file.exists(), link
        if code and file.suffix == ".py":
            assert not missing(name, file.read_text()), f"{name} is not in {link}"


def missing(name: str, source: str) -> list[str]:
    """The words of `Class.method` that a module does not define."""
    defined = set(re.findall(r"(?:def|class) (\w+)|^(\w+)(?:: [^=\n]+)? = ", source, re.MULTILINE))
    names = {word for pair in defined for word in pair}
    return [word for word in name.split(".") if word not in names]


def test_a_link_to_a_function_that_is_elsewhere_is_noticed():
    source = "RULES = 1\nclass Placement:\n    def spec(self): ...\n"

    assert missing("Placement.spec", source) == missing("RULES", source) == []
    assert missing("Placement.rules", source) == ["rules"]
