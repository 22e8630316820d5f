"""Triton kernels: numbers on a CPU by Triton's interpreter, machine code for Hopper, and CUDA where it is.

The interpreter is chosen when Triton is imported, hence a child process.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transport_oracle import unrolled_gradient

pytest.importorskip("triton", reason="Triton is not installed (pip install triton)")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
parent = pytest.mark.skipif(INTERPRETED, reason="runs in the parent process")
numbers = (
    []
    if INTERPRETED
    else [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA or the interpreter")]
)


def clouds() -> tuple[torch.Tensor, torch.Tensor]:
    """Sizes that fill no block evenly; 5 coordinates in a dot product of 16."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(2, 40, 5, generator=g), 0.8 * torch.randn(2, 70, 5, generator=g) + 0.3


@parent
def test_numbers_through_the_interpreter():
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", __file__]
    child = subprocess.run(command, env=env, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=300)
    assert child.returncode == 0, child.stdout + child.stderr
    assert child.stdout.count(".") >= 5, child.stdout  # five tests ran, none of them skipped


class TestNumbers:
    pytestmark = numbers

    @pytest.mark.parametrize(("p", "reach"), [(2, None), (2, 1.0), (1, None)])
    def test_transport_equals_the_streamed_engine(self, p, reach):
        """Everything a solve returns, float32 against float32: 1e-4 relative.

        Except p = 1 on CUDA, 1e-3: there the cost is a sum of square roots of squared distances, some of them small,
        from three-term TF32 products, whose rounding the root makes larger (3.6e-4 on an H200).
        """
        from vdot.transport import sinkhorn

        x, y = (z.to(DEVICE) for z in clouds())
        close = 1e-3 if p == 1 and DEVICE == "cuda" else 1e-4
        options = {"eps": 0.5, "p": p, "reach": reach, "max_iters": 4, "tol": 0, "relaxation": 1.4}
        ours, expected = (sinkhorn(x, y, engine=e, **options) for e in ("triton", "streamed"))
        for name in ("f", "g", "cost", "objective", "mass", "entropy", "barycentre", "gradient", "effective_matches"):
            a, b = getattr(ours, name), getattr(expected, name)
            torch.testing.assert_close(
                a, b, rtol=close, atol=close / 10 * b.abs().max().item(), msg=lambda m, n=name: f"{n}: {m}"
            )
        torch.testing.assert_close(ours.marginal_error, expected.marginal_error, rtol=1e-3, atol=1e-6)

    def test_unrolled_equals_autograd(self):
        from vdot.transport import ot_gradient

        x, y = clouds()
        _, expected, _ = unrolled_gradient(x.double(), y.double(), eps=0.5, iters=3)
        grad = ot_gradient(
            x.to(DEVICE), y.to(DEVICE), eps=0.5, max_iters=3, tol=0, gradient="unrolled", engine="triton"
        ).cpu()
        torch.testing.assert_close(grad.double(), expected, rtol=0, atol=1e-4 * expected.abs().max().item())

    def test_float64_is_refused(self):
        from vdot.errors import InputError
        from vdot.transport import sinkhorn

        x, y = (z.double().to(DEVICE) for z in clouds())
        with pytest.raises(InputError, match="float32"):
            sinkhorn(x, y, engine="triton")


@parent
@pytest.mark.parametrize("kernel", ["_half_step", "_moments"])
def test_compiles_for_hopper_with_tensor_cores(kernel):
    """Machine code for sm_90, made without a GPU: the dot products are TF32 tensor-core instructions."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vdot.transport import kernels

    function = getattr(kernels, kernel)
    constants = {"dim": 16, "wide": 16, "power": 2, "dot": "tf32x3", "bn": kernels.BLOCK_N, "bm": kernels.BLOCK_M}
    if kernel == "_moments":
        constants |= {"vn": 32, "cost_power": 0}
    kinds = {a: "constexpr" if a in constants else "*fp32" if a.endswith("_ptr") else "i32" for a in function.arg_names}
    source = ASTSource(function, kinds, constexprs=constants)
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert "tf32" in code.asm["ptx"] and "mma" in code.asm["ptx"] and "ex2.approx" in code.asm["ptx"]
    assert code.metadata.shared < 100 * 1024


def round_to_tf32(z: torch.Tensor) -> torch.Tensor:
    """Keep 10 bits of mantissa, round to nearest: what a tensor core does to its factors."""
    bits = z.view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


@parent
@pytest.mark.parametrize(("eps", "safe"), [(50.0, True), (0.1, False)])
def test_single_tf32_is_not_always_enough(eps, safe):
    """Why the engine measures before it trusts: log-sums off by 1e-3 bits and more at the release's eps, not at a large
    one. The three-term product (tf32x3) is within tolerance at both."""
    from vdot.transport.engines import lse_block
    from vdot.transport.kernels import DOT_TOLERANCE

    g = torch.Generator().manual_seed(0)
    x, y = (0.5 * torch.randn(1, 500, 16, generator=g) * (2 / (eps * 0.6931)) ** 0.5 for _ in range(2))
    h = -y.square().sum(2)[:, None] / 2
    exact = lse_block(x.double() @ y.double().mT + h)
    high_x, high_y = round_to_tf32(x), round_to_tf32(y)
    low_x, low_y = round_to_tf32(x - high_x), round_to_tf32(y - high_y)
    once = lse_block((high_x @ high_y.mT) + h)
    thrice = lse_block((high_x @ high_y.mT + (high_x @ low_y.mT + low_x @ high_y.mT)) + h)
    assert ((once - exact).abs().max().item() <= DOT_TOLERANCE) == safe
    assert (thrice - exact).abs().max().item() <= DOT_TOLERANCE / 4
