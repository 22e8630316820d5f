"""Ulysses, ring and both: outputs and gradients of a network equal one process, for even and uneven shares."""

import pytest
import torch
from torch import Tensor

from tests.parallel.networks import inputs, mesh, small_dit
from vdot.models.attention import Attend
from vdot.parallel.mesh import choose_sizes
from vdot.parallel.ring import block_kernels, plain_block, plain_block_backward
from vdot.parallel.ulysses import average_gradients, parallelize

# Float32; the order of summation differs. Gradients of weights sum over all tokens, hence relative to their size.
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 2e-5, 2e-4


def gradients(ulysses: int, ring: int, heads: int, shape: tuple[int, int, int]) -> dict[str, Tensor]:
    """Velocity and gradients of a scalar with respect to inputs and weights, through two chained forwards."""
    dit, given = small_dit(heads), inputs(*shape)
    layout = mesh(ulysses, ring)
    parallelize(dit, layout)
    given["x"].requires_grad_()
    given["vace_context"].requires_grad_()
    first = dit(**given)
    second = dit(given["x"] - 0.5 * first, given["t"] / 2, given["text"])
    (second.square().mean() + first.mean()).backward()
    leaves = dict(dit.named_parameters()) | {k: given[k] for k in ("x", "vace_context")}
    average_gradients(leaves.values(), layout.sequence)
    grads = {f"grad {k}": p.grad for k, p in leaves.items() if p.grad is not None}
    return {"first": first.detach(), "second": second.detach(), **grads}


CASES = [  # ulysses, ring, heads, latent shape
    (2, 1, 6, (3, 6, 10)),
    (2, 1, 5, (3, 6, 10)),  # heads 3 and 2, tokens 23 and 22
    (1, 2, 6, (3, 6, 10)),
    (4, 1, 4, (2, 4, 4)),
    (4, 1, 6, (3, 6, 10)),  # heads 2 2 1 1, tokens 12 11 11 11
    (4, 1, 3, (3, 6, 10)),  # a rank without a head
    (2, 2, 3, (3, 6, 10)),
    (1, 4, 2, (3, 6, 10)),
    (2, 2, 4, (1, 2, 6)),  # three tokens: a rank without a token
]


@pytest.mark.parametrize("ulysses,ring,heads,shape", CASES)
def test_outputs_and_gradients_equal_one_process(pool, ulysses, ring, heads, shape):
    torch.set_num_threads(1)
    expected = gradients(1, 1, heads, shape)
    for rank, found in enumerate(pool.run(ulysses * ring, gradients, ulysses, ring, heads, shape)):
        assert found.keys() == expected.keys()
        for key, want in expected.items():
            scale = 1.0 if not key.startswith("grad") else want.abs().max().item() + 1e-3
            tolerance = GRADIENT_TOLERANCE if key.startswith("grad") else OUTPUT_TOLERANCE
            assert (found[key] - want).abs().max() <= tolerance * scale, f"rank {rank}: {key}"


def collected_features(ulysses: int, ring: int) -> tuple[Tensor, list[Tensor], bool]:
    """Velocity and gathered taps in bfloat16; whether undoing leaves the network as it was."""
    dit = small_dit(dtype=torch.bfloat16)
    modules = [type(m) for m in dit.modules()]
    undo = parallelize(dit, mesh(ulysses, ring))
    with torch.no_grad():
        velocity, features = dit(**inputs(), taps=(0, 2))
        features = [dit.gather(f) for f in features.tokens]
    undo()
    return velocity, features, modules == [type(m) for m in dit.modules()]


@pytest.mark.parametrize("ulysses,ring", [(2, 1), (1, 2)])
def test_half_precision_features_and_undo(pool, ulysses, ring):
    velocity, features, _ = collected_features(1, 1)
    for found, taps, restored in pool.run(2, collected_features, ulysses, ring):
        assert restored
        assert (found - velocity).abs().max() < 0.02  # bfloat16: eight bits
        assert all((a - b).abs().max() < 0.05 for a, b in zip(taps, features, strict=True))


def attended_lengths(ulysses: int) -> list[tuple[int, ...]]:
    """Shapes of the keys that each self-attention's kernel sees."""
    seen = []
    dit = small_dit()
    for module in dit.modules():
        if isinstance(module, Attend):
            module.register_forward_hook(lambda m, args, out: seen.append(tuple(args[1].shape)))
    parallelize(dit, mesh(ulysses, 1))
    with torch.no_grad():
        dit(**inputs(), lengths=[9])
    return seen


def test_no_padding_is_attended_to(pool):
    """45 tokens and 6 heads on 4 ranks: every kernel sees exactly 45 keys, of 2, 2, 1 and 1 heads."""
    for rank, shapes in enumerate(pool.run(4, attended_lengths, 4)):
        own = [s for s in shapes if s[2] != 6]  # cross-attention is local and keeps all heads
        assert own and set(own) == {(1, 45, (2, 2, 1, 1)[rank], 16)}


def test_block_kernels_agree_with_the_plain_formulation():
    q, k, v, grad = torch.randn(4, 1, 2, 7, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    forward, backward = block_kernels(q)
    out, lse = forward(q, k[:, :, :5], v[:, :, :5])
    plain_out, plain_lse = plain_block(q, k[:, :, :5], v[:, :, :5])
    assert torch.allclose(out, plain_out, atol=1e-6) and torch.allclose(lse, plain_lse, atol=1e-6)
    fused = backward(grad, q, k[:, :, :5], v[:, :, :5], out, lse)
    plain = plain_block_backward(grad, q, k[:, :, :5], v[:, :, :5], out, lse)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(fused, plain, strict=True))


@pytest.mark.parametrize(
    "world,given,heads,expected",
    [
        (8, {}, 12, (4, 2)),  # 3 heads each, against 2 or 1
        (8, {}, 40, (8, 1)),
        (64, {"per_node": 8}, 40, (8, 8)),
        (6, {}, 40, (2, 3)),
        (8, {"ulysses": 8}, 12, (8, 1)),  # as asked, uneven
        (8, {"ring": 2}, 12, (4, 2)),
        (4, {"many_videos": True}, 40, (1, 1)),
        (4, {"many_videos": True, "ulysses": 2}, 40, (2, 1)),
        (1, {}, 40, (1, 1)),
    ],
)
def test_sizes_are_chosen(world, given, heads, expected):
    assert choose_sizes(world, heads=heads, **given) == expected


@pytest.mark.parametrize(
    "given", [{"ulysses": 3}, {"ulysses": 4, "ring": 2}, {"ulysses": 0}, {"ulysses": 1, "ring": 1}]
)
def test_sizes_that_do_not_fit_are_refused(given):
    with pytest.raises(ValueError, match=r"ulysses_size|ring_size"):
        choose_sizes(4, **given)
