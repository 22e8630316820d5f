"""Whatever is wrong with a checkpoint gives one sentence, before memory is spent and without running code."""

import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints.conftest import NATIVE_JSON, Tiny, write_json
from vdot.checkpoints import inspect_checkpoint, load_dit, load_text_encoder, load_vae
from vdot.checkpoints import reading as reading_module
from vdot.errors import CheckpointError


def one_sentence(path: Path, pattern: str, load: Callable = load_dit) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(path)
    message = str(caught.value)
    assert re.search(pattern, message), message
    assert "\n" not in message and message.endswith(".")
    return message


@pytest.fixture
def wan(tmp_path: Path, layouts: dict[str, Path]) -> Path:
    return Path(shutil.copytree(layouts["wan"], tmp_path / "wan"))


@pytest.fixture
def single(tmp_path: Path, tiny: Tiny) -> Path:
    """A folder with one native file, to be spoilt."""
    write_json(tmp_path / "config.json", NATIVE_JSON)
    save_file(tiny.dit, tmp_path / "diffusion_pytorch_model.safetensors")
    return tmp_path / "diffusion_pytorch_model.safetensors"


# -- not there ------------------------------------------------------------------------------------------------------


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    for load in (load_dit, load_vae, load_text_encoder, inspect_checkpoint):
        one_sentence(tmp_path / "nowhere", "nowhere does not exist", load)
        (tmp_path / "empty").mkdir(exist_ok=True)
        one_sentence(tmp_path / "empty", "empty is an empty folder", load)


def test_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    one_sentence(tmp_path, "holds no checkpoint of a layout that is known")
    (tmp_path / "a.mp4.incomplete").write_bytes(b"")
    one_sentence(tmp_path, "1 unfinished download in it")


def test_missing_parts(wan: Path) -> None:
    (wan / "Wan2.1_VAE.pth").unlink()
    one_sentence(wan, r"holds no autoencoder \(looked for Wan2.1_VAE.pth or vae/\)", load_vae)
    shutil.rmtree(wan / "google")
    one_sentence(wan, "has no tokenizer", load_text_encoder)
    (wan / "models_t5_umt5-xxl-enc-bf16.pth").unlink()
    one_sentence(wan, "holds no text encoder", load_text_encoder)
    for file in wan.glob("diffusion*"):
        file.unlink()
    one_sentence(wan, "holds no checkpoint|holds a VaceWanModel", load_dit)


def test_missing_shards(wan: Path) -> None:
    (wan / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    one_sentence(wan, r"lacks 1 of 3 weight files \(diffusion_pytorch_model-00002-of-00003.safetensors\)")
    (wan / "diffusion_pytorch_model-00002-of-00003.safetensors.incomplete").write_bytes(b"x")
    one_sentence(wan, "lacks 1 of 3 weight files .*; 1 unfinished download")
    (wan / "diffusion_pytorch_model.safetensors.index.json").unlink()  # the names still say how many there are
    one_sentence(wan, "lacks 1 of 3 weight files")


def test_damaged_json(wan: Path) -> None:
    (wan / "diffusion_pytorch_model.safetensors.index.json").write_text("{")
    one_sentence(wan, "index.json is not valid JSON")
    (wan / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    one_sentence(wan, "has no weight_map")
    (wan / "config.json").write_text("[]")
    one_sentence(wan, "config.json must hold a JSON object")


# -- damaged files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, pattern",
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is a git-LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"GGUF\x03\x00\x00\x00", "is a GGUF file"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00not json at all!", "neither a safetensors nor a PyTorch"),
        (b"RIFF....WAVEfmt ", "neither a safetensors nor a PyTorch"),
        (b"abc", "neither a safetensors nor a PyTorch"),
        (b"PK\x03\x04 cut short", "cut short or damaged"),
        (b"\x80\x02.", "cut short or damaged|damaged or not a weight file|holds a"),
    ],
)
def test_not_weights(single: Path, content: bytes, pattern: str) -> None:
    single.write_bytes(content)
    one_sentence(single.parent, pattern)
    one_sentence(single, pattern)


@pytest.mark.parametrize("keep", [0.5, 0.99, 0.001])
def test_truncated_safetensors(single: Path, keep: float) -> None:
    content = single.read_bytes()
    single.write_bytes(content[: int(len(content) * keep)])
    one_sentence(single.parent, "is cut short")


