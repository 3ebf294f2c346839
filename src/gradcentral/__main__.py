"""Entry point of ``gradcentral`` and ``python -m gradcentral``."""

import sys

from gradcentral import startup


def main() -> None:
    """Run the command line, or exit with the command that installs a missing library."""
    try:
        from gradcentral.cli.main import run
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] == "gradcentral":
            raise
        sys.exit(f"gradcentral: the command line needs {error.name}: pip install 'gradcentral[experiments]'")
    startup.end()
    run()


if __name__ == "__main__":
    main()
