"""``python -m sparsify``: the command line."""

from sparsify.cli.main import main

if __name__ == "__main__":
    main()
