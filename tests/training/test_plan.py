"""What is counted before a run, against the networks themselves, hand counts and real steps; and --dry_run."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import vdot.training.memory as memory
from tests.conftest import TINY
from vdot.config import load_config
from vdot.data.batch import Shape
from vdot.distillation.draws import Draws
from vdot.distillation.steps import critic_step, generator_step, judges, terms_of
from vdot.errors import ConfigError
from vdot.memory import LiveBytes, bytes_of, count_stage
from vdot.models import attention
from vdot.models.discriminator import Discriminator
from vdot.models.presets import PRESETS, DitConfig
from vdot.models.vace import VaceDiT
from vdot.training.cli import main
from vdot.training.config import TrainConfig
from vdot.training.memory import (
    Part,
    Phase,
    Split,
    TrainingMemory,
    count_activations,
    count_graph,
    count_step,
    plan_memory,
)
from vdot.training.networks import head_sizes, taps_of
from vdot.training.plan import Rows, StepCost, flop, forward_flops, judge_flops

TOY = DitConfig(dim=48, ffn_dim=96, num_heads=2, num_layers=4, vace_layers=(0, 2), text_dim=24, text_len=64)
LATENT = (16, 3, 8, 8)
FULL = (16, 21, 60, 104)  # 832x480, 81 frames


def config(*overrides: str) -> TrainConfig:
    return load_config(TrainConfig, None, ["ckpt_dir=x", *overrides])


# --- work ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_the_formula_equals_the_counted_network(name):
    """Within 0.1%, at two sizes that weigh attention differently."""
    dit = PRESETS[name].dit
    with torch.device("meta"):
        network = VaceDiT(dit)
    for latent in ((16, 2, 8, 12), (16, 5, 32, 32)):
        x, context = (torch.empty(1, c, *latent[1:], device="meta") for c in (16, dit.vace_in_dim))
        text = torch.empty(1, 100, dit.text_dim, device="meta")
        t = torch.zeros(1, device="meta")
        run = lambda: network(x, t, text, context, lengths=[100])  # noqa: B023, E731
        counted = count_stage("transformer", network, run).flops
        assert forward_flops(dit, latent, 100).total == pytest.approx(counted, rel=1e-3)


def test_14b_at_480p_is_2030_tflop():
    """With all 512 text rows, as the original runs it; the same number as in tests/test_memory.py, another way."""
    assert forward_flops(PRESETS["14B"].dit, FULL, 512).total == pytest.approx(2030e12, rel=0.002)


@pytest.mark.parametrize("time", [True, False])
def test_the_discriminators_formula_equals_the_counted_heads(time):
    dit = PRESETS["1.3B"].dit
    sizes = head_sizes(dit, config().distill.gan)
    with torch.device("meta"):
        heads = Discriminator(dit.dim, taps=3, time=time, **sizes)
        tokens, e = torch.empty(1, 24 * 32, dit.dim), torch.empty(1, dit.dim)
    for module in heads.modules():
        if isinstance(module, memory.Attend):
            module.fn = memory.fused_attention
    with FlopCounterMode(display=False) as counter:
        heads([tokens] * 3, e)
    mine = judge_flops(dit, (16, 3, 32, 32), 3, sizes["inner"], sizes["ffn_dim"], time)
    assert mine == pytest.approx(counter.get_total_flops(), rel=1e-3)


class Exits(Draws):
    """Rollouts of a known length."""

    exit_step = 0

    def choice(self, purpose, count, among="all"):
        return self.exit_step


@pytest.mark.parametrize(
    "changes",
    [
        ("parallel.recompute=none", "distill.draws=separate", "distill.gan.r1=1"),
        ("distill.alternate=false", "distill.dmd.guidance=1", "distill.one_graph=true"),
    ],
)
def test_the_work_of_a_step_equals_the_operations_of_real_steps(changes):
    """Within 3%: a fused attention's backward pass is five products for its forward's two, and we say four."""
    c = config("parallel.compute=float32", "parallel.recompute=full", *changes)
    dit = DitConfig(dim=96, ffn_dim=384, num_heads=2, num_layers=3, vace_layers=(0,), text_dim=24, text_len=96)
    cast, _ = memory._cast_on_meta(c, dit, (0, 1, 2), 1)
    batch, d = memory._batch_on_meta(dit, LATENT, 1), c.distill
    rest = (cast, batch, memory._NoDraws(0, 0, "", (0,), LATENT, memory.META), d.schedule.build(), d)
    forward = forward_flops(dit, LATENT).total
    for step in (0, 5) if d.alternate else (0,):  # both turns of the generator; the critic judges in the second
        with FlopCounterMode(display=False) as counter:
            generator_step(*rest, terms_of(step, d) - {"ot"}, lambda _: nullcontext())
            critic_step(*rest, judges(step, d), lambda _: nullcontext())
        # These rollouts end with their first forward; the mean is two and a half.
        real = counter.get_total_flops() + 2 * 1.5 * forward
        if d.draws == "separate" and "ot" in terms_of(step, d):  # which needs numbers: its own draw is left out here
            real += 3 * forward
        assert StepCost(c, dit).flops(step, LATENT) == pytest.approx(real, rel=0.03), step


def test_a_cycle_at_14b_against_the_releases():
    """The release's order of work comes to the 119 PFLOP that were counted for it independently, within 1%.

    Its generator scores for DMD and for OT (six forwards) or runs both halves of an adversarial batch with all
    gradients; its critic denoises in even steps and judges in odd ones. Kernels of attention recompute it in their
    backward pass, here a quarter more of attention's backward; in each step two VACE clips and the real one are
    encoded, 164 TFLOP each. Ours denoises in every step, and scores and judges once.
    """
    dit = PRESETS["14B"].dit
    each = forward_flops(dit, FULL, 512)
    generator = 2.5 + 3 + (6 + 2 * 4) / 2
    critic = 5 * 2.5 + 2.5 * 4 + 2.5 * 8
    passes = 1 + 2 / 2 + 2.5 + 2.5 * 2
    release = (generator + critic) * each.total + passes * each.attention / 2 + 5 * 3 * 164e12
    assert release == pytest.approx(119e15, rel=0.01)
    ours = StepCost(config("parallel.recompute=full"), dit).cycle(FULL)
    assert ours == pytest.approx(61.5 * forward_flops(dit, FULL).total, rel=0.01)
    without_denoising_twice = ours - 2.5 * 4 * forward_flops(dit, FULL).total
    assert without_denoising_twice < 0.88 * release


def test_numbers_in_readable_units():
    assert [flop(n) for n in (12e3, 1.5e12, 2.0304e15, 3e21)] == ["12 kFLOP", "1.5 TFLOP", "2.03 PFLOP", "3000 EFLOP"]


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_deep_network_counted_from_a_shallow_one():
    """Five blocks and two hints at real width: the critic to a millionth, the generator within 3%."""
    dit = replace(PRESETS["1.3B"].dit, num_layers=5, vace_layers=(0, 2))
    c, latent = config("parallel.recompute=selective"), (16, 5, 60, 104)
    quick = count_activations(c, dit, latent)
    whole = count_step(c, dit, taps_of(dit, c.distill.gan), latent, 1, 1)
    assert quick["critic step"] == pytest.approx(whole["critic step"], rel=1e-6)
    assert quick["generator step"] == pytest.approx(whole["generator step"], rel=0.03)
    assert quick["sample grid"] == pytest.approx(whole["sample grid"], rel=1e-5)


@pytest.mark.parametrize("mode, one_graph", [("none", "false"), ("full", "true")])
def test_the_count_agrees_with_real_steps(mode, one_graph, monkeypatch):
    """The same steps on real tensors of a CPU, with the fused attention that a GPU has: within 5%."""
    monkeypatch.setattr(attention, "FEW_SCORES", 0)
    c = config("parallel.compute=float32", f"parallel.recompute={mode}", f"distill.one_graph={one_graph}")
    latent, taps = (16, 3, 16, 16), taps_of(TOY, c.distill.gan)
    counted = count_step(c, TOY, taps, latent, 2, 1)
    original, memory.META = memory.META, torch.device("cpu")
    try:
        cast, modules = memory._cast_on_meta(c, TOY, taps, 1)
        batch = memory._batch_on_meta(TOY, latent, 2)
    finally:
        memory.META = original
    for seam in (m for m in modules.modules() if isinstance(m, memory.Attend)):
        seam.use("sdpa")
    draws = Exits(0, 0, "", range(2), latent, torch.device("cpu"))
    rest = (cast, batch, draws, c.distill.schedule.build(), c.distill)
    section = lambda _: nullcontext()  # noqa: E731
    steps = {
        "generator step": lambda: generator_step(*rest, {"gan"}, section),
        "critic step": lambda: critic_step(*rest, True, section),
    }
    for name, step in steps.items():
        with LiveBytes(modules) as live:
            step()
        assert counted[name] == pytest.approx(live.peak, rel=0.05), name


def test_ranks_that_share_a_video_share_activations():
    """A quarter of what a block keeps of its forward; text, time and the latents themselves all have."""
    shallow = [replace(PRESETS["1.3B"].dit, num_layers=n, vace_layers=(0,)) for n in (1, 2)]
    c = config("parallel.recompute=full")
    one, four = ((lambda a, b: b - a)(*(count_graph(c, dit, FULL, 1, n) for dit in shallow)) for n in (1, 4))
    assert four == pytest.approx(one / 4, rel=0.01)


@pytest.fixture
def no_activations(monkeypatch):
    steps = {"generator step": 0.0, "critic step": 0.0, "sample grid": 0.0, "step": 0.0}
    monkeypatch.setattr(memory, "count_activations", lambda *_: steps)


def numbers(dit: DitConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in VaceDiT(dit).parameters())


def parts(plan: TrainingMemory) -> dict[str, Part]:
    return {part.name: part for part in plan.parts}


def test_whole_networks_by_hand(no_activations):
    """float32 throughout on one process: 4 bytes each of weights, second moments, averages; one network's gradients."""
    plan = plan_memory(config("parallel.compute=float32", "critic.betas=[0.5,0.9]"), TOY, LATENT, 1)
    n, found = numbers(TOY), parts(plan)
    heads = found["discriminator"].weights
    assert found["generator"] == Part("generator", 4 * n, 4 * n, 4 * n)
    assert found["fake score"] == Part("fake score", 4 * n, 8 * n)  # with a first moment
    assert found["teacher"] == Part("teacher", 4 * n)
    assert found["discriminator"] == Part("discriminator", heads, 2 * heads)
    assert plan.phases[:2] == (Phase("generator step", 0.0, 4 * n), Phase("critic step", 0.0, 4 * n + heads))
    assert plan.phases[2] == Phase("sample grid", 4 * n)  # the averages take the weights' place
    assert plan.peak == plan.resident + 4 * n + heads + plan.reserve


