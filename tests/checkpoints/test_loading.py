"""All layouts load to the same networks: bit-equal weights (they are bfloat16-exact), right types, safe memory."""

import logging
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import save_file

from tests.checkpoints.conftest import CONFIG, NATIVE_JSON, SCHEDULE, Tiny, make_wan, write_json
from vdot.checkpoints import inspect_checkpoint, keymaps, load_dit, load_text_encoder, load_vae
from vdot.errors import CheckpointError
from vdot.models.presets import PRESETS
from vdot.models.vace import VaceDiT

LAYOUTS = ("vdot", "vdot under google", "wan", "diffusers")


def assert_equal(state: dict, expected: dict) -> None:
    assert state.keys() == expected.keys()
    for key, tensor in state.items():
        assert torch.equal(tensor.float(), expected[key]), key


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("mmap", [False, True])
def test_every_layout_loads(layouts: dict[str, Path], tiny: Tiny, name: str, mmap: bool) -> None:
    path = layouts[name]
    dit = load_dit(path, mmap=mmap)
    assert_equal(dit.state_dict(), tiny.dit)
    assert dit.config.vace_layers == CONFIG.vace_layers and dit.config.num_heads == 2
    assert not dit.training and all(p.requires_grad for p in dit.parameters())
    text = load_text_encoder(path, mmap=mmap)
    state = dict(text.model.state_dict())
    assert torch.equal(state.pop("encoder.embed_tokens.weight"), state["shared.weight"])
    assert text.model.encoder.embed_tokens.weight is text.model.shared.weight
    assert_equal({keymaps.T5.to_native(k): v for k, v in state.items()}, tiny.text)
    assert text(["a red fox"])[0].shape == (1, 512 if name == "diffusers" else 24, 32)
    vae = load_vae(path, mmap=mmap)
    assert_equal({keymaps.VAE.to_native(k): v for k, v in vae.model.state_dict().items()}, tiny.vae)
    assert vae.decode(vae.encode(torch.zeros(1, 3, 5, 16, 16))).isfinite().all()
    assert not any(p.requires_grad for p in (*text.parameters(), *vae.parameters()))


@pytest.mark.parametrize("name", LAYOUTS)
def test_inspect_reads_headers(layouts: dict[str, Path], tiny: Tiny, name: str) -> None:
    info = inspect_checkpoint(layouts[name])
    assert info.layout == name.split()[0]
    assert info.dit is not None and info.dit.vace_layers == (0, 3) and info.dit.text_dim == 32
    assert list(info.parts) == ["dit", "text_encoder", "vae"]
    for part, tensors in (("dit", tiny.dit), ("text_encoder", tiny.text), ("vae", tiny.vae)):
        count = sum(t.numel() for t in tensors.values())
        found = info.parts[part]
        assert (found.tensors, found.parameters) == (len(tensors), count)
        assert found.naming == ("library" if name == "diffusers" else "native")
        assert sum(found.dtypes.values()) == count
    vdot = name.startswith("vdot")
    assert info.parts["dit"].dtypes.keys() == {"bfloat16" if vdot else "float32"}
    assert info.nbytes == sum(part.nbytes for part in info.parts.values())
    assert info.tokenizer is not None and info.schedule is None


def test_single_files_and_part_folders(layouts: dict[str, Path], tiny: Tiny) -> None:
    assert_equal(load_dit(layouts["vdot"] / "vdot-weights" / "vdot_14b.pt").state_dict(), tiny.dit)
    assert_equal(load_dit(layouts["diffusers"] / "transformer").state_dict(), tiny.dit)
    file = layouts["diffusers"] / "transformer" / "diffusion_pytorch_model.safetensors"
    assert_equal(load_dit(file).state_dict(), tiny.dit)
    for path in (layouts["wan"] / "Wan2.1_VAE.pth", layouts["diffusers"] / "vae"):
        assert load_vae(path).latent_channels == 16
        assert list(inspect_checkpoint(path).parts) == ["vae"]
    for path in (layouts["wan"] / "models_t5_umt5-xxl-enc-bf16.pth", layouts["diffusers"] / "text_encoder"):
        assert load_text_encoder(path, text_len=9).text_len == 9
        assert list(inspect_checkpoint(path).parts) == ["text_encoder"]


