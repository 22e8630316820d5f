"""The memory plan against hand counts, published sizes and a real run; offloading against none."""

from dataclasses import asdict, replace

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import nn

import vdot.memory
import vdot.models.vae
from tests.conftest import TINY
from vdot.checkpoints import load_dit, load_text_encoder, load_vae
from vdot.checkpoints.networks import network_configs
from vdot.conditioning import Condition, encode_context
from vdot.errors import ConfigError, InputError
from vdot.memory import (
    GIB,
    LiveBytes,
    MemoryPlan,
    StageCount,
    bytes_of,
    count_decode,
    count_encode,
    count_stage,
    is_out_of_memory,
    plan_generation,
)
from vdot.models.presets import PRESETS
from vdot.models.vae import WanVAE
from vdot.offload import HOST, Placement, offload_by_blocks, offload_mode
from vdot.sampling import VACE_SCHEDULE, VDOT_SCHEDULE

FLOAT32 = (torch.float32,) * 3


# --- counting --------------------------------------------------------------------------------------------------------


def test_live_bytes_of_a_case_counted_by_hand():
    """4 x 8 float32 = 128 bytes each: two are alive at once, then one, then three with a view that costs nothing."""
    weight = nn.Linear(8, 8, bias=False, device="meta")
    x = torch.empty(4, 8, device="meta")
    with torch.no_grad(), LiveBytes(weight) as live:
        y = weight(x)
        assert live.alive == 128
        z = y + 1
        assert (live.alive, live.peak) == (256, 256)
        del y
        assert (live.alive, live.peak) == (128, 256)
        view = z.view(8, 4)
        assert live.alive == 128
        a, b = z * 2, z.double()  # 128 and 256
        assert (live.alive, live.peak) == (512, 512)
        del z, a, b
        assert live.alive == 128  # the view keeps it
        del view
        assert (live.alive, live.peak) == (0, 512)


def test_a_stage_counted_by_hand():
    """Two Linear(8, 8) without bias on 4 rows: 2 x 2 x 4 x 8 x 8 FLOPs, 256 bytes of weights each, 2 x 128 alive."""
    net = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(2))).to("meta")
    stage = count_stage("net one", net, lambda: net(torch.empty(4, 8, device="meta")), repeats=3)
    # The input is made inside the run and counts: input and first output are alive together.
    assert stage == StageCount("net one", "net", 512, 0, 512, 256 + 128, 3 * 2 * 2 * 4 * 8 * 8)


def test_blocks_are_members_of_the_outermost_lists():
    net = nn.Module()
    net.stem, net.blocks = nn.Linear(2, 2), nn.ModuleList([nn.Linear(4, 4), nn.Linear(8, 8)])
    stage = count_stage("net", net, lambda: None)
    assert (stage.weights, stage.largest_block, stage.outside_blocks) == (24 + 80 + 288, 288, 24)
    assert stage.device_bytes("block") == 24 + 2 * 288 and stage.device_bytes("true") == stage.weights


def test_modes_by_hand():
    stages = (StageCount("a x", "a", 100, 10, 20, 5, 1.0), StageCount("b x", "b", 50, 0, 50, 7, 2.0),
              StageCount("b y", "b", 50, 0, 50, 30, 3.0))  # fmt: skip
    plan = MemoryPlan(stages)
    assert (plan.weights, plan.flops) == (150, 6.0)
    assert (plan.peak("false"), plan.peak("true"), plan.peak("block")) == (180, 105, 80)
    assert (plan.host("false"), plan.host("block")) == (0, 150)
    assert [plan.smallest_fit(n) for n in (180, 179, 104, 79)] == ["false", "true", "block", None]


def test_what_does_not_fit_is_refused_with_a_way_out():
    plan = MemoryPlan((StageCount("a", "a", 10 * GIB, GIB, GIB, GIB, 1.0), StageCount("b", "b", GIB, 0, GIB, 0, 1.0)))
    plan.check_fit("false", 12 * GIB)
    with pytest.raises(InputError, match=r"takes 12.0 GiB of memory and there are 5.0: use --offload_model block"):
        plan.check_fit("false", 5 * GIB)
    with pytest.raises(InputError, match="use a smaller --size"):
        plan.check_fit("block", GIB)
    with pytest.raises(InputError, match="use a smaller --size"):
        plan.check_fit("block", 5 * GIB, on_cpu=True)  # offloading does nothing there


