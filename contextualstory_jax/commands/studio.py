"""`contextualstory-jax studio`: a page to write stories, change their frames and keep them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from contextualstory_jax.utils.cli import ArgumentParser, run

PRINTED_LINKS = 20
PASSWORD = "CONTEXTUALSTORY_PASSWORD"  # so that it need not stand among the processes


def parse(argv: Sequence[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    """The command's arguments."""
    parser = ArgumentParser(
        prog=prog,
        description="Serve a page to write stories, change their frames and export them.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--checkpoint",
        nargs="+",
        default=[None],
        metavar="DIR",
        help="checkpoint folders to choose from (default: the model that ships)",
    )
    parser.add_argument(
        "--projects",
        type=Path,
        default=Path("stories"),
        metavar="DIR",
        help="folder of the stories, also of some that `generate` wrote (default: stories)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at")
    parser.add_argument("--port", type=int, default=7860, help="0 for any that is free")
    parser.add_argument(
        "--password",
        default=os.environ.get(PASSWORD),
        help=f"of the login, needed where --host is not this machine alone (or ${PASSWORD})",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, prog: str = "contextualstory-jax studio") -> None:
    """Run the command. Raises `UserError` for bad input, before the server starts."""
    arguments = parse(argv, prog)
    from contextualstory_jax.studio.server import check_address, import_gradio, listen

    check_address(arguments.host, arguments.password)
    sock = listen(arguments.host, arguments.port)
    import_gradio()
    # JAX takes seconds to import, and neither --help nor a mistake need wait for it.
    from contextualstory_jax.studio.projects import Projects
    from contextualstory_jax.studio.server import links, serve
    from contextualstory_jax.studio.studio import Studio
    from contextualstory_jax.studio.worker import Model, Worker

    models = [Model(name) for name in arguments.checkpoint]
    models[0].pipeline  # noqa: B018 (damaged weights are named now)
    projects = Projects(arguments.projects)  # last, so that a mistake leaves no folder
    studio = Studio(models, projects, Worker(warm=models[0]))
    first, *others = links(studio, sock, arguments.host)
    print(f"the studio is at {first}", flush=True)
    for link in others[:PRINTED_LINKS]:
        print(f"  {link}", flush=True)
    try:
        serve(studio, sock, arguments.host, arguments.password)
    finally:
        studio.worker.close()


if __name__ == "__main__":
    run(main)
