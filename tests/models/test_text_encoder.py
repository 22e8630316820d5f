"""UMT5TextEncoder against the golden embeddings, transformers at full length, and its own truncation rules."""

import copy
import gzip
import json
import logging

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from tests.conftest import recipe_tensor
from vdot.checkpoints import keymaps
from vdot.models.text_encoder import UMT5TextEncoder, clean_prompt

GOLDEN = 5e-5  # of the golden data
ROUNDING = 2e-5  # the same sums in another order, outputs of order one
WORDS = "a red fox runs over the hill by night and day & , .".split()


def small_model(vocab: int = 400) -> UMT5EncoderModel:
    return UMT5EncoderModel(UMT5Config(vocab_size=vocab, d_model=64, d_kv=16, d_ff=160, num_layers=3, num_heads=4))


@pytest.fixture(scope="module")
def encoder() -> UMT5TextEncoder:
    """Recipe weights and a word-level tokenizer: nothing from outside the repository."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    model = small_model(len(vocabulary))
    state = model.state_dict()
    native = {k: keymaps.T5.to_native(k) or "token_embedding.weight" for k in state}
    model.load_state_dict({k: recipe_tensor(3, native[k], tuple(t.shape)) for k, t in state.items()})
    return UMT5TextEncoder(model, tokenizer, text_len=16)


@pytest.fixture(scope="module")
def golden_encoder(golden, reference) -> UMT5TextEncoder:
    model = small_model()
    state = {keymaps.T5.to_library(k): v.float() for k, v in golden("t5/tiny_weights").items()}
    model.load_state_dict(state | {"encoder.embed_tokens.weight": state["shared.weight"]})
    return UMT5TextEncoder(model, AutoTokenizer.from_pretrained(reference / "t5" / "tokenizer"), text_len=32)


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


# -- goldens --------------------------------------------------------------------------------------------------------


def test_golden_cleaning(golden_json) -> None:
    for raw, clean in golden_json("t5/cases")["info"]["clean_whitespace"]:
        assert clean_prompt(raw) == clean


def test_golden_prompts(golden, golden_json, golden_encoder: UMT5TextEncoder) -> None:
    data, prompts = golden("t5/tiny_cases"), golden_json("t5/cases")["info"]["prompts"]
    tokens = golden_encoder.tokenize(prompts)
    width = tokens.ids.shape[1]
    assert torch.equal(tokens.ids, data["prompts.ids"][:, :width])
    assert torch.equal(tokens.mask, data["prompts.mask"][:, :width]) and not data["prompts.mask"][:, width:].any()
    out, lengths = golden_encoder(prompts)
    assert out.shape == (3, 32, 64) and lengths.dtype == torch.int64
    for i, length in enumerate(lengths):
        assert gap(out[i, :length], data[f"prompts.out_trimmed.{i}"]) < GOLDEN
        assert not out[i, length:].any()


@pytest.mark.parametrize("case", ["short", "long"])
def test_golden_hidden_states(golden, golden_encoder: UMT5TextEncoder, case: str) -> None:
    data = golden("t5/tiny_cases")
    out = golden_encoder.encode_tokens(data[f"{case}.ids"], data[f"{case}.mask"])
    assert gap(out if case == "short" else out[:, ::5], data[f"{case}.out_zero_padded"]) < GOLDEN


def test_golden_relative_position_buckets(golden, golden_encoder: UMT5TextEncoder) -> None:
    data = golden("t5/tiny_cases")
    attention = golden_encoder.model.encoder.block[0].layer[0].SelfAttention
    buckets = attention._relative_position_bucket(data["bucket.rel"])
    assert torch.equal(buckets, data["bucket.bidirectional_32_max128"])


def test_keys_and_shapes_of_umt5_xxl(reference) -> None:
    config = UMT5Config(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    table = json.loads(gzip.open(reference / "keys" / "umt5_xxl_encoder_transformers.json.gz").read())
    state = {k: [list(t.shape), str(t.dtype).removeprefix("torch.")] for k, t in model.state_dict().items()}
    state.setdefault("encoder.embed_tokens.weight", state["shared.weight"])  # tied: not listed by every version
    assert state == table


# -- length ---------------------------------------------------------------------------------------------------------


def test_true_length_equals_text_len(encoder: UMT5TextEncoder) -> None:
    """Masked keys weigh exactly zero: computing at the batch's longest prompt changes no kept row."""
    prompts = ["a red fox", "the fox runs over the hill by night", ""]
    out, lengths = encoder(prompts)
    assert lengths.tolist() == [4, 9, 1]
    full = encoder.tokenizer(prompts, padding="max_length", max_length=16, return_tensors="pt")
    hidden = encoder.model(input_ids=full["input_ids"], attention_mask=full["attention_mask"]).last_hidden_state
    assert gap(out, hidden * full["attention_mask"][..., None]) < ROUNDING


def test_batch_equals_one_by_one(encoder: UMT5TextEncoder) -> None:
    prompts = ["a red fox", "the fox runs over the hill by night"]
    together, _ = encoder(prompts)
    alone = torch.cat([encoder([p])[0] for p in prompts])
    assert gap(together, alone) < ROUNDING


def test_long_prompts_are_cut_as_transformers_cuts_and_reported(encoder, caplog: pytest.LogCaptureFixture) -> None:
    prompt = "red fox " * 5000
    with caplog.at_level(logging.WARNING):
        out, lengths = encoder(["a fox", prompt])
    assert "Prompt 1 has 10001 tokens; the last 9985 beyond 16 are cut." in caplog.text
    assert lengths.tolist() == [3, 16] and out.shape[1] == 16
    tokens = encoder.tokenize([prompt])
    ids = encoder.tokenizer([prompt], truncation=True, max_length=16)["input_ids"]
    assert tokens.ids.tolist() == ids and ids[0][-1] == encoder.tokenizer.eos_token_id
    assert tokens.dropped == (9985,)


def test_prompt_of_exactly_text_len_is_whole(encoder: UMT5TextEncoder, caplog: pytest.LogCaptureFixture) -> None:
    assert encoder.tokenize(["fox " * 15]).dropped == (0,)
    assert encoder.tokenize(["fox " * 16]).dropped == (1,)


@pytest.mark.parametrize("prompts", [[], "a fox"])
def test_wrong_prompts(encoder: UMT5TextEncoder, prompts) -> None:
    with pytest.raises(ValueError, match="non-empty list of strings"):
        encoder(prompts)


# -- types ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 0.03), (torch.float16, 0.005)])
def test_half_precision(encoder: UMT5TextEncoder, dtype: torch.dtype, bound: float) -> None:
    """Relative error against float32; the mantissa has 8 or 11 bits. float16 keeps ``wo`` in float32."""
    half = copy.deepcopy(encoder).to(dtype)
    if dtype == torch.float16:
        for name, parameter in half.model.named_parameters():
            if any(island in name for island in UMT5TextEncoder.FLOAT16_ISLANDS):
                parameter.data = parameter.data.float()
    prompts = ["the red fox runs over the hill", "a day"]
    exact, out = encoder(prompts)[0], half(prompts)[0]
    assert out.dtype == dtype == half.dtype
    assert (out.float() - exact).norm() / exact.norm() < bound


def test_no_gradients(encoder: UMT5TextEncoder) -> None:
    assert not encoder(["a fox"])[0].requires_grad
