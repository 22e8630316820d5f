"""What is saved loads again, here and in diffusers, and is either whole or not there."""

import os
import stat
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanVACEPipeline, WanVACETransformer3DModel

from tests.checkpoints.conftest import CONFIG, SCHEDULE
from vdot.checkpoints import inspect_checkpoint, keymaps, load_dit, load_text_encoder, load_vae, save_checkpoint
from vdot.checkpoints import saving as saving_module
from vdot.errors import OutputError
from vdot.models.text_encoder import UMT5TextEncoder
from vdot.models.vace import VaceDiT
from vdot.models.vae import WanVAE

Parts = tuple[VaceDiT, UMT5TextEncoder, WanVAE]
LAYOUTS = ("native", "diffusers", "vdot")


@pytest.fixture(scope="module")
def parts(layouts: dict[str, Path]) -> Parts:
    path = layouts["wan"]
    return load_dit(path), load_text_encoder(path), load_vae(path)


def assert_same(a: torch.nn.Module, b: torch.nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[k], right[k]) and left[k].dtype == right[k].dtype for k in left)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shard_bytes", [10**9, 50_000])
def test_round_trip(tmp_path: Path, parts: Parts, layout: str, shard_bytes: int) -> None:
    folder = save_checkpoint(tmp_path / "out", *parts, layout=layout, schedule=SCHEDULE, shard_bytes=shard_bytes)
    info = inspect_checkpoint(folder)
    assert (info.layout, info.dit, info.schedule, info.text_len) == (layout, CONFIG, SCHEDULE, 24)
    text = load_text_encoder(folder)
    assert_same(load_dit(folder), parts[0])
    assert_same(text.model, parts[1].model)
    assert_same(load_vae(folder).model, parts[2].model)
    prompts = ["a red fox", "the hill"]
    assert text.text_len == 24 and torch.equal(text(prompts)[0], parts[1](prompts)[0])
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_files_are_readable_for_whom_the_umask_lets(tmp_path: Path, parts: Parts) -> None:
    before = os.umask(0o027)
    try:
        folder = save_checkpoint(tmp_path / "out", *parts, layout="native")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*.safetensors")}
    assert len(modes) >= 2 and set(modes.values()) == {0o640}, modes


def test_round_trip_through_every_layout(tmp_path: Path, parts: Parts) -> None:
    dit = parts[0]
    for i, layout in enumerate((*LAYOUTS, *reversed(LAYOUTS))):
        dit = load_dit(save_checkpoint(tmp_path / str(i), dit, layout=layout))
    assert_same(dit, parts[0])


