"""Key maps against the tables of the real checkpoints: one to one, both ways."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from vdot.checkpoints import keymaps
from vdot.models.presets import PRESETS
from vdot.models.vace import VaceDiT


def table(reference: Path, name: str) -> dict:
    return json.loads(gzip.open(reference / "keys" / f"{name}.json.gz").read())


@pytest.mark.parametrize(
    "name, keymap",
    [
        ("vace_1_3b", keymaps.DIT),
        ("vace_14b", keymaps.DIT),
        ("umt5_xxl_encoder", keymaps.T5),
        ("wan21_vae", keymaps.VAE),
    ],
)
def test_maps_equal_the_tables(reference: Path, name: str, keymap: keymaps.KeyMap) -> None:
    pairs = table(reference, f"map_{name}_native_to_library")
    assert {k: keymap.to_library(k) for k in pairs} == pairs
    assert {v: keymap.to_native(v) for v in pairs.values()} == {v: k for k, v in pairs.items()}


@pytest.mark.parametrize("preset, name", [("1.3B", "vace_1_3b"), ("14B", "vace_14b")])
def test_real_sizes_export_to_the_diffusers_table(reference: Path, preset: str, name: str) -> None:
    with torch.device("meta"):
        state = VaceDiT(PRESETS[preset].dit).state_dict()
    exported = {keymaps.DIT.to_library(k): list(t.shape) for k, t in state.items()}
    assert exported == {k: shape for k, (shape, _) in table(reference, f"{name}_diffusers").items()}


def test_prefix_cases(golden_json) -> None:
    for case in golden_json("keys/facts")["vdot_14b_layout"]["prefix_cases"]:
        assert keymaps.clean_key(case["raw"]) == case["fully_cleaned"], case["raw"]


@pytest.mark.parametrize(
    "raw, clean",
    [
        ("_orig_mod.model.blocks.0._checkpoint_wrapped_module._fsdp_wrapped_module.ffn.0.bias", "blocks.0.ffn.0.bias"),
        ("model.diffusion_model.head.head.weight", "head.head.weight"),
        ("blocks.10.modulation", "blocks.10.modulation"),
        ("remodel.module_list.0", "remodel.module_list.0"),  # whole components only
    ],
)
def test_clean_key(raw: str, clean: str) -> None:
    assert keymaps.clean_key(raw) == clean


def test_clashes_are_found() -> None:
    names, clashes = keymaps.clean_keys(["model.a", "b", "module.a"])
    assert set(names) == {"a", "b"} and clashes == ["a"]


def test_no_rule_no_name() -> None:
    assert keymaps.DIT.to_library("blocks.0.self_attn.qkv.weight") is None
    assert keymaps.DIT.to_library("blocks.x.norm3.weight") is None
    assert keymaps.T5.to_native("decoder.block.0.layer.0.layer_norm.weight") is None