@pytest.mark.parametrize(
    "error, is_it",
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), True),
        (RuntimeError("shapes do not match"), False),
    ],
)
def test_out_of_memory_is_recognised(error, is_it):
    assert is_out_of_memory(error) is is_it


# --- plans -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan_14b() -> MemoryPlan:
    preset, vae = PRESETS["14B"], dict(AutoencoderKLWan.load_config(TINY / "vae")) | {"base_dim": 96}
    if "decoder_base_dim" in vae:
        vae["decoder_base_dim"] = None
    clip = Condition(
        81, 480, 832, source=torch.zeros(1).expand(3, 81, 480, 832), mask=torch.ones(1).expand(81, 480, 832)
    )
    return plan_generation(preset.dit, asdict(preset.text), vae, clip, VDOT_SCHEDULE, (torch.bfloat16,) * 3)


def test_14b_at_480p_by_count(plan_14b):
    """2030 TFLOP a forward within 1% (an independent count of the architecture), 17.3 B parameters in bfloat16."""
    transformer = next(s for s in plan_14b.stages if s.name == "transformer")
    assert transformer.flops / VDOT_SCHEDULE.evaluations == pytest.approx(2030e12, rel=0.01)
    assert transformer.weights == pytest.approx(2 * 17.3e9, rel=0.02)
    text = next(s for s in plan_14b.stages if s.name == "text encoder")
    assert text.weights == pytest.approx(2 * 5.68e9, rel=0.01)


def test_14b_fits_24_gb_block_by_block(plan_14b):
    assert plan_14b.peak("false") >= plan_14b.peak("true") >= plan_14b.peak("block")
    assert plan_14b.peak("block") < 24e9 < 40e9 < plan_14b.peak("false") < 80e9
    lines = "\n".join(plan_14b.describe("block"))
    assert lines.count("--offload_model") == 3 and lines.count("<- chosen") == 1
    assert "offloading does nothing on a CPU" in "\n".join(plan_14b.describe("false", on_cpu=True))


def tiny_plan(condition, schedule=VDOT_SCHEDULE, dtypes=FLOAT32):
    return plan_generation(*network_configs(TINY), condition, schedule, dtypes, "cpu")


def test_guidance_doubles_the_transformers_work():
    one, two = (tiny_plan(Condition(5, 32, 32), s) for s in (VDOT_SCHEDULE, replace(VDOT_SCHEDULE, guide_scale=1.5)))
    flops = [next(s.flops for s in plan.stages if s.name == "transformer") for plan in (one, two)]
    assert flops[1] == 2 * flops[0]
    assert VACE_SCHEDULE.evaluations == 100


def test_a_long_clip_continued_in_a_line_equals_the_full_count(monkeypatch):
    """FLOPs within 0.1%, activations within 3% of counting every step; at 480 x 832 one latent frame is one step."""
    clip = Condition(25, 480, 832, source=torch.zeros(1).expand(3, 25, 480, 832))
    short = tiny_plan(clip)
    monkeypatch.setattr(vdot.memory, "_continued", lambda count, vae, condition: count(condition.latent_frames))
    for mine, full in zip(short.stages, tiny_plan(clip).stages, strict=True):
        assert mine.flops == pytest.approx(full.flops, rel=1e-3)
        assert mine.activations == pytest.approx(full.activations, rel=0.03)