def test_shards_replicas_and_offload_by_hand(no_activations):
    """On 8 ranks each holds an eighth, but for the small float32 parameters that all hold; with replicas, a half."""
    c = config("batch_size=8")
    one, eight, two = (
        parts(plan_memory(c, TOY, LATENT, 8))["generator"].weights
        if replicas == 1
        else parts(plan_memory(replace(c, parallel=replace(c.parallel, replicas=replicas)), TOY, LATENT, 8))[
            "generator"
        ].weights
        for replicas in (8, 1, 4)
    )
    whole = 4 * sum(
        p.numel()
        for name, p in VaceDiT(TOY).named_parameters()
        if any(k in name for k in ("modulation", "norm", "head."))
    )
    assert eight - whole == pytest.approx((one - whole) / 8) and two - whole == pytest.approx((one - whole) / 2)
    offload = plan_memory(replace(c, parallel=replace(c.parallel, offload=True)), TOY, LATENT, 8)
    assert parts(offload)["generator"].weights == whole
    own = (eight - whole) / 4
    teacher = parts(plan_memory(c, TOY, LATENT, 8))["teacher"].weights - parts(offload)["teacher"].weights
    assert offload.host == pytest.approx(own * (4 + 4 + 4 + 4 + 4 + 4) + teacher)


