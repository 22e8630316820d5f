"""FSDP2: results equal one process, and a rank reads and holds its own rows alone."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.conftest import ROOT
from tests.parallel.networks import inputs, mesh, small_dit
from vdot.checkpoints import load_dit, load_text_encoder
from vdot.checkpoints.reading import SafetensorsFile, TorchFile
from vdot.models.vace import VaceDiT
from vdot.parallel.mesh import Mesh
from vdot.parallel.shard import Fsdp, wholes
from vdot.parallel.ulysses import average_gradients, parallelize

TINY = ROOT / "models" / "vdot-tiny"


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[str, Path]:
    """The small transformer as a folder of safetensors and as one ``.pt``, in float32."""
    folder, dit = tmp_path_factory.mktemp("dit"), small_dit()
    state = {name: p.detach().contiguous() for name, p in dit.named_parameters()}
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    c = dit.config
    sizes = {"dim": c.dim, "ffn_dim": c.ffn_dim, "num_heads": c.num_heads, "num_layers": c.num_layers}
    sizes |= {"vace_layers": list(c.vace_layers), "text_dim": c.text_dim, "text_len": c.text_len}
    (folder / "config.json").write_text(json.dumps(sizes))
    other = tmp_path_factory.mktemp("pt")
    torch.save({"generator": state}, other / "dit.pt")
    (other / "config.json").write_text(json.dumps(sizes))
    return {"safetensors": folder, "pt": other / "dit.pt"}


def bytes_read(reader: type) -> list[int]:
    """Counts the bytes that leave ``reader``'s files through ``read`` and ``read_rows``."""
    total = [0]
    for name in ("read", "read_rows"):
        original = getattr(reader, name)

        def counted(self, *args, original=original, **kwargs):
            for key, tensor in original(self, *args, **kwargs):
                total[0] += tensor.numel() * self.headers[key].dtype.itemsize
                yield key, tensor

        setattr(reader, name, counted)
    return total


def generate(path: str, ulysses: int, ring: int, dtype: str, sharded: bool) -> tuple[Tensor, int, int, set]:
    """Velocity; parameter bytes held; file bytes read; types of the parameters."""
    before = SafetensorsFile.read, SafetensorsFile.read_rows, TorchFile.read, TorchFile.read_rows
    read = bytes_read(TorchFile if path.endswith(".pt") else SafetensorsFile)
    try:
        layout = mesh(ulysses, ring)
        sharder = Fsdp(layout.device_mesh) if sharded else None
        dit = load_dit(path, dtype, sharder=sharder).requires_grad_(False)
    finally:
        SafetensorsFile.read, SafetensorsFile.read_rows, TorchFile.read, TorchFile.read_rows = before
    parallelize(dit, layout)
    local = [p.to_local() if isinstance(p, DTensor) else p for p in dit.parameters()]
    with torch.no_grad():
        dit(**inputs())
        velocity = dit(**inputs())  # again: shards were put back
    types = {(name.split(".")[-2:][0] if "." in name else name, p.dtype) for name, p in dit.named_parameters()}
    return velocity, sum(p.numel() * p.itemsize for p in local), read[0], types


@pytest.mark.parametrize("kind,ulysses,ring,dtype", [
    ("safetensors", 2, 1, "float32"),
    ("safetensors", 2, 1, "bfloat16"),
    ("pt", 1, 2, "float32"),
    ("safetensors", 4, 1, "float32"),
    ("safetensors", 2, 2, "bfloat16"),
])  # fmt: skip
def test_sharded_and_sequence_parallel_equal_one_process(pool, weights, kind, ulysses, ring, dtype):
    path, size = str(weights[kind]), ulysses * ring
    expected, held, read, types = generate(path, 1, 1, dtype, False)
    whole = sum(p.numel() * p.itemsize for p in wholes(load_dit(path, dtype)).values())
    tolerance = 2e-5 if dtype == "float32" else 0.03  # bfloat16: attention sums in another order
    for velocity, own, own_read, own_types in pool.run(size, generate, path, ulysses, ring, dtype, True):
        assert velocity.dtype == torch.float32 and (velocity - expected).abs().max() < tolerance
        assert own_types == types  # the float32 islands are float32
        assert own <= (held - whole) / size * 1.05 + whole
        assert own_read <= 1.05 * read / size + 4 * whole


def sharded_prompts(size: int) -> tuple[Tensor, float]:
    """Embeddings of two prompts, and the share of the encoder's parameters that this rank holds."""
    encoder = load_text_encoder(TINY, sharder=Fsdp(mesh(size).device_mesh) if size > 1 else None)
    local = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in encoder.parameters())
    embedded, _ = encoder(["a red ball", "a blue square rolls over the green grass"])
    return embedded, local / sum(p.numel() for p in encoder.parameters())


def test_sharded_text_encoder(pool):
    expected, _ = sharded_prompts(1)
    for embedded, share in pool.run(2, sharded_prompts, 2):
        assert (embedded - expected).abs().max() < 1e-5
        assert 0.49 < share < 0.51


def train_step(path: str, ulysses: int, ring: int, autocast: bool) -> dict[str, Tensor]:
    """Gradients of every parameter with FSDP over the same ranks as the sequence."""
    layout = mesh(ulysses, ring)
    compute = torch.bfloat16 if autocast else None
    alone = ulysses * ring == 1
    dit: VaceDiT = load_dit(path, sharder=None if alone else Fsdp(layout.device_mesh, compute=compute))
    dit.requires_grad_(True)
    parallelize(dit, layout)
    dit(**inputs()).square().mean().backward()
    average_gradients(wholes(dit).values(), Mesh().sequence if alone else layout.sequence)
    grads = {k: p.grad for k, p in dit.named_parameters() if p.grad is not None}
    return {k: (g.full_tensor() if isinstance(g, DTensor) else g) for k, g in grads.items()}


@pytest.mark.parametrize("ulysses,ring,autocast", [(2, 1, False), (2, 1, True), (2, 2, False)])
def test_gradients_with_sharded_weights(pool, weights, ulysses, ring, autocast):
    expected = train_step(str(weights["safetensors"]), 1, 1, False)
    tolerance = 0.1 if autocast else 2e-4  # relative to each gradient's largest entry
    for found in pool.run(ulysses * ring, train_step, str(weights["safetensors"]), ulysses, ring, autocast):
        assert found.keys() == expected.keys()
        for key, want in expected.items():
            assert (found[key] - want).abs().max() <= tolerance * (want.abs().max() + 1e-3), key
