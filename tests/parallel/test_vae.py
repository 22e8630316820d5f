"""The shared autoencoder equals one process, and each rank does its share of the work and no more."""

import pytest
import torch
from torch import Tensor, nn

from tests.parallel.networks import mesh, small_vae
from vdot.parallel.mesh import Group
from vdot.parallel.vae import SharedVAE, share_out

ROUNDING = 2e-5  # float32, values of order one: the same sums, in tiles


def clip(frames: int, height: int, width: int, seed: int = 0) -> Tensor:
    return torch.rand(3, frames, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


CLIPS = {
    "inactive and reactive": [(5, 48, 64, 0), (5, 48, 64, 1)],
    "one clip": [(9, 48, 64, 0)],
    "tiles of unequal size": [(5, 72, 40, 0)],
    "references": [(5, 32, 48, 0), (1, 32, 48, 1), (1, 32, 48, 2), (1, 32, 48, 3)],
    "fewer latents than ranks": [(5, 8, 16, 0), (1, 8, 8, 1)],
}


def encode(size: int, name: str) -> list[Tensor]:
    group = mesh(size).sequence
    return SharedVAE(small_vae(), group).encode_clips([clip(*shape) for shape in CLIPS[name]])


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", CLIPS)
def test_encoding_equals_one_process(pool, size, name):
    vae = small_vae()
    with torch.no_grad():
        expected = [vae.encode(clip(*shape)[None])[0] for shape in CLIPS[name]]
    for found in pool.run(size, encode, size, name):
        assert all((a - b).abs().max() < ROUNDING for a, b in zip(found, expected, strict=True))


def test_three_ranks_and_two_clips(pool):
    """No even share: both clips stay together, in three tiles."""
    vae = small_vae()
    with torch.no_grad():
        expected = [vae.encode(clip(*shape)[None])[0] for shape in CLIPS["inactive and reactive"]]
    for found in pool.run(3, encode, 3, "inactive and reactive"):
        assert all((a - b).abs().max() < ROUNDING for a, b in zip(found, expected, strict=True))


def decode(size: int, shape: tuple[int, ...], owner: int) -> Tensor | None:
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return SharedVAE(small_vae(), mesh(size).sequence).decode(latents, lambda x: x, owner)


@pytest.mark.parametrize(
    "size,shape,owner", [(2, (1, 16, 3, 8, 12), 0), (4, (1, 16, 3, 9, 5), 3), (4, (1, 16, 2, 1, 2), 0)]
)
def test_decoding_equals_one_process_on_the_owner(pool, size, shape, owner):
    with torch.no_grad():
        expected = small_vae().decode(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    for rank, found in enumerate(pool.run(size, decode, size, shape, owner)):
        if rank != owner:
            assert found is None
        else:
            assert found.shape == expected.shape and (found - expected).abs().max() < ROUNDING


def encoder_work(size: int) -> tuple[int, int, int, int]:
    """Multiplications of the encoder's convolutions for two clips, for one clip, for constants; constants made."""
    vae = small_vae()
    work, made = [0], [0]

    def count(module: nn.Module, args: tuple, out: Tensor) -> None:
        work[0] += out.numel() * module.weight[0].numel()

    for module in vae.model.encoder.modules():
        if isinstance(module, nn.Conv3d | nn.Conv2d):
            module.register_forward_hook(count)
    encode_constant = vae.encode_constant

    def counted(*args: float) -> Tensor:
        made[0] += 1
        return encode_constant(*args)

    vae.encode_constant = counted
    shared, counts = SharedVAE(vae, mesh(size).sequence if size > 1 else Group()), []
    for clips in ([clip(5, 128, 192, 0), clip(5, 128, 192, 1)], [clip(5, 128, 192)], [torch.zeros(3, 5, 64, 64)] * 2):
        work[0] = 0
        shared.encode_clips(clips)
        counts.append(work[0])
    return counts[0], counts[1], counts[2], made[0]


def test_each_rank_encodes_its_share(pool):
    """At most 1/N and the borders; of two equal constant clips one is made, by one rank, from the cache."""
    both, one, _, _ = encoder_work(1)
    for size, border in ((2, 1.10), (4, 1.25)):  # tiles of 128 x 96 and 64 x 96 pixels: small, so borders count
        answers = pool.run(size, encoder_work, size)
        assert all(answer[0] <= border * both / size and answer[1] <= border * one / size for answer in answers)
        assert sum(answer[3] for answer in answers) == 1
        assert sum(answer[2] > 0 for answer in answers) == 1
        if size == 2:  # inactive on one rank, reactive on the other: no borders
            assert all(answer[0] == both // 2 for answer in answers)


def test_shares_cover_the_frame_once():
    for clips, ranks, height, width in ((1, 4, 60, 104), (2, 8, 60, 104), (2, 3, 9, 7), (1, 64, 60, 104), (1, 8, 1, 3)):
        share = share_out(clips, ranks, height, width)
        for wanted in set(share.clips):
            seen = torch.zeros(height, width)
            for number, tile in zip(share.clips, share.tiles, strict=True):
                if number == wanted and tile is not None:
                    seen[tile[0][0] : tile[0][1], tile[1][0] : tile[1][1]] += 1
            assert (seen == 1).all()
