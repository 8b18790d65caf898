"""Imports run one way, from the commands down to `config` and `errors` (docs/architecture.md)."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import contextualstory_jax

PACKAGE = "contextualstory_jax"
ROOT = Path(contextualstory_jax.__file__).parent

# What each room, a file or folder at the top of the package, may import of ours. A new room gets
# its line here.
GROUND = {"recipe_config", "config", "files", "errors", "interruption"}
LIBRARY = {
    "camera",
    "captions",
    "models",
    "diffusion",
    "data",
    "metrics",
    "stories",
    "cli",
    "processes",
    "sharding",
    "hlo",
    "tiles",
}
MIDDLE = {
    "arguments",
    "pretrained",
    "pipeline",
    "output",
    "vocabulary",
    "about",
    "drawing",
    "progress",
    "ahead",
    "compilation",
    "trainer",
    "model",
    "state",
    "tokenizer",
    "checkpoint",
    "orbax_checkpoints",
    "convert",
    "export",
    "exported",
    "flops",
    "hub",
    "initial",
    "latents",
    "released",
    "streaming",
    "tensor_files",
    "weights",
    "recipes",
    "scalars",
    "evaluation",
    "held_out",
    "gallery",
    "gallery_pages",
    "pages",
    "storybook",
}
COMMANDS = {"train", "generate", "evaluate"}
MAY_IMPORT = {
    "errors": set(),
    "interruption": set(),
    "config": {"errors"},
    "files": {"config", "errors"},
    "recipe_config": {"config", "errors"},
    **{room: {room} | GROUND for room in LIBRARY},
    **{room: MIDDLE | LIBRARY | GROUND for room in MIDDLE},
    **{room: MIDDLE | LIBRARY | GROUND | {"__version__"} for room in COMMANDS},
    "commands": {"commands"} | MIDDLE | LIBRARY | GROUND,
    "__main__": {"cli", "errors", "__version__"},
    "__init__": MIDDLE | LIBRARY | GROUND | COMMANDS,
}

# Libraries that few rooms hide from the others, and those that the package does without.
ONLY_IN = {
    "flax": {"models"},
    "orbax": {"orbax_checkpoints", "streaming", "processes"},  # the last for its barrier
    "torch": {"tensor_files"},  # to read pickles
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


def violations(module: str, source: str) -> set[str]:
    """The imports of a module that the tables above forbid."""
    here = module.split(".")[0]

    def forbidden(name: str) -> bool:
        library, _, rest = name.partition(".")
        if library == "":
            return True  # relative: written in full, an import shows which way it runs
        if library == PACKAGE:
            return rest.split(".")[0] not in MAY_IMPORT[here]
        return library in NOWHERE or here not in ONLY_IN.get(library, {here})

    return {name for name in imported_names(source) if forbidden(name)}


def test_every_room_has_its_line_in_the_table():
    assert {module.split(".")[0] for module in sources()} <= MAY_IMPORT.keys()


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
from contextualstory_jax import config, pipeline
from contextualstory_jax.models.layers import Linear

def lazily():
    import contextualstory_jax.data.shapes
    from contextualstory_jax.weights import convert
"""

    assert violations("models.unet", source) == {
        "torch.nn",
        "orbax.checkpoint",
        "...config",
        "contextualstory_jax.pipeline",
        "contextualstory_jax.data.shapes",
        "contextualstory_jax.weights.convert",
    }
