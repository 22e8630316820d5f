"""Nothing of size N x M, and one implementation that compiles."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vdot.transport import ot_gradient, sinkhorn


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that any operation returns."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for z in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(z, Tensor):
                self.bytes = max(self.bytes, z.numel() * z.element_size())
        return out


def clouds(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(1, n, 16, generator=g), torch.randn(1, n, 16, generator=g)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("gradient", ["closed", "unrolled"])
def test_memory_stays_within_the_budget(gradient, p):
    """3000 x 3000 float32 would be 36 MB; with a budget of 1 MB no tensor is larger than a block or the clouds."""
    x, y = clouds(3000)
    with LargestTensor() as seen:
        ot_gradient(x, y, eps=0.5, p=p, max_iters=2, tol=0, gradient=gradient, memory_mb=1)
    assert seen.bytes <= 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="peak resident set in KB is Linux's")
def test_resident_memory_of_a_large_cloud():
    """The process as the system sees it, fragmentation included: 6000 points a side, whose matrix would be
    144 MB, grow it by less than 40 MB."""
    script = """
import resource, torch
from vdot.transport import sinkhorn
x, y = torch.randn(1, 6000, 16), torch.randn(1, 6000, 16)
sinkhorn(x[:, :200], y[:, :200], engine="streamed")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
sinkhorn(x, y, max_iters=2, tol=0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 40 * 1024


def test_small_problems_share_the_budget():
    """A batch is cut so that the kernels kept at a time fit: 40 problems of 400 KB in 2 MB."""
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(40, 320, 16, generator=g) for _ in range(2))
    with LargestTensor() as seen:
        out = sinkhorn(x, y, eps=0.5, memory_mb=2)
    assert seen.bytes <= 2**21 and len(out.cost) == 40 and bool(out.converged.all())


def test_compiles_without_graph_breaks():
    """A fixed budget has no data-dependent step: fullgraph, equal to eager to float32 rounding."""
    x, y = clouds(64)

    @torch.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    def step(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        out = sinkhorn(x, y, eps=0.5, max_iters=5, tol=0)
        return out.cost, out.gradient

    cost, grad = step(x, y)
    expected = sinkhorn(x, y, eps=0.5, max_iters=5, tol=0)
    torch.testing.assert_close(cost, expected.cost, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad, expected.gradient, rtol=1e-4, atol=1e-6)
