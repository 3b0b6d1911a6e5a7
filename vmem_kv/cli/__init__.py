"""The `vmem-kv` command. Everything that it prints goes through rich; nothing below this package prints."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit with its status: 0, 1 for an error, 2 for a misspelt command, 130 for Ctrl-C."""
    try:
        from vmem_kv.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f"vmem-kv needs {error.name}, which is not installed: run pip install 'vmem_kv[cli,hf]'")
    except KeyboardInterrupt:  # while modules load; from here on the commands say what they had found
        sys.exit(130)
    app()
