"""The subcommands of `rfjax`: each module has `add_arguments(parser)` and `run(args)`, and imports JAX only to run."""
