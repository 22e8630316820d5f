"""VaceDiT against the golden forward passes, diffusers' implementation and the published key tables."""

import gzip
import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.conftest import recipe_tensor
from vdot.models.attention import attention_backend, sdpa, set_attention_backend
from vdot.models.dit import EmbeddedText, padding_bias, sinusoid
from vdot.models.presets import PRESETS, DitConfig
from vdot.models.rope import apply_rope, rope_table
from vdot.models.vace import VaceDiT

TOLERANCE = 1e-4  # absolute, float32, on outputs of standard deviation about 1.2 (reference README, section 3)


def config_of(meta: dict) -> DitConfig:
    return DitConfig(**meta["config"])


@pytest.fixture(scope="module")
def tiny(golden, golden_json) -> VaceDiT:
    dit = VaceDiT(config_of(golden_json("dit/cases")["tiny"]))
    dit.load_state_dict({k: v.float() for k, v in golden("dit/tiny_weights").items()})
    return dit.eval()


@pytest.fixture(scope="module")
def hd128(golden_json) -> VaceDiT:
    meta = golden_json("dit/cases")["hd128"]
    dit = VaceDiT(config_of(meta))
    dit.load_state_dict({k: recipe_tensor(meta["weight_seed"], k, tuple(v.shape)) for k, v in dit.state_dict().items()})
    return dit.eval()


def inputs(tensors: dict, case: str, sample: int) -> tuple:
    source = case if f"{case}.x.0" in tensors else "plain"
    text = tensors[f"{source}.context.{sample}"]
    return (
        tensors[f"{source}.x.{sample}"][None],
        tensors[f"{source}.t"][sample : sample + 1],
        text[None],
        tensors[f"{source}.vace_context.{sample}"].float()[None],
    )


CASES = {
    "tiny": [
        "plain",
        "scale_half",
        "padded",
        "ref1",
        "ref2",
        "float_t",
        "one_frame",
        "batch2_same",
        "batch2_mixed_sizes",
    ],
    "hd128": ["plain", "ref2", "batch2_mixed_sizes"],
}