def test_the_plan_agrees_with_a_real_run():
    """The same count on real CPU tensors: weights equal, activations within a factor of 1.3."""
    condition = Condition(17, 64, 64, source=torch.rand(3, 17, 64, 64) * 2 - 1)
    plan = {s.name: s for s in tiny_plan(condition).stages}
    dit, text, vae = load_dit(TINY), load_text_encoder(TINY), load_vae(TINY)
    latents = torch.randn(1, *condition.latent_shape)
    context = torch.randn(1, 96, *condition.latent_shape[1:])
    told = torch.randn(1, dit.config.text_len, dit.config.text_dim)

    def peak(module, run):
        with torch.no_grad(), LiveBytes(module) as live:
            run()
        return live.peak

    real = {
        "transformer": (dit, lambda: dit(latents, torch.zeros(1), told, context, lengths=[dit.config.text_len])),
        "vae encode": (vae, lambda: encode_context(vae, condition)),
        "vae decode": (vae, lambda: [None for _ in vae.decode_stream(latents)]),
    }
    for name, (module, run) in real.items():
        assert plan[name].weights == bytes_of(module)
        assert 1 / 1.3 < plan[name].activations / peak(module, run) < 1.3, name
    assert plan["text encoder"].weights == bytes_of(text)


def test_the_autoencoders_count_agrees_with_a_gpu(monkeypatch):
    """bfloat16, 81 frames of 832x480, two latent frames a step: 4.12 and 5.67 GB measured on an H200, within 10%."""
    monkeypatch.setattr(vdot.models.vae, "STEP_PIXELS", 2 * 480 * 832)
    with torch.device("meta"):
        vae = WanVAE(AutoencoderKLWan()).to(torch.bfloat16)
    vae.counts_for = "cuda"
    clip = Condition(81, 480, 832, source=torch.zeros(1).expand(3, 81, 480, 832))
    video = 3 * 81 * 480 * 832 * 4  # which a stream does not keep, and what was measured did
    assert count_encode(vae, clip).activations == pytest.approx(4.12e9, rel=0.1)
    assert count_decode(vae, clip).activations + video == pytest.approx(5.67e9, rel=0.1)
    assert not any("forward" in vars(layer) for layer in vae.modules())  # what stood in is gone


def test_half_precision_halves_the_weights_but_the_islands():
    full, half = (tiny_plan(Condition(5, 32, 32), dtypes=(t,) * 3) for t in (torch.float32, torch.bfloat16))
    dit = load_dit(TINY, dtype="bfloat16")
    assert next(s.weights for s in half.stages if s.name == "transformer") == bytes_of(dit)
    assert 0.5 * full.weights < half.weights < 0.6 * full.weights


# --- offloading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("taken", [False, True])
@torch.no_grad()
def test_block_offloading_changes_no_bit(taken):
    """diffusers' group offloading from CPU to CPU: all hooks run, and the velocity is the very same, twice."""
    dit = load_dit(TINY).eval()
    torch.manual_seed(0)
    x, context, text = torch.randn(1, 16, 2, 4, 8), torch.randn(1, 96, 2, 4, 8), torch.randn(1, 512, 128)
    args = (x, torch.tensor([900.0]), text, context, 1.0, [7] if taken else None)
    expected = dit(*args)
    offload_by_blocks(dit, HOST)
    for _ in range(2):
        assert torch.equal(dit(*args), expected)


def test_block_offloading_of_the_text_encoder_changes_no_bit():
    encoder = load_text_encoder(TINY)
    expected, lengths = encoder(["a red ball", "x"])
    offload_by_blocks(encoder, HOST)
    again, same = encoder(["a red ball", "x"])
    assert torch.equal(again, expected) and torch.equal(same, lengths)


def test_placement_moves_networks_only_where_it_is_asked(monkeypatch):
    moves = []
    net = nn.Linear(2, 2)
    monkeypatch.setattr(net, "to", lambda device: moves.append(str(device)) or net)
    assert Placement(HOST, "block").mode == "false"  # nothing to gain on a CPU
    place = Placement(torch.device("meta"), "true")
    place.install(net)
    with pytest.raises(ZeroDivisionError), place.use(net):
        raise ZeroDivisionError
    assert moves == ["meta", "cpu"]  # comes back after an error too
    moves.clear()
    resident = Placement(torch.device("meta"), "false")
    resident.install(net)
    with resident.use(net):
        pass
    assert moves == ["meta"]


@pytest.mark.parametrize("value, mode", [(True, "true"), (False, "false"), ("True", "true"), ("BLOCK", "block")])
def test_offload_modes(value, mode):
    assert offload_mode(value) == mode
    with pytest.raises(ConfigError):
        offload_mode("cpu")
