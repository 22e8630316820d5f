"""One tiny set of networks by the golden recipe, and the four folder layouts built from it."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from tests.conftest import recipe_tensor
from vdot.checkpoints import keymaps
from vdot.models.presets import DitConfig
from vdot.models.vace import VaceDiT

CONFIG = DitConfig(
    dim=48, ffn_dim=64, num_heads=2, num_layers=4, vace_layers=(0, 3), text_dim=32, text_len=24, freq_dim=64
)
NATIVE_JSON = {"dim": 48, "ffn_dim": 64, "num_heads": 2, "num_layers": 4, "vace_layers": [0, 3], "text_len": 24}
SCHEDULE = {"steps": 4, "shift": 8.0, "solver": "renoise", "guide_scale": 1.0}


@dataclass(frozen=True)
class Tiny:
    """Tensors by native names, in bfloat16-exact float32."""

    dit: dict[str, Tensor]
    text: dict[str, Tensor]
    vae: dict[str, Tensor]


def by_recipe(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    return {key: recipe_tensor(seed, key, shape) for key, shape in shapes.items()}


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    with torch.device("meta"):
        dit = VaceDiT(CONFIG).state_dict()
        text = UMT5EncoderModel(
            UMT5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
        ).state_dict()
        vae = AutoencoderKLWan(base_dim=4).state_dict()
    text.pop("encoder.embed_tokens.weight", None)
    return Tiny(
        by_recipe({k: tuple(t.shape) for k, t in dit.items()}, 1),
        by_recipe({keymaps.T5.to_native(k): tuple(t.shape) for k, t in text.items()}, 2),
        by_recipe({keymaps.VAE.to_native(k): tuple(t.shape) for k, t in vae.items()}, 3),
    )


def write_tokenizer(folder: Path) -> None:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *"a red fox runs over the hill".split()])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def _native_libraries(folder: Path, tiny: Tiny) -> None:
    torch.save({k: v.bfloat16() for k, v in tiny.text.items()}, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save(tiny.vae, folder / "Wan2.1_VAE.pth")
    write_tokenizer(folder / "google" / "umt5-xxl")


def make_vdot(folder: Path, tiny: Tiny) -> Path:
    (folder / "vdot-weights").mkdir(parents=True)
    generator = {"model." + k: v.bfloat16() for k, v in tiny.dit.items()}
    torch.save({"generator": generator}, folder / "vdot-weights" / "vdot_14b.pt")
    write_json(folder / "config.json", NATIVE_JSON)
    _native_libraries(folder, tiny)
    return folder


def make_wan(folder: Path, tiny: Tiny) -> Path:
    """Three shards and an index, as the 14B is published."""
    folder.mkdir(parents=True)
    weight_map = {}
    for i in range(3):
        name = f"diffusion_pytorch_model-{i + 1:05d}-of-00003.safetensors"
        part = {k: v for j, (k, v) in enumerate(tiny.dit.items()) if j % 3 == i}
        save_file(part, folder / name)
        weight_map.update(dict.fromkeys(part, name))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    write_json(folder / "diffusion_pytorch_model.safetensors.index.json", index)
    published = {"_class_name": "VaceWanModel", "_diffusers_version": "0.30.0", "model_type": "vace", "eps": 1e-6}
    write_json(folder / "config.json", published | NATIVE_JSON | {"in_dim": 16, "out_dim": 16, "vace_in_dim": 96})
    _native_libraries(folder, tiny)
    return folder


def make_diffusers(folder: Path, tiny: Tiny) -> Path:
    """Written by hand in diffusers' names, not by our own export."""
    (folder / "transformer").mkdir(parents=True)
    dit = {keymaps.DIT.to_library(k): v for k, v in tiny.dit.items()}
    save_file(dit, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    config = {
        "_class_name": "WanVACETransformer3DModel",
        "attention_head_dim": 24,
        "num_attention_heads": 2,
        "ffn_dim": 64,
        "num_layers": 4,
        "vace_layers": [0, 3],
        "text_dim": 32,
        "freq_dim": 64,
        "in_channels": 16,
        "out_channels": 16,
        "vace_in_channels": 96,
        "patch_size": [1, 2, 2],
        "eps": 1e-6,
    }
    write_json(folder / "transformer" / "config.json", config)
    vae = {keymaps.VAE.to_library(k): v for k, v in tiny.vae.items()}
    (folder / "vae").mkdir()
    save_file(vae, folder / "vae" / "diffusion_pytorch_model.safetensors")
    write_json(folder / "vae" / "config.json", {"_class_name": "AutoencoderKLWan", "base_dim": 4, "z_dim": 16})
    text = {keymaps.T5.to_library(k): v for k, v in tiny.text.items()}
    text["encoder.embed_tokens.weight"] = text["shared.weight"].clone()
    (folder / "text_encoder").mkdir()
    save_file(text, folder / "text_encoder" / "model.safetensors")
    write_json(folder / "text_encoder" / "config.json", {"architectures": ["UMT5EncoderModel"], "model_type": "umt5"})
    write_tokenizer(folder / "tokenizer")
    write_json(folder / "model_index.json", {"_class_name": "WanVACEPipeline"})
    return folder


@pytest.fixture(scope="session")
def layouts(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folder of each layout; read-only, copy before breaking one."""
    root = tmp_path_factory.mktemp("layouts")
    folders = {
        "vdot": make_vdot(root / "vdot", tiny),
        "wan": make_wan(root / "wan", tiny),
        "diffusers": make_diffusers(root / "diffusers", tiny),
    }
    folders["vdot under google"] = root / "nested"
    shutil.copytree(folders["vdot"], root / "nested" / "google")
    return folders
