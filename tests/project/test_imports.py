"""Imports run one way, from the commands down to `config` and `utils` (docs/architecture.md)."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import contextualstory_jax

PACKAGE = "contextualstory_jax"
ROOT = Path(contextualstory_jax.__file__).parent

# What each room, a folder of the package, may import of ours beside itself. The commands (modules
# at the top and `commands/`) may import all. A new room gets its line here.
BASE = {"config", "utils"}
MAY_IMPORT = {
    "utils": set(),
    "config": {"utils"},
    "diffusion": BASE,
    "models": BASE,
    "data": BASE,
    "distributed": BASE,
    "checkpoints": {"distributed"} | BASE,
    "conversion": {"checkpoints", "distributed", "models"} | BASE,
    "sampling": {"conversion", "checkpoints", "models", "diffusion", "data", "distributed"} | BASE,
}
MAY_IMPORT["evaluation"] = {"sampling"} | MAY_IMPORT["sampling"]
MAY_IMPORT["training"] = {"sampling"} | MAY_IMPORT["sampling"]
MAY_IMPORT["testing"] = {"sampling"} | MAY_IMPORT["sampling"]
MAY_IMPORT["analysis"] = {"training"} | MAY_IMPORT["training"]
MAY_IMPORT["studio"] = {"sampling"} | MAY_IMPORT["sampling"]
MAY_IMPORT["commands"] = {"commands", "analysis", "evaluation", "studio", *MAY_IMPORT["analysis"]}
COMMANDS = {"__init__", "__main__", "train", "generate", "evaluate"}

# Libraries that few rooms hide from the others, and those that the package does without.
ONLY_IN = {
    "flax": {"models"},
    "orbax": {"checkpoints", "conversion", "distributed"},  # the last for its barrier
    "torch": {"conversion"},  # to read pickles
    **dict.fromkeys(("gradio", "fastapi", "uvicorn"), {"studio"}),
}
NOWHERE = {"diffusers", "tensorflow"}


def sources() -> dict[str, str]:
    """The source of each of our modules by its dotted name: `models.unet`, `models`, `train`."""
    paths = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.rglob("*.py")
    }
    return {name.removesuffix(".__init__"): path.read_text() for name, path in paths.items()}


def imported_names(source: str) -> set[str]:
    """The dotted names of all that a module imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (node.module or "")
            names |= {f"{origin}.{alias.name}" for alias in node.names}
    return names


def room(module: str) -> str:
    """The room of a module by its dotted name."""
    return module.split(".")[0] if "." in module or module in MAY_IMPORT else "commands"


def violations(module: str, source: str) -> set[str]:
    """The imports of a module that the tables above forbid."""
    here = room(module)

    def forbidden(name: str) -> bool:
        library, _, rest = name.partition(".")
        if library == "":
            return True  # relative: written in full, an import shows which way it runs
        if library == PACKAGE:
            there = rest.split(".")[0]
            if there == "__version__":
                return False
            if here == "commands":
                return there not in MAY_IMPORT[here] | COMMANDS
            return there not in MAY_IMPORT[here] | {here}
        return library in NOWHERE or here not in ONLY_IN.get(library, {here})

    return {name for name in imported_names(source) if forbidden(name)}


def test_every_room_has_its_line_in_the_table():
    names = {module.split(".")[0] for module in sources()}

    assert names - COMMANDS == MAY_IMPORT.keys()


def test_the_top_of_the_package_holds_the_commands_alone():
    assert {path.stem for path in ROOT.glob("*.py")} == COMMANDS


def test_neither_the_package_nor_the_scripts_import_tests():
    scripts = {path: path.read_text() for path in (ROOT.parent / "scripts").rglob("*.py")}
    everything = scripts | sources()
    assert len(everything) > 80

    for name, source in everything.items():
        assert not {n for n in imported_names(source) if n.split(".")[0] == "tests"}, name


def test_no_import_runs_against_the_arrows():
    found = {module: violations(module, source) for module, source in sources().items()}

    assert {module: names for module, names in found.items() if names} == {}


def test_no_modules_import_each_other_in_a_circle():
    modules = sources()

    def imported_modules(source: str) -> set[str]:
        names = {name.removeprefix(f"{PACKAGE}.") for name in imported_names(source)}
        # The last word names a module or something in one.
        owners = {name if name in modules else name.rpartition(".")[0] for name in names}
        return owners & modules.keys()

    graph = {module: imported_modules(source) for module, source in modules.items()}

    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_a_forbidden_import_is_found_in_every_form():
    source = """
import torch.nn
import jax.numpy as jnp
from orbax import checkpoint as ocp
from .. import config
from contextualstory_jax.config import model_config
from contextualstory_jax.sampling import pipeline
from contextualstory_jax.models.layers import Linear

def lazily():
    import contextualstory_jax.data.shapes
    from contextualstory_jax.conversion.torch_names import convert
"""

    assert violations("models.unet", source) == {
        "torch.nn",
        "orbax.checkpoint",
        "...config",
        "contextualstory_jax.sampling.pipeline",
        "contextualstory_jax.data.shapes",
        "contextualstory_jax.conversion.torch_names.convert",
    }
