#!/usr/bin/env python
"""UVCBench and its like in one command: generate, measure, report, compare. ``--help`` shows worked examples."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone as from an installation

if __name__ == "__main__":
    try:
        from vdot.bench.run import main
    except KeyboardInterrupt:  # the libraries take seconds to import
        sys.exit(130)
    sys.exit(main())