def test_whole_gradients_wait_between_micro_batches_unless_each_is_reduced(no_activations):
    def gathered(*changes: str) -> float:
        return plan_memory(config("batch_size=2", *changes), TOY, LATENT, 2).phases[0].gathered

    waiting = gathered("accumulation=2") - gathered()
    assert waiting == pytest.approx(4 * numbers(TOY), rel=0.05)
    assert gathered("accumulation=2", "parallel.sync_each=true") == gathered()


def test_autocast_gathers_nothing_and_keeps_half_copies(no_activations):
    """Of the parameters that FSDP would cut: all but the float32 islands."""
    phase = plan_memory(config("parallel.autocast=true"), TOY, LATENT, 1).phases[0]
    assert phase.gathered == pytest.approx(2 * numbers(TOY), rel=0.05)


def test_adapters_share_one_base(no_activations):
    """Rank r on q, k, v, o of both attentions: 16 r C numbers in each of 4 + 2 blocks."""
    c = config("lora.rank=4", "lora.targets=[q,k,v,o]", "ema_decay=0")
    plan = plan_memory(c, TOY, LATENT, 1)
    found, adapter = parts(plan), 4 * 16 * 4 * 48 * 6
    with torch.device("meta"):
        half = memory.dit_on_meta(TOY, c)
    assert found["base"].weights == bytes_of(half)
    assert found["generator's adapter"] == Part("generator's adapter", adapter, adapter)
    assert found["fake score's adapter"] == Part("fake score's adapter", adapter, adapter)
    assert "teacher" not in found and plan.phases[0].gathered == 0


