"""Commands that are reached as subcommands of `contextualstory-jax` alone."""
