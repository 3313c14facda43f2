"""The command line: ``sparsify``, and ``python -m sparsify``."""

from sparsify.import_path import by_module, leave_working_directory

# Before anything else is imported; with -m the package itself has done it already.
if not by_module():
    leave_working_directory()

from sparsify.cli.ending import at_once


def _command_line() -> None:
    # Loaded only now: what it loads registers for the end of the process, which at_once does before.
    from sparsify.cli.main import main

    main()


def main() -> None:
    """The command line as a process of its own."""
    at_once(_command_line)


if __name__ == "__main__":
    main()
