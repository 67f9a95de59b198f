"""The `owl-det` command; importing this package loads none of its modules."""


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand. Returns an exit code (`owl_det.errors.ExitCode`)."""
    from owl_det.cli import command

    return command.main(argv)
