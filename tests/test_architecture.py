"""The arrows of the design, read from the syntax tree: who may import whom, and what no file may do."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

FILES = sorted((ROOT / "vdot").rglob("*.py"))
SCRIPTS = sorted([*(ROOT / "inference").glob("*.py"), *(ROOT / "training").glob("*.py")])


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Absolute names of imported modules, and whether at module level (not inside a function or TYPE_CHECKING)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = {id(node) for node in tree.body}
    package = module_name(path).split(".") if path.name == "__init__.py" else module_name(path).split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            yield stem, id(node) in top
            # `from vdot import pipeline` imports the submodule as well
            yield from ((f"{stem}.{alias.name}", id(node) in top) for alias in node.names)


def own(path: Path) -> set[str]:
    return {name for name, _ in imports(path) if name.split(".")[0] == "vdot" and name != "vdot"}


def inside(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


# Room -> what of vdot it must never import. The design's arrows, from entries down to networks.
ENTRIES = (
    "vdot.cli",
    "vdot.pipeline",
    "vdot.jobs",
    "vdot.record",
    "vdot.request",
    "vdot.distillation",
    "vdot.training",
    "vdot.annotate",
    "vdot.evaluate",
    "vdot.bench",
    "vdot.entry",
    "vdot.prompts",
)
# Annotators know files, pixels and their own backends; only their command line knows the generator.
NOT_FOR_ANNOTATE = (
    *(e for e in ENTRIES if e not in ("vdot.annotate", "vdot.request")),
    "vdot.checkpoints",
    "vdot.models",
)
ANNOTATORS = [path for path in FILES if path.parent.name == "annotate" and path.stem != "cli"]
FORBIDDEN = {
    "vdot.checkpoints": ENTRIES,
    "vdot.conditioning": (*ENTRIES, "vdot.checkpoints", "vdot.video"),
    "vdot.sampling": (*ENTRIES, "vdot.checkpoints", "vdot.conditioning", "vdot.video"),
    "vdot.transport": (*ENTRIES, "vdot.checkpoints", "vdot.conditioning", "vdot.video", "vdot.sampling"),
    "vdot.video": (*ENTRIES, "vdot.models", "vdot.checkpoints", "vdot.sampling", "vdot.conditioning"),
    "vdot.parallel": ENTRIES,
    "vdot.chunks": (*ENTRIES, "vdot.models", "vdot.checkpoints", "vdot.sampling", "vdot.parallel"),
    "vdot.anchor": ("vdot",),
    "vdot.prompts": ("vdot.cli", "vdot.pipeline", "vdot.jobs", "vdot.record", "vdot.request", "vdot.models"),
    "vdot.config": (*ENTRIES, "vdot.models", "vdot.checkpoints"),
    "vdot.errors": ("vdot",),
    "vdot.request": ("vdot.cli", "vdot.pipeline", "vdot.jobs", "vdot.models", "vdot.sampling", "vdot.annotate"),
    "vdot.annotate.cli": ("vdot.training", "vdot.distillation", "vdot.evaluate"),
    **{f"vdot.annotate.{path.stem}": NOT_FOR_ANNOTATE for path in ANNOTATORS},
    "vdot.data": tuple(entry for entry in ENTRIES if entry != "vdot.request"),
    "vdot.distillation": (*(e for e in ENTRIES if e != "vdot.distillation"), "vdot.checkpoints", "vdot.video"),
    "vdot.training": ("vdot.cli", "vdot.jobs", "vdot.record", "vdot.evaluate"),
    "vdot.evaluate": ("vdot.cli", "vdot.jobs", "vdot.bench", "vdot.training", "vdot.distillation", "vdot.pipeline"),
    "vdot.pipeline": (
        "vdot.cli",
        "vdot.jobs",
        "vdot.record",
        "vdot.config",
        "vdot.training",
        "vdot.data",
        "vdot.annotate",
    ),
}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_arrows_point_down(path):
    name = module_name(path)
    if name == "vdot.flow" or inside(name, "vdot.models"):
        assert {n for n in own(path) if not inside(n, "vdot.models")} == set()
    for room, never in FORBIDDEN.items():
        if inside(name, room):
            assert {n for n in own(path) if inside(n, *never)} == set()
    assert {
        n for n, _ in imports(path) if inside(n, "inference", "training", "scripts", "tests", "benchmarks")
    } == set()


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_optional_packages_are_imported_where_they_are_used(path):
    """torchvision is not installed with us; decord has no wheel on some machines; the rest are extras."""
    optional = ("torchvision", "decord", "gradio", "wandb", "peft", "triton", "flash_attn", "rapidocr", "matplotlib")
    optional = (*optional, "mediapipe")
    assert {n for n, top in imports(path) if top and inside(n, *optional)} == set()


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_no_prints_and_no_open_pickles(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        assert not (isinstance(node.func, ast.Name) and node.func.id == "print"), f"line {node.lineno} prints"
        if ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads"):
            safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
            assert safe, f"line {node.lineno} unpickles without weights_only=True"


def test_only_flow_knows_the_number_of_timesteps():
    """The literal 1000 as a time lives in one file (elsewhere it may count fps or milliseconds)."""
    for path in (ROOT / "vdot" / "sampling.py", *(ROOT / "vdot" / "models").glob("*.py")):
        numbers = [n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)]
        assert not [n for n in numbers if isinstance(n, int | float) and n in (1000, 999)], path


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_entry_scripts_only_parse_build_call_and_print(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 150


def test_importing_the_package_is_cheap():
    """``import vdot`` and ``vdot.errors`` must not load torch."""
    import subprocess
    import sys

    code = "import sys, vdot, vdot.errors; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
