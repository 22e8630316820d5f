#!/usr/bin/env python
"""The page: drop a clip, paint what should change, write a line, generate. ``--help`` shows the options."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone as from an installation

if __name__ == "__main__":
    try:
        from vdot.page.serve import main
    except KeyboardInterrupt:  # the libraries take seconds to import
        sys.exit(130)
    sys.exit(main())
