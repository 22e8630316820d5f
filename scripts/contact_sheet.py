"""Look at videos without playing them: one row of frames per video, as a PNG.

python scripts/contact_sheet.py results/demo/out_video.mp4 --out sheet.png
python scripts/contact_sheet.py src_video.mp4 src_mask.mp4 out_video.mp4 --columns 8 --out sheet.png
"""

import argparse
import sys
from pathlib import Path

from vdot.errors import VdotError
from vdot.video import contact_sheet, probe, read_frames


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="+", help="one row each, labelled with name, frames, rate and size")
    parser.add_argument("--out", required=True, help="the PNG to write")
    parser.add_argument("--columns", type=int, default=6, help="frames per row, evenly spaced (default 6)")
    args = parser.parse_args()
    try:
        rows = []
        for path in args.videos:
            info = probe(path)
            label = f"{Path(path).name}: {info.frames} frames, {info.fps:.4g} fps, {info.width}x{info.height}"
            rows.append((label, read_frames(path, range(info.frames))))
        contact_sheet(rows, args.out, args.columns)
    except VdotError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
