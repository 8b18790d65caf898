"""Train the VAE of a config, for `train --config.init_from=DIR`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from contextualstory_jax.config.config_files import load_config
from contextualstory_jax.distributed.multihost import connect, say
from contextualstory_jax.train import finish, parse
from contextualstory_jax.utils.cli import run

DESCRIPTION = (
    "Train the VAE of a config by itself on the frames of its stories; its text encoder and UNet "
    "are left out. A config of the same model.vae trains on its latents with --config.init_from="
    "DIR. Starting again in the same workdir resumes from its last checkpoint."
)


def main(argv: Sequence[str] | None = None, prog: str = "contextualstory-jax train-vae") -> None:
    """Run the command; exits with status 1 where training diverges.

    Raises `UserError` for bad input, before anything is written.
    """
    arguments, overrides = parse(argv, prog, DESCRIPTION)
    config = load_config(arguments.config, overrides)
    connect(arguments)
    from contextualstory_jax.training.train_vae import train_vae

    if finish(train_vae, config, arguments.workdir):
        workdir = shlex.quote(str(arguments.workdir))
        say(
            f"{workdir}: checkpoints/{config.steps}, samples/, metrics.jsonl, tensorboard/\n"
            "next: contextualstory-jax train --config CONFIG --workdir OTHER "
            f"--config.init_from={workdir}"
        )


if __name__ == "__main__":
    run(main)
