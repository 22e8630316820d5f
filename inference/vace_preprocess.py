#!/usr/bin/env python
"""Raw clips, pictures and words to source video, mask and references; with --prompt on to the video. See ``--help``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone as from an installation

if __name__ == "__main__":
    try:
        from vdot.annotate.cli import main
    except KeyboardInterrupt:  # the libraries take seconds to import
        sys.exit(130)
    sys.exit(main())