@pytest.mark.parametrize("keep", [0.5, 0.99, 0.001])
def test_truncated_torch_file(tmp_path: Path, tiny: Tiny, keep: float) -> None:
    torch.save(tiny.vae, tmp_path / "Wan2.1_VAE.pth")
    content = (tmp_path / "Wan2.1_VAE.pth").read_bytes()
    (tmp_path / "Wan2.1_VAE.pth").write_bytes(content[: int(len(content) * keep)])
    one_sentence(tmp_path, "cut short or damaged", load_vae)


def test_unfinished_download_by_name(single: Path) -> None:
    other = single.rename(single.with_suffix(".safetensors.incomplete"))
    one_sentence(other, "is an unfinished download")


# -- unsafe files ---------------------------------------------------------------------------------------------------


class Evil:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False])
def test_malicious_pickle_is_refused_and_not_run(tmp_path: Path, tiny: Tiny, zipped: bool) -> None:
    proof = tmp_path / "executed"
    content = {"generator": {**tiny.dit, "extra": Evil(f"touch {proof}")}}
    (tmp_path / "vdot-weights").mkdir()
    file = tmp_path / "vdot-weights" / "vdot_14b.pt"
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    for load in (load_dit, inspect_checkpoint):
        one_sentence(tmp_path, r"vdot_14b.pt wants to run or build (posix|nt)\.system.* was refused", load)
    assert not proof.exists()
    file.write_bytes(pickle.dumps(Evil(f"touch {proof}"), protocol=2))
    one_sentence(tmp_path, "refused|damaged")
    assert not proof.exists()


def test_whole_modules_are_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "x.pt")
    one_sentence(tmp_path / "x.pt", r"wants to run or build torch\.nn\.modules\.linear\.Linear")


@pytest.mark.parametrize(
    "content, pattern",
    [
        ([1, 2], "holds a list, not a state dict"),
        ({}, "holds no tensors"),
        ({"epoch": 3, "w": torch.zeros(1)}, "'epoch' in it is something else"),
        (torch.zeros(2), "holds a Tensor"),
    ],
)
def test_not_a_state_dict(tmp_path: Path, content: object, pattern: str) -> None:
    torch.save(content, tmp_path / "x.pt")
    one_sentence(tmp_path / "x.pt", pattern)


# -- other models ---------------------------------------------------------------------------------------------------


def test_stable_diffusion_folder(tmp_path: Path) -> None:
    write_json(tmp_path / "model_index.json", {"_class_name": "StableDiffusionPipeline"})
    (tmp_path / "unet").mkdir()
    one_sentence(tmp_path, "holds a StableDiffusionPipeline")
    (tmp_path / "vae").mkdir()
    write_json(tmp_path / "vae" / "config.json", {"_class_name": "AutoencoderKL"})
    one_sentence(tmp_path, "vae holds a AutoencoderKL, not the autoencoder AutoencoderKLWan", load_vae)


def test_other_wan_models(wan: Path, tiny: Tiny, tmp_path: Path) -> None:
    write_json(wan / "config.json", {"_class_name": "WanModel", **NATIVE_JSON})
    one_sentence(wan, "holds a WanModel, not the video transformer VaceWanModel")
    text_to_video = {k: v for k, v in tiny.dit.items() if not k.startswith("vace_")}
    write_json(tmp_path / "t2v" / "config.json", NATIVE_JSON)
    save_file(text_to_video, tmp_path / "t2v" / "x.safetensors")
    one_sentence(tmp_path / "t2v", "Wan2.1 transformer without the VACE branch")


@pytest.mark.parametrize(
    "keys, pattern",
    [
        (["diffusion_model.blocks.0.self_attn.q.lora_A.weight"], "it is a LoRA adapter"),
        (["lora_unet_blocks_0_ffn_0.lora_down.weight"], "it is a LoRA adapter"),
        (["model.diffusion_model.input_blocks.0.0.weight"], r"its tensors are named input_blocks\.0\.0\.weight"),
        (["encoder.down_blocks.0.conv1.weight"], "it holds the autoencoder"),
    ],
)
def test_files_of_other_models(tmp_path: Path, keys: list[str], pattern: str) -> None:
    save_file({key: torch.zeros(2, 2) for key in keys}, tmp_path / "x.safetensors")
    one_sentence(tmp_path / "x.safetensors", f"is not the video transformer of Wan2.1-VACE or VDOT: .*{pattern}")


