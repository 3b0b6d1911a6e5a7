"""Run the GPU suite from a checkout, without installing anything: `python benchmarks/gpu/run.py --help`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # In place of this folder, whose file names are not meant to be seen as top-level modules.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

    from benchmarks.gpu.suite import main

    sys.exit(main())
