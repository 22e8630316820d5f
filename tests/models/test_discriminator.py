"""The discriminator against logits of the original, and its sizes against the release's checkpoints."""

import json

import pytest
import torch

from tests.conftest import recipe_tensor
from vdot.models.discriminator import Discriminator
from vdot.models.presets import PRESETS, DitConfig
from vdot.models.vace import VaceDiT

TOLERANCE = 1e-4  # absolute, float32 (reference README, section 10)


@pytest.fixture(scope="module")
def tiny(golden, golden_json) -> VaceDiT:
    dit = VaceDiT(DitConfig(**golden_json("dit/cases")["tiny"]["config"]))
    dit.load_state_dict({k: v.float() for k, v in golden("dit/tiny_weights").items()})
    return dit.eval()


def recipe(module: torch.nn.Module, seed: int) -> None:
    module.load_state_dict({k: recipe_tensor(seed, k, tuple(v.shape)) for k, v in module.state_dict().items()})


@torch.no_grad()
@pytest.mark.parametrize("time", [True, False], ids=["concat_time", "no_time"])
@pytest.mark.parametrize("case", ["b1", "b2_shared_vace", "b2_two_vace"])
def test_logits_equal_the_original(case, time, tiny, golden, golden_json):
    meta, tensors = golden_json("train/classify_tiny"), golden("train/classify_tiny")
    name = "concat_time" if time else "no_time"
    heads = Discriminator(96, inner=meta["small_dim"], num_heads=meta["gan_heads"], ffn_dim=meta["gan_ffn"], time=time)
    recipe(heads, meta["heads_recipe_seed"][name])
    stored = {k.removeprefix("heads.concat_time."): v for k, v in tensors.items() if k.startswith("heads.")}
    assert not time or all(torch.equal(stored[k].float(), v) for k, v in heads.state_dict().items())
    x, t = tensors[f"{case}.x"].transpose(1, 2), tensors[f"{case}.timestep"][:, 0]
    contexts = [v.float() for k, v in sorted(tensors.items()) if k.startswith(f"{case}.vace_context")]
    velocity, features = tiny(x, t, tensors[f"{case}.context"], torch.stack(contexts), taps=meta["taps_after_blocks"])
    flow = tensors[f"{case}.sin_f64.flow"].transpose(1, 2)
    torch.testing.assert_close(velocity, flow, atol=TOLERANCE, rtol=0)
    logits = heads(*features)
    torch.testing.assert_close(logits[:, None], tensors[f"{case}.{name}.sin_f64.logits"], atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_forty_layers_and_true_head_sizes(golden, golden_json):
    meta, tensors = golden_json("train/classify_40layers_recipe"), golden("train/classify_40layers_recipe")
    dit, heads = VaceDiT(DitConfig(**meta["config"])).eval(), Discriminator(meta["config"]["dim"])
    recipe(dit, meta["dit_seed"])
    recipe(heads, meta["heads_seed"])
    x, t = tensors["x"].transpose(1, 2), tensors["timestep"][:, 0]
    _, features = dit(x, t, tensors["context"], tensors["vace_context.0"].float()[None], taps=meta["taps_after_blocks"])
    torch.testing.assert_close(heads(*features)[:, None], tensors["sin_f64.logits"], atol=TOLERANCE, rtol=0)
    assert tuple(meta["taps_after_blocks"]) == PRESETS["14B"].taps


@pytest.mark.parametrize("name", ["14B", "1.3B"])
@pytest.mark.parametrize("time", [True, False], ids=["concat_time", "no_time"])
def test_keys_and_shapes_equal_the_release(name, time, reference):
    tables = json.loads((reference / "keys" / "discriminator_heads.json").read_text())
    table = tables[f"discriminator_{name.lower().replace('.', '_')}_{'concat_time' if time else 'no_time'}"]
    with torch.device("meta"):
        heads = Discriminator(PRESETS[name].dit.dim, time=time)
    assert {k: list(v.shape) for k, v in heads.state_dict().items()} == {k: shape for k, (shape, _) in table.items()}