@pytest.mark.parametrize("size, case", [(s, c) for s, cs in CASES.items() for c in cs])
@pytest.mark.parametrize("drop_padding", [False, True])
@torch.no_grad()
def test_forward_equals_the_original(size, case, drop_padding, golden, golden_json, request):
    dit, tensors = request.getfixturevalue(size), golden(f"dit/{size}_cases")
    meta = golden_json("dit/cases")[size]["cases"][case]
    for sample in range(len(meta["shapes"])):
        x, t, text, context = inputs(tensors, case, sample)
        lengths = [text.shape[1]] if drop_padding else None
        out = dit(x, t, text, context, context_scale=meta["context_scale"], lengths=lengths)
        torch.testing.assert_close(out[0], tensors[f"{case}.out.{sample}"], atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_a_batch_equals_its_samples(tiny, golden):
    tensors = golden("dit/tiny_cases")
    samples = [inputs(tensors, "batch2_same", i) for i in range(2)]
    text = torch.zeros(2, 32, 64)
    for i, sample in enumerate(samples):
        text[i, : sample[2].shape[1]] = sample[2][0]
    x, t, context = (torch.cat([s[i] for s in samples]) for i in (0, 1, 3))
    out = tiny(x, t, text, context, lengths=[s[2].shape[1] for s in samples])
    for i in range(2):
        torch.testing.assert_close(out[i], tensors[f"batch2_same.out.{i}"], atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_taps_are_the_block_outputs(tiny, golden):
    tensors = golden("dit/tiny_cases")
    out, features = tiny(*inputs(tensors, "plain", 0), taps=(0, 1, 2, 3))
    for i, feature in enumerate(features.tokens):
        torch.testing.assert_close(feature, tensors[f"plain.mid.block_{i}"], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(out[0], tensors["plain.out.0"], atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_zero_scale_is_the_backbone_alone(tiny, golden):
    x, t, text, context = inputs(golden("dit/tiny_cases"), "plain", 0)
    assert torch.equal(tiny(x, t, text, context, context_scale=0.0), tiny(x, t, text, None))


@pytest.mark.parametrize("head_dim", [24, 128])
def test_rope_equals_complex128(head_dim, golden):
    tensors = golden("dit/rope_and_time")
    x = tensors[f"rope.hd{head_dim}.in"][:, :60]  # a (3, 4, 5) grid and three rows of padding, never rotated
    ours = apply_rope(x, rope_table(head_dim, (3, 4, 5)))
    torch.testing.assert_close(ours, tensors[f"rope.hd{head_dim}.out"][:, :60], atol=1e-6, rtol=0)


def test_sinusoid_is_float64(golden):
    tensors = golden("dit/rope_and_time")
    ours = sinusoid(tensors["sinusoid.t"], 256)
    torch.testing.assert_close(ours, tensors["sinusoid.float64_path_dim256"], atol=1e-12, rtol=0)
    ours = sinusoid(tensors["sinusoid.t_float"], 256)
    torch.testing.assert_close(ours, tensors["sinusoid.float_t_dim256"], atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["1.3B", "14B"])
def test_keys_and_shapes_equal_the_published_checkpoint(name, reference):
    with torch.device("meta"):
        dit = VaceDiT(PRESETS[name].dit)
    table = json.load(gzip.open(reference / "keys" / f"vace_{name.lower().replace('.', '_')}.json.gz"))
    ours = {k: [list(v.shape), str(v.dtype).removeprefix("torch.")] for k, v in dit.state_dict().items()}
    assert ours == table


@pytest.mark.parametrize("length", [0, 1, 5, 28, 100, 507, 511])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_biased_rows_weigh_as_much_as_all_the_padding(length, dtype):
    kept = min(512, length + 4)
    bias = padding_bias((length,), kept, 512)
    weight = bias.to(dtype).double().exp()[0, 0, 0]
    assert torch.equal(weight[:length], torch.ones(length, dtype=torch.float64))
    assert weight[length:].sum().item() == pytest.approx(512 - length, rel=2e-6)


def test_block_compiles_whole_and_equals_eager():
    torch.manual_seed(0)
    dit = VaceDiT(DitConfig(dim=32, ffn_dim=64, num_heads=2, num_layers=1, vace_layers=(0,), text_dim=8, text_len=16))
    block, rope = dit.blocks[0], rope_table(16, (2, 3, 4))
    args = (torch.randn(1, 24, 32), torch.randn(1, 6, 32), rope, EmbeddedText(torch.randn(1, 16, 32), None))
    compiled = torch.compile(block, fullgraph=True)
    torch.testing.assert_close(compiled(*args), block(*args), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_half_precision_keeps_float32_islands():
    torch.manual_seed(0)
    dit = VaceDiT(PRESETS["tiny"].dit)
    torch.nn.init.normal_(dit.head.head.weight, std=0.02)
    x, t = torch.randn(1, 16, 2, 4, 4), torch.tensor([700.0])
    text, context = torch.randn(1, 7, 128), torch.randn(1, 96, 2, 4, 4)
    full = dit(x, t, text, context)
    for name, parameter in dit.named_parameters():
        if not any(island in name for island in VaceDiT.FLOAT32_ISLANDS):
            parameter.data = parameter.data.bfloat16()
    half = dit(x, t, text, context)
    assert half.dtype == torch.float32
    assert (half - full).norm() / full.norm() < 0.02  # bfloat16 has 8 bits: 2% over 6 blocks


def test_wrong_shapes_are_named():
    with torch.device("meta"):
        dit = VaceDiT(PRESETS["tiny"].dit)
        with pytest.raises(ValueError, match="not whole patches"):
            dit(torch.zeros(1, 16, 2, 5, 4), torch.zeros(1), torch.zeros(1, 3, 128))
        with pytest.raises(ValueError, match="vace_context must be"):
            dit(torch.zeros(1, 16, 2, 4, 4), torch.zeros(1), torch.zeros(1, 3, 128), torch.zeros(1, 96, 3, 4, 4))
        with pytest.raises(ValueError, match="at most 512"):
            dit.embed_text(torch.zeros(1, 513, 128))


def test_backends_are_chosen_by_name():
    with pytest.raises(ValueError, match="sdpa, flash2"):
        attention_backend("fast")
    with torch.device("meta"):
        dit = VaceDiT(PRESETS["tiny"].dit)
    if not torch.cuda.is_available():
        for name in ("flash2", "flash3", "sage", "cudnn"):
            with pytest.raises(ImportError, match=f"{name}.*not available"):
                set_attention_backend(dit, name)
    assert {m.backend for m in dit.modules() if hasattr(m, "backend")} == {"sdpa"}


def test_flex_equals_sdpa():
    q, k, v = torch.randn(3, 1, 48, 2, 16).unbind(0)
    a, b = attention_backend("flex")(q, k, v, None), attention_backend("sdpa")(q, k, v, None)
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("biased", [False, True])
def test_attention_that_trains_on_a_cpu_is_the_same_function(biased):
    """Plain products where gradients are needed, PyTorch's kernel where not: values and gradients to rounding."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, length, 3, 8, generator=generator).requires_grad_() for length in (7, 9, 9))
    bias = torch.zeros(2, 1, 1, 9) if biased else None
    if bias is not None:
        bias[1, ..., 5:] = float("-inf")
    weights = torch.randn(2, 7, 3, 8, generator=generator)
    made = sdpa(q, k, v, bias)
    swap = [x.detach().transpose(1, 2).requires_grad_() for x in (q, k, v)]
    with sdpa_kernel(SDPBackend.MATH):
        want = torch.nn.functional.scaled_dot_product_attention(*swap, attn_mask=bias).transpose(1, 2)
        theirs = torch.autograd.grad((want * weights).sum(), swap)
    with torch.no_grad():
        torch.testing.assert_close(sdpa(q, k, v, bias), made, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(made, want, rtol=1e-5, atol=1e-6)
    for ours, other in zip(torch.autograd.grad((made * weights).sum(), (q, k, v)), theirs, strict=True):
        torch.testing.assert_close(ours, other.transpose(1, 2), rtol=1e-5, atol=1e-6)