def test_flow_matching_has_one_network(no_activations):
    plan = plan_memory(config("objective=flow"), TOY, LATENT, 1)
    assert list(parts(plan)) == ["generator"] and [p.name for p in plan.phases] == ["step", "sample grid"]


@pytest.mark.parametrize(
    "overrides, world, words",
    [
        (["parallel.ulysses_size=3"], 4, "ulysses_size 3 x ring_size 1 must divide the number of processes, 4"),
        (["parallel.replicas=3", "batch_size=4"], 4, "replicas 3 must divide the number of processes, 4"),
        (["batch_size=3"], 2, "batch_size 3 must be a multiple of the 2 data-parallel groups"),
        (["parallel.autocast=true", "batch_size=2"], 2, "autocast is for whole networks.*shard=false"),
        (["parallel.autocast=true", "lora.rank=4"], 1, "autocast is for whole networks"),
        (["parallel.autocast=true", "parallel.compute=float32"], 1, "autocast is for whole networks"),
    ],
)
def test_sizes_that_do_not_divide_are_named(overrides, world, words):
    with pytest.raises(ConfigError, match=words):
        Split.of(config(*overrides), world)


def test_what_cannot_fit_is_refused_with_a_way_out():
    plan = TrainingMemory((Part("a", 100e9),), (Phase("step", 20e9),), reserve=1e9, advice="use more GPUs")
    plan.check_fit(121e9)
    with pytest.raises(ConfigError, match=r"takes 121\.0 GB of memory on each GPU and there are 80\.0: use more GPUs"):
        plan.check_fit(80e9)
    given = config("parallel.recompute=none", "accumulation=3", "batch_size=2")
    advice = memory._advice(given, Split.of(given, 2))
    for way in ("data.encoded", "recompute=full", "sync_each=true", "one_graph=true", "ulysses_size=2", "lora.rank"):
        assert way in advice


# --- data, and all together ------------------------------------------------------------------------------------------


