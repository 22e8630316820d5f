"""The YAMLs of configs/train: they load, their numbers are the plan's, and every field of theirs is read somewhere."""

import ast
import re
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from typing import get_type_hints

import pytest
from diffusers import AutoencoderKLWan

from tests.conftest import ROOT, TINY
from vdot.config import load_config
from vdot.models.presets import PRESETS
from vdot.training.cli import parse
from vdot.training.config import TrainConfig
from vdot.training.memory import Encoders, TrainingMemory, plan_memory
from vdot.training.plan import StepCost

CONFIGS = sorted((ROOT / "configs" / "train").glob("*.yaml"))
# Name -> preset, GPUs, bytes that each has. 141 and 24 GB by the makers' count of 10^9 bytes, the smaller one.
LARGE = {
    "vdot_14b": ("14B", 8, 141e9),
    "vdot_14b_lora": ("14B", 1, 141e9),
    "vace_1_3b": ("1.3B", 8, 48e9),
    "vace_1_3b_lora": ("1.3B", 1, 24e9),
}


def latent(references: int = 0) -> tuple[int, ...]:
    """832x480, 81 frames."""
    return (16, 21 + references, 60, 104)


@cache
def encoders() -> Encoders:
    vae = dict(AutoencoderKLWan.load_config(TINY / "vae")) | {"base_dim": 96}
    if "decoder_base_dim" in vae:
        vae["decoder_base_dim"] = None
    return Encoders(asdict(PRESETS["14B"].text), vae)


@cache
def plan(name: str, references: int = 0) -> TrainingMemory:
    preset, world, _ = LARGE[name]
    return plan_memory(load(name), PRESETS[preset].dit, latent(references), world, encoders())


def load(name: str, *overrides: str) -> TrainConfig:
    return load_config(TrainConfig, ROOT / "configs" / "train" / f"{name}.yaml", overrides)


def head(name: str) -> str:
    lines = (ROOT / "configs" / "train" / f"{name}.yaml").read_text().splitlines()
    return "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_opens_with_command_and_hardware_and_loads(path):
    opening = head(path.stem)
    assert "Hardware:" in opening and "Memory" in opening
    commands = re.findall(r"^#   (?:bash training/train_vdot.sh|python training/train.py)(.*)$", opening, re.M)
    assert commands
    for command in commands:
        words = [word for word in re.sub(r"\(.*", "", command).split() if word != "--config"]
        name = words.pop(0) if words and "=" not in words[0] and not words[0].startswith("-") else "tiny"
        config, _ = parse(["--config", name, *words], "train.py")
        assert config.steps and name == path.stem


def test_the_large_ones_are_all_there():
    assert set(LARGE) <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("name", LARGE)
def test_fits_its_hardware_by_count(name):
    """And the number at its top is the plan's."""
    _, _, memory = LARGE[name]
    peak = plan(name).peak
    assert peak < memory
    told = float(re.search(r"Memory: +([\d.]+) GB per GPU", head(name)).group(1))
    assert told == pytest.approx(peak / 1e9, abs=0.2)
    assert not load(name).parallel.offload


@pytest.mark.slow
def test_full_14b_has_room_for_three_references():
    assert plan("vdot_14b", 3).peak < 141e9


@pytest.mark.parametrize("name", LARGE)
def test_the_work_at_its_top_is_the_plans(name):
    cycle = StepCost(load(name), PRESETS[LARGE[name][0]].dit).cycle(latent()) / 1e15
    assert float(re.search(r"by count ([\d.]+) PFLOP", head(name)).group(1)) == pytest.approx(cycle, abs=0.5)


def test_release_settings():
    c = load("vdot_14b")
    d = c.distill
    assert (c.generator.lr, c.critic.lr, c.generator.betas, c.critic.betas) == (2e-6, 4e-7, [0, 0.999], [0, 0.999])
    assert (d.dmd.weight, d.ot_weight, d.gan.weight, d.generator_every, c.accumulation) == (0.2, 0.8, 0.1, 5, 3)
    assert (d.ot.eps, d.ot.max_iters, d.ot.pooling, d.dmd.guidance) == (0.1, 60, 2, 3.0)
    assert (d.noise.shift, d.gan.noise.shift) == (5.0, 12.0)
    told = d.schedule.build().timesteps().tolist()
    assert told == pytest.approx([1000, 960, 888.889, 727.2728], abs=1e-3)  # the list 1000, 750, 500, 250 at shift 8


# --- every field is read ---------------------------------------------------------------------------------------------

# What objects of the configuration are called where they are read.
NAMES = {
    "config", "c", "d", "run", "distill", "gan", "dmd", "parallel", "data", "vae", "text", "flow", "world", "note",
    "lora", "noise", "noise_config", "how", "schedule",
}  # fmt: skip


def schemas(kind: type) -> list[type]:
    inner = [hint for hint in get_type_hints(kind).values() if is_dataclass(hint)]
    return [kind, *(found for each in inner for found in schemas(each))]


@cache
def reads() -> set[str]:
    """Attributes of such objects, and those that a configuration class uses of itself outside its own checks."""
    found: set[str] = set()
    for path in (ROOT / "vdot").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        checks = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "__post_init__"]
        left_out = {id(n) for check in checks for n in ast.walk(check)}
        names = NAMES | {"self"} if path.name == "config.py" else NAMES
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and id(node) not in left_out:
                if ast.unparse(node.value).rpartition(".")[2] in names:
                    found.add(node.attr)
    return found


@pytest.mark.parametrize("schema", dict.fromkeys(schemas(TrainConfig)), ids=lambda schema: schema.__name__)
def test_every_field_is_read(schema):
    """A field that nothing reads is a lie. OTConfig is handed on whole, as arguments that must all exist."""
    if schema.__name__ == "OTConfig":
        pytest.skip("vdot.transport takes it apart by its fields")
    assert {f.name for f in fields(schema)} - reads() == set()