@pytest.mark.parametrize("config", [None, {"tokenizer_class": "T5Tokenizer", "pad_token": "<pad>", "extra_ids": 0}])
def test_sentencepiece_tokenizer(tmp_path: Path, layouts: dict[str, Path], config: dict | None) -> None:
    """As google/umt5-xxl is published, with and without its small JSON files: the pieces of sentencepiece itself."""
    folder = Path(shutil.copytree(layouts["wan"], tmp_path / "x"))
    place = folder / "google" / "umt5-xxl"
    shutil.rmtree(place)
    place.mkdir()
    text = ["a red fox runs over the hill", "the blue boat sails at night", "soft light falls by day"] * 9
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix=str(place / "spiece"), vocab_size=32, minloglevel=3, **ids
    )
    if config is not None:
        write_json(place / "tokenizer_config.json", config)
    tokens = load_text_encoder(folder).tokenize(["the red fox"])
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(place / "spiece.model")).encode("the red fox")
    assert tokens.ids.tolist() == [[*pieces, 1]] and 2 not in pieces


def test_notes_travel(tmp_path: Path, tiny: Tiny) -> None:
    folder = make_wan(tmp_path / "x", tiny)
    write_json(folder / "schedule.json", SCHEDULE)
    write_json(folder / "defaults.json", {"size": "64*64"})
    info = inspect_checkpoint(folder)
    assert info.schedule == SCHEDULE and info.defaults == {"size": "64*64"}


# -- names ----------------------------------------------------------------------------------------------------------


def test_every_wrapper_and_nesting(tmp_path: Path, tiny: Tiny, golden_json, caplog: pytest.LogCaptureFixture) -> None:
    write_json(tmp_path / "config.json", NATIVE_JSON)
    file = tmp_path / "x.pt"
    wrapped = {
        f"_orig_mod.model.{k.replace('blocks.', 'blocks._fsdp_wrapped_module.')}": v for k, v in tiny.dit.items()
    }
    for content in (wrapped, {"state_dict": wrapped}, {"model": {"generator": wrapped}, "step": 3}):
        torch.save(content, file)
        assert_equal(load_dit(file).state_dict(), tiny.dit)


def test_generator_is_chosen_over_its_average_and_said(tmp_path: Path, tiny: Tiny, caplog) -> None:
    write_json(tmp_path / "config.json", NATIVE_JSON)
    average = {k: v + 1 for k, v in tiny.dit.items()}
    torch.save({"generator_ema": average, "generator": tiny.dit}, tmp_path / "x.pt")
    with caplog.at_level(logging.INFO):
        assert_equal(load_dit(tmp_path / "x.pt").state_dict(), tiny.dit)
    assert "generator and generator_ema: generator is used" in caplog.text
    assert_equal(load_dit(tmp_path / "x.pt", state_key="generator_ema").state_dict(), average)
    with pytest.raises(CheckpointError, match="no state dict named critic"):
        load_dit(tmp_path / "x.pt", state_key="critic")


def test_sizes_without_a_config(tmp_path: Path) -> None:
    """As a VDOT folder is published: heads of 128, VACE blocks evenly spaced."""
    config = PRESETS["14B"].dit
    with torch.device("meta"):
        shapes = {k: tuple(t.shape) for k, t in VaceDiT(config).state_dict().items()}
    from vdot.checkpoints.shapes import dit_config

    assert dit_config(shapes, None, "x", None) == config
    with torch.device("meta"):
        shapes = {k: tuple(t.shape) for k, t in VaceDiT(PRESETS["1.3B"].dit).state_dict().items()}
    assert dit_config(shapes, None, "x", None) == PRESETS["1.3B"].dit


# -- types and memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_float32_islands(layouts: dict[str, Path], tiny: Tiny, name: str, dtype: str | torch.dtype) -> None:
    low = torch.bfloat16 if dtype == "bfloat16" else dtype
    for key, tensor in load_dit(layouts[name], dtype=dtype).state_dict().items():
        island = any(fragment in key for fragment in VaceDiT.FLOAT32_ISLANDS)
        assert tensor.dtype == (torch.float32 if island else low), key
        assert torch.equal(tensor, tiny.dit[key].to(tensor.dtype)), key


