"""`contextualstory-jax push CHECKPOINT USER/NAME`: a checkpoint to the Hugging Face Hub."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from contextualstory_jax.utils.cli import ArgumentParser, run
from contextualstory_jax.utils.errors import UserError, require

if TYPE_CHECKING:
    from contextualstory_jax.conversion.hub_upload import Contents

SHIPS = "shipped"


def parse(argv: Sequence[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    """The command's arguments. Raises `UserError` for wrong ones."""
    parser = ArgumentParser(
        prog=prog,
        description="Put a checkpoint on the Hugging Face Hub, with a model card made from its own "
        "records, in one commit. Only what generation needs is uploaded. A repository that is "
        "there is updated; after an interruption the same command completes it.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a training workdir, a converted folder or an exported one; "
        f"{SHIPS}: the model that ships",
    )
    add("repo", metavar="USER/NAME", help="the Hub id to write to")
    add("--dry-run", type=Path, metavar="DIR", help="write the files to DIR, and upload nothing")
    add("--private", action="store_true", help="make a repository that only you see")
    add("--weights", choices=("ema", "raw"), help="averaged or last; default: ema where it is")
    add(
        "--sample",
        type=Path,
        metavar="DIR",
        help="a story folder that generate wrote, to show; default for the synthetic stories: "
        "one is generated",
    )
    add(
        "--reports",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE.json",
        help="of evaluate and measure; default: metrics.json and PROTOCOL.json in CHECKPOINT",
    )
    add(
        "--license",
        metavar="ID",
        help="as the Hub names it; default for the synthetic stories: mit",
    )
    arguments = parser.parse_args(argv)
    require(
        re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", arguments.license or "mit") is not None,
        f"--license {arguments.license!r} is no identifier of the Hub, such as mit or openrail++",
    )
    return arguments


def main(argv: Sequence[str] | None = None, prog: str = "contextualstory-jax push") -> None:
    """Run the command. Raises `UserError` for bad input; nothing is then written."""
    arguments = parse(argv, prog)
    # JAX takes seconds to import, and --help need not wait for it.
    from contextualstory_jax.conversion import hub_upload
    from contextualstory_jax.conversion.import_torch import check_free

    hub_upload.check_repo(arguments.repo)
    if arguments.dry_run is None:
        hub_upload.check_token(arguments.repo)
    else:
        check_free(arguments.dry_run)
    contents = read_contents(arguments)
    size = hub_upload.size_of(contents.files)
    print(f"{len(contents.files)} files, {size / 2**20:.1f} MiB", flush=True)
    if arguments.dry_run is not None:
        hub_upload.write_files(contents.files, arguments.dry_run)
        print(f"{arguments.dry_run} holds what would be uploaded")
        return
    step = "" if contents.step is None else f" of step {contents.step}"
    message = f"Upload weights{step} with contextualstory-jax"
    url = hub_upload.upload(contents.files, arguments.repo, message, arguments.private)
    print(url)


def read_contents(arguments: argparse.Namespace) -> Contents:
    """The files of the model, with the card and what it shows.

    Raises `UserError` where there is no model, or something that the card needs is missing.
    """
    from contextualstory_jax.conversion import hub_upload
    from contextualstory_jax.evaluation import model_card
    from contextualstory_jax.sampling.pretrained import SHIPPED

    folder = SHIPPED if arguments.checkpoint == SHIPS else Path(arguments.checkpoint)
    contents = hub_upload.read_contents(folder, arguments.weights)
    records = model_card.read_records(folder, arguments.reports, contents)
    started = records.training is not None and records.training.init_from is not None
    own = records.dataset == "shapes" and contents.origin is None and not started
    licence = arguments.license or ("mit" if own else None)
    if licence is None:
        raise UserError(
            "name the licence: --license ID, such as openrail++ of models from Stable Diffusion 2.1"
        )
    require(
        arguments.sample is not None or records.dataset == "shapes",
        "the card shows a story: --sample DIR names a folder that generate wrote with this model",
    )
    if arguments.sample is not None:
        sample = model_card.read_sample(arguments.sample, contents)
    else:
        sample = model_card.generate_sample(folder, arguments.weights)
    card = model_card.card_files(arguments.repo, contents, sample, licence, records)
    return contents._replace(files={**contents.files, **card})


if __name__ == "__main__":
    run(main)