def test_rows_by_task_and_shape():
    rows = Rows(["a", "a", "a", "b"], [Shape(0, 5, 4, 4)] * 3 + [Shape(1, 5, 4, 4)], [True, True, False, True])
    lines = rows.describe(config("steps=10", "batch_size=2", "data.task_weights.b=3"), PRESETS["1.3B"].dit)
    assert lines[0] == "data  4 rows; 20 samples in 10 batches: 5.00 epochs"
    assert lines[1].split() == "a 3 rows 25.0% of samples, 1.67 times each; 2 with a real clip".split()
    assert lines[2].split() == "b 1 rows 75.0% of samples, 15.00 times each; 1 with a real clip".split()
    assert "3 rows of 17 frames, 32 x 32, 0 references: 20 tokens" in lines[3]
    with pytest.raises(ConfigError, match="names the task 'c'"):
        rows.describe(config("data.task_weights.c=1"), PRESETS["1.3B"].dit)


def test_rows_of_clips_and_of_stills():
    """A quarter of ten batches of 2 clips, three quarters of stills: 2 x 5 x 16 latent pixels are 10 stills."""
    stills = Rows(["b"] * 2, [Shape(0, 1, 4, 4)] * 2, [True] * 2)
    rows = Rows(["a"] * 2, [Shape(0, 5, 4, 4)] * 2, [True] * 2, stills)
    named = ("data.encoded=a", "data.stills.encoded=b", "data.stills.share=0.75")
    given = config("steps=10", "batch_size=2", *named)
    lines = rows.describe(given, PRESETS["1.3B"].dit)
    assert lines[0] == "clips  2 rows; 5 samples in 2.5 batches: 2.50 epochs"
    assert lines[3] == "stills  2 rows; 75 samples in 7.5 batches: 37.50 epochs"
    with pytest.raises(ConfigError, match="names the task 'a'"):
        rows.describe(config(*named, "data.stills.task_weights.a=1"), PRESETS["1.3B"].dit)


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("weights were loaded")

    for name in (
        "vdot.training.networks.load_dit",
        "vdot.data.encoding.load_text_encoder",
        "vdot.data.encoding.load_vae",
    ):
        monkeypatch.setattr(name, load)


def dry(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(["--dry_run", f"ckpt_dir={TINY}", "device=cpu", *arguments])
    return (code, *capsys.readouterr())


def test_dry_run_plans_without_weights(nothing_is_loaded, no_activations, capsys, tmp_path):
    code, out, _ = dry(
        capsys, "world.clips=8", "world.tasks=[t2v,depth]", "batch_size=4", "--gpus", "2", f"output_dir={tmp_path}/run"
    )
    assert code == 0 and not list(tmp_path.iterdir())
    for words in ("2 GPUs: 2 groups of 1, 2 samples each", "generator step", "peak", "fits B200", "5-step cycle",
                  "hours on 2 GPUs", "data  8 rows", "4 rows  50.0% of samples", "17 frames, 64 x 64"):  # fmt: skip
        assert words in out, words


def test_dry_run_lists_every_bad_row(nothing_is_loaded, no_activations, capsys, tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("task_name,src_video_path,internvl_short\nt2v,,a ball\ndepth,none.mp4x,b\n,,c\n")
    code, out, err = dry(capsys, f"data.path={table}")
    assert code == 2 and "line 3: src_video_path" in out and "line 4: it has no task_name" in out
    assert "2 of the 3 rows" in err
    code, out, _ = dry(capsys, f"data.path={table}", "data.skip_bad_rows=true", "data.size=32*32", "data.frame_num=5")
    assert code == 0 and "data  1 rows" in out and "text encoder and autoencoder" in out


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((), "name the training data, one of: data.encoded"),
        (("world.clips=2", "data.path=x.csv"), "name the training data, one of"),
        (("world.clips=2", "batch_size=3", "--gpus", "2"), "batch_size 3 must be a multiple of the 2"),
        (("data.encoded=/nowhere",), "holds no encoded rows"),
        (("world.clips=2", "generator_init=/nowhere"), "/nowhere"),
        (("world.clips=2", "data.task_weights.x=1"), "names the task 'x'"),
    ],
)
def test_dry_run_says_what_is_wrong(arguments, words, nothing_is_loaded, capsys):
    code, _, err = dry(capsys, *arguments)
    assert code == 2 and words in err and "Traceback" not in err