def test_islands_are_those_of_the_original(tiny: Tiny) -> None:
    kept = {key for key in tiny.dit if any(fragment in key for fragment in VaceDiT.FLOAT32_ISLANDS)}
    expected = ("modulation", ".norm_q.", ".norm_k.", ".norm3.", "time_embedding.", "time_projection.", "head.head.")
    assert kept == {key for key in tiny.dit if any(part in key for part in expected)}


def test_text_encoder_types(layouts: dict[str, Path]) -> None:
    half = load_text_encoder(layouts["vdot"], dtype="fp16").model.state_dict()
    assert {k for k, t in half.items() if t.dtype == torch.float32} == {k for k in half if k.endswith("wo.weight")}
    assert {t.dtype for t in load_text_encoder(layouts["vdot"], dtype="bf16").model.state_dict().values()} == {
        torch.bfloat16
    }


def test_unknown_dtype(layouts: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="Unknown dtype 'float8'"):
        load_dit(layouts["wan"], dtype="float8")
    with pytest.raises(CheckpointError, match=r"not as torch\.int8"):
        load_dit(layouts["wan"], dtype=torch.int8)


@pytest.mark.parametrize("name", ["vdot", "diffusers"])
@pytest.mark.parametrize("mmap", [False, True])
def test_training_in_place_never_reaches_the_file(
    tmp_path: Path, layouts: dict[str, Path], name: str, mmap: bool
) -> None:
    folder = tmp_path / "x"
    shutil.copytree(layouts[name], folder)
    file = next(p for p in folder.rglob("*") if p.name in ("vdot_14b.pt", "diffusion_pytorch_model.safetensors"))
    before = file.read_bytes()
    dit = load_dit(folder, dtype="bfloat16" if name == "vdot" else "float32", mmap=mmap)
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.add_(1)
    assert file.read_bytes() == before


@pytest.mark.parametrize("name", ["vdot", "wan"])
def test_loaded_weights_outlive_the_file(tmp_path: Path, layouts: dict[str, Path], tiny: Tiny, name: str) -> None:
    """By default nothing is backed by the file: overwriting it in place (not only unlinking it) is harmless."""
    folder = tmp_path / "x"
    shutil.copytree(layouts[name], folder)
    dit, vae = load_dit(folder), load_vae(folder)
    for file in folder.rglob("*"):
        if file.is_file():
            file.write_bytes(b"\0" * 16)
    assert_equal(dit.state_dict(), tiny.dit)
    assert_equal({keymaps.VAE.to_native(k): v for k, v in vae.model.state_dict().items()}, tiny.vae)


def test_no_random_initialisation(layouts: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading draws no random number, and allocates no parameter outside the meta device."""
    state = torch.get_rng_state()
    load_dit(layouts["wan"])
    load_text_encoder(layouts["wan"])
    load_vae(layouts["wan"])
    assert torch.equal(torch.get_rng_state(), state)


def test_large_tensors_are_cast_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vdot.checkpoints import reading

    monkeypatch.setattr(reading, "CAST_ELEMENTS", 3)
    tensors = {"a": torch.randn(5, 7), "b": torch.randn(3).bfloat16(), "c": torch.randn(()), "d": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "x.safetensors")
    file = reading.open_weights(tmp_path / "x.safetensors")
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        out = dict(file.read(dict.fromkeys(tensors, dtype), torch.device("cpu")))
        assert all(torch.equal(out[k], tensors[k].to(dtype)) for k in tensors) and out.keys() == tensors.keys()


def test_headers_survive_every_type(tmp_path: Path) -> None:
    from vdot.checkpoints.reading import SAFETENSORS_DTYPES, open_weights

    tensors = {name: torch.zeros(2, 3).to(dtype) for name, dtype in SAFETENSORS_DTYPES.items()}
    save_file(tensors, tmp_path / "x.safetensors")
    headers = open_weights(tmp_path / "x.safetensors").headers
    assert {k: (h.shape, h.dtype) for k, h in headers.items()} == {k: ((2, 3), t.dtype) for k, t in tensors.items()}


def test_legacy_torch_file(tmp_path: Path, tiny: Tiny) -> None:
    """Files from before the zip format cannot be mapped, but load."""
    write_json(tmp_path / "config.json", NATIVE_JSON)
    torch.save(tiny.dit, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    assert_equal(load_dit(tmp_path / "x.pth").state_dict(), tiny.dit)
