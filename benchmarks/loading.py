"""Loading at real 1.3B shapes: peak host memory over the tensors kept, time over reading the files once.

    python benchmarks/loading.py [--folder DIR] [--formats safetensors pt] [--preset 1.3B]

Random values are written once to a temporary folder (8.6 GB per format in float32). Every measurement is a process of
its own, timed with the files out of the page cache (cold) and in it (warm). Two of them only read the files: "read and
keep" into memory, the least that any loader does that owns its tensors, and "read and discard" through a small buffer,
which leaves out what the operating system takes for giving out memory. The others call ``load_dit``; their times are
given over "read and keep". Memory is the growth of the peak resident set. Goals: at most 1.2x and 1.5x.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BUFFER = 16 << 20


def write(folder: Path, preset: str, formats: list[str]) -> None:
    import torch
    from safetensors.torch import save_file

    from vdot.checkpoints.saving import native_config
    from vdot.models.presets import PRESETS
    from vdot.models.vace import VaceDiT

    config = PRESETS[preset].dit
    with torch.device("meta"):
        shapes = {k: t.shape for k, t in VaceDiT(config).state_dict().items()}
    noise = torch.randn(1 << 26)  # repeated: only the sizes matter
    state = {k: torch.empty(shape) for k, shape in shapes.items()}
    for tensor in state.values():
        tensor.view(-1).copy_(noise[: tensor.numel()])
    (folder / "config.json").write_text(json.dumps(native_config(config)))
    keys = list(state)
    for form in formats:
        (folder / form).mkdir()
        shutil.copy(folder / "config.json", folder / form)
        if form == "pt":
            torch.save({"generator": {f"model.{k}": t for k, t in state.items()}}, folder / form / "x.pt")
            continue
        halves = keys[: len(keys) // 2], keys[len(keys) // 2 :]
        for i, half in enumerate(halves, start=1):
            name = f"diffusion_pytorch_model-{i:05d}-of-00002.safetensors"
            save_file({k: state[k] for k in half}, folder / form / name)
    os.sync()


def rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def weight_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".pt"))


def set_cache(folder: Path, cold: bool) -> None:
    for path in weight_files(folder):
        with path.open("rb", buffering=0) as file:
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(BUFFER):
                    pass


def read(folder: Path, keep: bool) -> dict[str, float]:
    kept = []
    buffer = bytearray(BUFFER)
    start = time.perf_counter()
    for path in weight_files(folder):
        with path.open("rb", buffering=0) as file:
            if keep:
                kept.append(file.read())
            while file.readinto(buffer):
                pass
    return {"seconds": time.perf_counter() - start}


def load(folder: Path, dtype: str, mmap: bool) -> dict[str, float]:
    from vdot.checkpoints import load_dit

    before = rss()
    start = time.perf_counter()
    dit = load_dit(folder, dtype=dtype, mmap=mmap)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    kept = sum(p.numel() * p.element_size() for p in dit.parameters())
    return {"seconds": seconds, "kept": kept, "grown": peak - before}


def child(folder: Path, what: str, cold: bool) -> dict[str, float]:
    import vdot.checkpoints  # noqa: F401  before the cache is set: importing takes seconds, in which it changes

    dtype, _, mode = what.partition("+")
    set_cache(folder, cold)
    return read(folder, "keep" in dtype) if dtype.startswith("read") else load(folder, dtype, mode == "mmap")


def measure(folder: Path, what: str, cold: bool) -> dict[str, float]:
    """Run one measurement in a process of its own."""
    cache = ["--cold"] if cold else []
    command = [sys.executable, __file__, "--child", what, "--folder", str(folder), *cache]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def table(folder: Path, formats: list[str], repeats: int) -> None:
    print("| format | what | kept GB | peak growth / kept | cold s | / read and keep | warm s | / read and keep |")
    print("|---|---|---|---|---|---|---|---|")
    for form in formats:
        base: dict[bool, float] = {}
        for what in ("read and keep", "read and discard", "float32", "bfloat16", "float32+mmap"):
            runs = {cold: [measure(folder / form, what, cold) for _ in range(repeats)] for cold in (True, False)}
            seconds = {cold: min(run["seconds"] for run in runs[cold]) for cold in runs}
            base = base or seconds
            memory = "| "
            if "kept" in runs[True][0]:
                kept = runs[True][0]["kept"]
                grown = max(run["grown"] for some in runs.values() for run in some)
                memory = f"{kept / 1e9:.2f} | {grown / kept:.3f}"
            cells = [f"{seconds[c]:.2f} | {seconds[c] / base[c]:.2f}" for c in (True, False)]
            print(f"| {form} | {what} | {memory} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write the files (default: the system's temporary folder)")
    parser.add_argument("--formats", nargs="+", default=["safetensors", "pt"], choices=("safetensors", "pt"))
    parser.add_argument("--preset", default="1.3B", choices=("tiny", "1.3B"))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--cold", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.folder, args.child, args.cold)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="vdot-loading-") as work:
        need = 9e9 * len(args.formats) * (args.preset == "1.3B")
        if shutil.disk_usage(work).free < 1.2 * need:
            sys.exit(f"error: {need / 1e9:.0f} GB of free disk are needed under {work}; choose another --folder.")
        subprocess.run(  # a process of its own, so that the writer's memory is gone before anything is measured
            [sys.executable, "-c", WRITER, work, args.preset, *args.formats], check=True, cwd=Path(__file__).parent
        )
        table(Path(work), args.formats, args.repeats)


WRITER = "import sys, pathlib, loading; loading.write(pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3:])"

if __name__ == "__main__":
    main()
