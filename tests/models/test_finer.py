"""A transformer of finer patches, begun from a coarse one (vdot/models/finer.py), against the coarse one itself."""

from dataclasses import replace

import pytest
import torch

from vdot.models.finer import finer
from vdot.models.presets import PRESETS
from vdot.models.vace import VaceDiT


@pytest.fixture
def coarse() -> VaceDiT:
    """Small, every weight random: those that start at zero would hide what is done to them."""
    torch.manual_seed(0)
    dit = VaceDiT(replace(PRESETS["tiny"].dit, dim=24, ffn_dim=48, num_heads=2, num_layers=2, vace_layers=(0,)))
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return dit.eval()


def test_one_flat_patch_gives_the_mean_of_the_patch(coarse: VaceDiT) -> None:
    """Four equal tokens attend to equal values wherever they stand, so positions cannot matter. atol 1e-5, float32."""
    fine = finer(coarse)
    generator = torch.Generator().manual_seed(1)

    def flat(channels: int) -> torch.Tensor:
        return torch.randn(2, channels, 1, 1, 1, generator=generator).expand(-1, -1, 1, 2, 2)

    x, context = flat(coarse.config.in_dim), flat(coarse.config.vace_in_dim)
    text = torch.randn(2, 5, coarse.config.text_dim, generator=generator)
    t = torch.tensor([900.0, 300.0])
    with torch.no_grad():
        old, new = coarse(x, t, text, context), fine(x, t, text, context)
    mean = old.mean((3, 4), keepdim=True)
    assert float((old - mean).abs().max()) > 0.1  # the coarse one tells its four apart: there is something to average
    torch.testing.assert_close(new, mean.expand_as(new), atol=1e-5, rtol=0)


def test_everything_else_is_taken_over_and_the_old_stays(coarse: VaceDiT) -> None:
    before = {key: tensor.clone() for key, tensor in coarse.state_dict().items()}
    fine = finer(coarse)
    assert fine.config == replace(coarse.config, patch_size=(1, 1, 1))
    changed = {"patch_embedding.weight", "vace_patch_embedding.weight", "head.head.weight", "head.head.bias"}
    for key, tensor in fine.state_dict().items():
        assert torch.equal(coarse.state_dict()[key], before[key]), key
        assert key in changed or torch.equal(tensor, before[key]), key
    assert fine.config.tokens((5, 8, 8)) == 4 * coarse.config.tokens((5, 8, 8))


def test_patches_of_one_pixel_are_refused(coarse: VaceDiT) -> None:
    with pytest.raises(ValueError, match="1 x 1 x 1 already"):
        finer(finer(coarse))