def test_diffusers_loads_strictly_and_agrees(tmp_path: Path, parts: Parts) -> None:
    """WanVACETransformer3DModel with these weights gives our velocity: float32, 1e-4 on outputs of order one."""
    folder = save_checkpoint(tmp_path / "out", *parts, layout="diffusers", schedule=SCHEDULE, shard_bytes=50_000)
    model, info = WanVACETransformer3DModel.from_pretrained(folder / "transformer", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(1, 16, 2, 4, 6, generator=generator), torch.randn(1, 96, 2, 4, 6, generator=generator)
    text, t = torch.randn(1, 24, 32, generator=generator), torch.tensor([700.0])
    with torch.no_grad():
        ours = parts[0](x, t, text, context)
        theirs = model(x, t, text, control_hidden_states=context, control_hidden_states_scale=torch.ones(2)).sample
    assert (ours - theirs).abs().max() < 1e-4
    assert AutoencoderKLWan.from_pretrained(folder / "vae").config.base_dim == 4


@pytest.mark.parametrize("patch", [(1, 1, 1), (2, 2, 2), (1, 1, 2)])
@torch.no_grad()
def test_other_patches_agree_with_diffusers(tmp_path: Path, parts: Parts, patch: tuple[int, int, int]) -> None:
    """Same tolerance. The published models all have patches of 1 x 2 x 2."""
    torch.manual_seed(1)
    dit = VaceDiT(replace(parts[0].config, patch_size=patch)).eval()
    for module in (dit.head.head, *(block.after_proj for block in dit.vace_blocks)):
        torch.nn.init.normal_(module.weight, std=0.1)  # zero at first: nothing would be compared
    folder = save_checkpoint(tmp_path / "out", dit, layout="diffusers")
    theirs = WanVACETransformer3DModel.from_pretrained(folder / "transformer")
    x, context, text, t = torch.randn(1, 16, 2, 4, 6), torch.randn(1, 96, 2, 4, 6), torch.randn(1, 24, 32), 700.0
    ours = dit(x, torch.tensor([t]), text, context)
    other = theirs(x, torch.tensor([t]), text, control_hidden_states=context, control_hidden_states_scale=torch.ones(2))
    assert ours.std() > 0.1 and (ours - other.sample).abs().max() < 1e-4


def test_diffusers_pipeline_opens_it(tmp_path: Path, parts: Parts) -> None:
    folder = save_checkpoint(tmp_path / "out", *parts, layout="diffusers", schedule=SCHEDULE)
    pipe = WanVACEPipeline.from_pretrained(folder)
    assert pipe.scheduler.config.flow_shift == 8.0 and pipe.scheduler.config.prediction_type == "flow_prediction"
    ids = pipe.tokenizer("a red fox")["input_ids"]
    assert ids == parts[1].tokenizer("a red fox")["input_ids"]


def test_vdot_layout_is_the_release_s(tmp_path: Path, parts: Parts) -> None:
    folder = save_checkpoint(tmp_path / "out", *parts, layout="vdot", dtype="bfloat16")
    content = torch.load(folder / "vdot-weights" / "vdot.pt", weights_only=True)
    assert content.keys() == {"generator"}
    assert content["generator"].keys() == {f"model.{key}" for key in parts[0].state_dict()}
    vae = torch.load(folder / "Wan2.1_VAE.pth", weights_only=True)
    assert vae.keys() == {keymaps.VAE.to_native(k) for k in parts[2].model.state_dict()}


def test_dtype_of_the_file(tmp_path: Path, parts: Parts) -> None:
    info = inspect_checkpoint(save_checkpoint(tmp_path / "out", parts[0], dtype="bf16"))
    islands = sum(
        p.numel() for k, p in parts[0].named_parameters() if any(part in k for part in VaceDiT.FLOAT32_ISLANDS)
    )
    dtypes = info.parts["dit"].dtypes
    assert dtypes == {"float32": islands, "bfloat16": info.parts["dit"].parameters - islands}


def test_channels_last_weights_are_saved_as_any_others(tmp_path: Path, layouts: dict[str, Path], parts: Parts) -> None:
    vae = load_vae(layouts["wan"], dtype="bfloat16")
    assert vae.model.encoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last_3d)
    for layout in LAYOUTS:
        folder = save_checkpoint(tmp_path / layout, parts[0], vae=vae, layout=layout)
        assert_same(load_vae(folder, dtype="bfloat16").model, vae.model)


def test_notes_may_be_dataclasses(tmp_path: Path, parts: Parts) -> None:
    @dataclass
    class Defaults:
        size: str = "64*64"

    info = inspect_checkpoint(save_checkpoint(tmp_path / "out", parts[0], schedule=SCHEDULE, defaults=Defaults()))
    assert info.defaults == {"size": "64*64"} and info.schedule == SCHEDULE and list(info.parts) == ["dit"]


# -- atomic ---------------------------------------------------------------------------------------------------------


def test_existing_folders(tmp_path: Path, parts: Parts) -> None:
    (tmp_path / "out").mkdir()
    save_checkpoint(tmp_path / "out", parts[0])  # empty: fine
    with pytest.raises(OutputError, match="exists already"):
        save_checkpoint(tmp_path / "out", parts[0])
    save_checkpoint(tmp_path / "out", parts[0], layout="diffusers", overwrite=True)
    assert inspect_checkpoint(tmp_path / "out").layout == "diffusers"
    assert not (tmp_path / "out" / "config.json").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("disk")])
@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_half_written(
    tmp_path: Path, parts: Parts, error: BaseException, overwrite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if overwrite:
        save_checkpoint(tmp_path / "out", parts[0])

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(saving_module, "save_file", fail)
    kind = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OutputError
    with pytest.raises(kind):
        save_checkpoint(tmp_path / "out", parts[0], overwrite=overwrite)
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if overwrite else [])
    if overwrite:
        assert_same(load_dit(tmp_path / "out"), parts[0])


def test_unknown_layout(tmp_path: Path, parts: Parts) -> None:
    with pytest.raises(OutputError, match="Unknown layout 'comfy'"):
        save_checkpoint(tmp_path / "out", parts[0], layout="comfy")