def test_discriminator_heads_are_named(single: Path, tiny: Tiny) -> None:
    save_file({**tiny.dit, "_cls_pred_branch.1.weight": torch.zeros(2)}, single)
    one_sentence(single, r"1 unexpected \(_cls_pred_branch\.1\.weight\); these are discriminator heads")


def test_wan22_autoencoder(tmp_path: Path, tiny: Tiny) -> None:
    vae = dict(tiny.vae)
    vae["conv2.weight"] = torch.zeros(48, 48, 1, 1, 1)
    torch.save(vae, tmp_path / "Wan2.2_VAE.pth")
    one_sentence(tmp_path / "Wan2.2_VAE.pth", "48 latent channels, not the 16", load_vae)


# -- strictness -----------------------------------------------------------------------------------------------------


def test_all_problems_at_once_before_any_tensor(single: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    state = dict(tiny.dit)
    for i in range(12):  # more than are listed
        state[f"extra.{i}"] = torch.zeros(1)
    del state["blocks.1.norm3.bias"], state["head.modulation"]
    state["blocks.2.ffn.0.bias"] = torch.zeros(3)
    state["blocks.3.norm3.weight"] = torch.zeros(48, dtype=torch.int64)
    save_file(state, single)
    monkeypatch.setattr(reading_module, "_read", None)  # reading a tensor would now fail differently
    message = one_sentence(single, "dim 48, 4 blocks and 2 VACE blocks")
    assert re.search(r"2 missing \((blocks\.1\.norm3\.bias, head\.modulation|head.*bias)\)", message)
    assert re.search(r"12 unexpected \(extra\.\d+(, extra\.\d+){9}, \.\.\.\)", message)
    assert "1 of another shape (blocks.2.ffn.0.bias is [3], needs [64])" in message
    assert "1 not floating point (blocks.3.norm3.weight)" in message


def test_missing_tensors_that_sizes_are_read_from(single: Path, tiny: Tiny) -> None:
    gone = ("patch_embedding.weight", "blocks.0.ffn.0.weight", "text_embedding.0.weight", "blocks.0.self_attn.q.weight")
    save_file({k: v for k, v in tiny.dit.items() if k not in gone}, single)
    message = one_sentence(single, r"4 missing \(")
    assert all(key in message for key in gone)
    (single.parent / "config.json").unlink()
    one_sentence(single, "lacks the tensors that tell its dim, ffn_dim, and has no config.json")


def test_config_and_tensors_that_disagree(single: Path) -> None:
    write_json(single.parent / "config.json", NATIVE_JSON | {"ffn_dim": 96})
    one_sentence(single, r"12 of another shape|18 of another shape")
    write_json(single.parent / "config.json", NATIVE_JSON | {"num_heads": 7})
    one_sentence(single, "The config of .* is not one of a VACE transformer: .*7 heads")
    write_json(single.parent / "config.json", {k: v for k, v in NATIVE_JSON.items() if k != "num_heads"})
    one_sentence(single, "number of heads does not follow: put a config.json with num_heads")


def test_same_name_twice(tmp_path: Path, tiny: Tiny) -> None:
    write_json(tmp_path / "config.json", NATIVE_JSON)
    torch.save({**tiny.dit, "model.head.modulation": torch.zeros(1, 2, 48)}, tmp_path / "x.pt")
    one_sentence(tmp_path / "x.pt", r"holds head\.modulation twice under different prefixes")


def test_several_candidates(tmp_path: Path, tiny: Tiny) -> None:
    for name in ("a", "b"):
        (tmp_path / "vdot-weights").mkdir(exist_ok=True)
        torch.save(tiny.dit, tmp_path / "vdot-weights" / f"{name}.pt")
    one_sentence(tmp_path, r"several video transformer files \(a.pt, b.pt\): give one")


def test_damaged_tokenizer(wan: Path) -> None:
    (wan / "google" / "umt5-xxl" / "tokenizer.json").write_text("{}")
    one_sentence(wan, "is not a usable tokenizer folder", load_text_encoder)


def test_unsupported_stored_type(single: Path) -> None:
    content = load_file(single)
    save_file(content, single)
    single.write_bytes(single.read_bytes().replace(b'"dtype":"F32"', b'"dtype":"F31"', 1))
    one_sentence(single, "as F31, which is not supported")
