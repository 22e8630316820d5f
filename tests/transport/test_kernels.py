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

    def test_many_iterations_equal_one_by_one(self):
        """Seven in a row (a graph of five, on CUDA) against the streamed engine's seven; and again, replayed."""
        streamed, triton = engines()
        omega = torch.tensor([1.5, 1.2], device=DEVICE)
        f, g = (h[:, :size] for h, size in zip(torch.zeros(2, 2, 70, device=DEVICE), (40, 70), strict=True))
        for _ in range(2):
            ours, expected = (e.sweeps(f, g, omega, 7) for e in (triton, streamed))
            for name, value in expected._asdict().items():
                torch.testing.assert_close(
                    getattr(ours, name), value, rtol=0, atol=2e-3, msg=lambda m, n=name: f"{n}: {m}"
                )

    def test_log_sums_after_a_jump(self):
        """The log-sums of the step before are a guess: one that is 1000 bits off changes nothing. Neither does another
        problem of the same size in between."""
        streamed, triton = engines()
        for shift in (0.0, 1000.0, -1000.0):
            g = torch.linspace(-1, 1, 70, device=DEVICE).expand(2, 70) + shift
            torch.testing.assert_close(triton.rows(g), streamed.rows(g), rtol=0, atol=1e-3)
            others = engines(0.7)
            torch.testing.assert_close(others[1].rows(g), others[0].rows(g), rtol=0, atol=1e-3)


def engines(scale: float = 1.0) -> tuple:
    from vdot.transport.engines import Streamed
    from vdot.transport.kernels import TritonEngine
    from vdot.transport.problem import build, working_clouds

    x, y, centre = working_clouds(*(scale * z.to(DEVICE) for z in clouds()))
    problem = build(x, y, centre, x.new_full((2,), 0.5), 2, (None, None), None)
    return Streamed(problem, 2**20), TritonEngine(problem, 2**20)


@parent
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("kernel", ["_half_step", "_moments", "_prepare"])
def test_compiles_for_hopper_with_tensor_cores(kernel, p):
    """Machine code for sm_90, made without a GPU: dot products of halves on tensor cores, the fast exponential."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vdot.transport import kernels

    function = getattr(kernels, kernel)
    constants = {"wide": 16, "power": p, "bn": kernels.BLOCK_N, "bm": kernels.BLOCK_M}
    constants |= {"dim": 16, "vn": 32, "cost_power": 0 if p == 2 else -1}
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    points = dict.fromkeys(
        ("points_ptr",) if kernel == "_prepare" else ("s_ptr", "t_ptr"), "*fp16" if p == 2 else "*fp32"
    )
    kinds = {a: "*fp32" if a.endswith("_ptr") else "i32" for a in function.arg_names}
    kinds |= dict.fromkeys(constants, "constexpr") | points
    # As at launch: memory begins, and padded rows are long, at multiples of 16.
    even = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(function.arg_names) if a.endswith(("_ptr", "_pad"))}
    source = ASTSource(function, kinds, constexprs=constants, attrs=even)
    options = {"num_warps": kernels.WARPS, "num_stages": kernels.STAGES}
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = code.asm["ptx"]
    assert code.metadata.shared < 100 * 1024
    if kernel != "_prepare":
        assert "ex2.approx.ftz" in ptx and ("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16" in ptx) == (p == 2)


@parent
def test_two_halves_a_factor_are_as_good_as_float32():
    """Log-sums of the widest problem that is solved in float32 (2^15 bits), against float64: products of halves err as
    much as float32 products, whose sums round; one half a factor errs a hundred times more."""
    from vdot.transport.engines import lse_block

    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(1, 1500, 16, generator=g) for _ in range(2))
    scale = (2**16 / max(z.square().sum(2).amax().item() for z in (x, y))) ** 0.5
    x, y = x * scale, y * scale
    h = -y.square().sum(2)[:, None] / 2
    exact = lse_block(x.double() @ y.double().mT + h)

    def halves(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        high = z.half().float()
        return high, (z - high).half().float()

    def error(product: torch.Tensor) -> float:
        return (lse_block(product.double() + h) - exact).abs().max().item()

    (a, b), (c, d) = halves(x), halves(y)
    single = error(x @ y.mT)
    assert error(((b @ d.mT + b @ c.mT) + a @ d.mT) + a @ c.mT) <= 1.25 * single
    assert error(a @ c.mT) > 100 * single
