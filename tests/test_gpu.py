"""What only a CUDA device can show: the same numbers as on the CPU, and every way of placing and computing them.

pytest -m gpu tests/test_gpu.py
"""

import math
from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.conftest import TINY
from tests.training.toy import ToySource, toy_checkpoint, toy_config
from vdot import VdotPipeline
from vdot.checkpoints import load_dit, load_vae
from vdot.data.encoding import load_encoder
from vdot.data.manifest import Entry, Row
from vdot.data.world import WorldConfig, draw_pixels, world_rows
from vdot.models.attention import set_attention_backend
from vdot.parallel.launch import arrange
from vdot.parallel.state import Ranks
from vdot.training.objectives import Distill
from vdot.transport import sinkhorn

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

PROMPT = "A red ball rolls to the right over a grey floor."
LATENTS = 5e-3  # absolute, on latents of order one: float32 in another order of sums, four steps deep
ROUNDING = 1e-5  # absolute, the same kernels on the same device
BFLOAT16 = 0.05  # relative, in the 2-norm: eight bits of mantissa through a few layers


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """cuDNN's convolutions of float32 would be TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def request() -> dict:
    """A source whose right half may change, and a reference, as arrays."""
    y, x = np.mgrid[:32, :64]
    video = np.stack([np.stack([4 * x, 8 * y, 0 * x + 25 * i], -1) for i in range(9)]).astype(np.uint8)
    mask = np.zeros((9, 32, 64), np.uint8)
    mask[:, :, 32:] = 255
    return {"prompt": PROMPT, "src_video": video, "src_mask": mask, "src_ref_images": [video[4]], "seed": 3}


def load(**options: object) -> VdotPipeline:
    return VdotPipeline.from_pretrained(TINY, device="cuda", **options)  # type: ignore[arg-type]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double().cpu(), b.double().cpu()
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(scope="module")
def expected(tiny: VdotPipeline):
    """On the CPU, in float32."""
    return tiny(**request())


@pytest.mark.parametrize("offload", ["false", "true", "block"])
def test_the_pipeline_equals_the_cpus_wherever_weights_wait(offload: str, expected) -> None:
    result = load(dtype="float32", offload=offload)(**request())
    torch.testing.assert_close(result.latents, expected.latents, atol=LATENTS, rtol=0)
    assert np.abs(result.frames.astype(int) - expected.frames.astype(int)).mean() < 0.5  # grey levels


def test_offloading_changes_nothing() -> None:
    results = {mode: load(offload=mode)(**request()).latents for mode in ("false", "true", "block")}  # in bfloat16
    for mode in ("true", "block"):
        torch.testing.assert_close(results[mode], results["false"], atol=ROUNDING, rtol=0)


def test_bfloat16_is_the_default_and_near(expected) -> None:
    pipeline = load()
    assert pipeline.dit.blocks[0].ffn[0].weight.dtype == torch.bfloat16
    result = pipeline(**request())
    assert result.latents.isfinite().all()
    assert result.frames.shape == expected.frames.shape
    assert relative(result.latents, expected.latents) < 3 * BFLOAT16  # four steps deep


def forward(backend: str, dtype: str) -> torch.Tensor:
    dit = load_dit(TINY, dtype=dtype, device="cuda")
    set_attention_backend(dit, backend)
    g = torch.Generator().manual_seed(0)
    shapes = ((1, 16, 3, 16, 16), (1, 20, dit.config.text_dim), (1, 96, 3, 16, 16))
    x, text, context = (torch.randn(shape, generator=g).cuda() for shape in shapes)
    with torch.no_grad():
        return dit(x, torch.tensor([600.0], device="cuda"), text, context, lengths=[20])


@pytest.mark.parametrize("backend", ["sdpa", "cudnn"])
def test_attention_backends_agree(backend: str) -> None:
    assert relative(forward(backend, "bfloat16"), forward("sdpa", "float32")) < BFLOAT16


def test_the_autoencoder_in_bfloat16_is_near_float32() -> None:
    nodes = torch.randn(1, 3, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    video = torch.nn.functional.interpolate(nodes, (9, 64, 96), mode="trilinear").clamp(-1, 1)
    exact, low = (load_vae(TINY, dtype=dtype, device="cuda") for dtype in ("float32", "bfloat16"))
    host = load_vae(TINY)
    with torch.no_grad():
        latents, pixels = exact.encode(video), exact.decode(host.encode(video))
        assert relative(latents, host.encode(video)) < 1e-4
        assert relative(pixels, host.decode(host.encode(video))) < 1e-4
        assert relative(low.encode(video), latents) < BFLOAT16
        assert relative(low.decode(latents), exact.decode(latents)) < BFLOAT16


def test_small_clips_encoded_together_are_those_of_the_cpu() -> None:
    world = WorldConfig(6, 32, 5, ["t2v", "depth", "r2v_several", "swap_anything"], seed=3)
    tasks, shapes = world_rows(world)
    entries = [Entry(Row(i, task, ""), shape) for i, (task, shape) in enumerate(zip(tasks, shapes, strict=True))]
    rows = [(entry, draw_pixels(world, entry.row.line, entry.row.task)) for entry in entries]
    encoders = [load_encoder(TINY, torch.device(name), "float32") for name in ("cpu", "cuda")]
    for a, b in zip(*(encoder.encode_many(rows) for encoder in encoders), strict=True):
        assert a.real is not None and b.real is not None
        for mine, other in ((b.text, a.text), (b.context, a.context), (b.real, a.real)):
            assert mine.device.type == "cpu" and (mine - other).abs().max() < LATENTS


WAYS: dict[str, dict[str, object]] = {
    "float32": {"parallel__compute": "float32"},
    "bfloat16, float32 masters": {"parallel__compute": "bfloat16"},  # FSDP by itself, over NCCL
    "bfloat16, adapters": {"parallel__compute": "bfloat16", "lora__rank": 4},
    "bfloat16, autocast": {"parallel__compute": "bfloat16", "parallel__autocast": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_training_steps_are_finite_and_move_the_weights(way: str, tmp_path) -> None:
    """A step of the generator by scores, one of the critic, one of each with the discriminator."""
    pytest.importorskip("peft", reason="peft is not installed") if "adapters" in way else None
    device = torch.device("cuda")
    config = toy_config(toy_checkpoint(tmp_path / "teacher"), tmp_path / "run", device="cuda", **WAYS[way])
    ranks = Ranks()
    arrange(ranks, device, 1, 1)
    try:
        objective = Distill(config, ranks, device, ToySource())
        before = {name: _local(p).clone() for name, p in objective.networks.generator.parameters.items()}
        with objective.batches(0) as feeder:
            for step in range(4):  # generator_every is 2
                values = objective.step(step, [next(feeder).to(device)], lambda name: nullcontext())
                assert all(math.isfinite(value) for value in values.values()), values
        after = objective.networks.generator.parameters
        assert any(not torch.equal(before[name], _local(p)) for name, p in after.items())
        assert objective.guard.total == 0  # no update was skipped
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _local(parameter: torch.Tensor) -> torch.Tensor:
    parameter = parameter.detach()
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter  # type: ignore[attr-defined]


def test_triton_equals_the_eager_engine() -> None:
    """At the size of a latent frame, float32: 1e-3 of the largest gradient."""
    pytest.importorskip("triton", reason="Triton is not installed")
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 1560, 16, generator=g).cuda() for _ in range(2))
    ours, eager = (sinkhorn(x, y, eps=0.1, max_iters=60, tol=0, engine=e) for e in ("triton", "streamed"))
    torch.testing.assert_close(ours.cost, eager.cost, rtol=1e-3, atol=0)
    torch.testing.assert_close(ours.gradient, eager.gradient, rtol=0, atol=1e-3 * eager.gradient.abs().max().item())
