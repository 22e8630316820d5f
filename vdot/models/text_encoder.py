"""Prompts to text embeddings: UMT5 (transformers) behind Wan2.1's prompt cleaning, truncation and zero padding.

Precision. The published weights are bfloat16. In bfloat16 every matrix stays bfloat16, ``wo`` included, as the video
model was trained with; transformers' own ``from_pretrained`` keeps ``wo`` in float32, which costs 2 GB at XXL size.
In float16 ``wo`` overflows, so there it stays float32 (:attr:`UMT5TextEncoder.FLOAT16_ISLANDS`).
"""

import html
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ftfy
import torch
from torch import Tensor, nn
from transformers import UMT5EncoderModel

log = logging.getLogger(__name__)


def clean_prompt(text: str) -> str:
    """Repair mojibake, undo HTML escapes (twice: ``&amp;amp;`` is common in scraped captions), collapse white space."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()


@dataclass(frozen=True)
class Tokens:
    """A tokenised batch, padded to its longest prompt ``L <= text_len``."""

    ids: Tensor  # int64 [B, L]
    mask: Tensor  # int64 [B, L], 1 on tokens and 0 on padding
    lengths: Tensor  # int64 [B], tokens kept, end token included
    dropped: tuple[int, ...]  # tokens cut from each prompt because it exceeded text_len


class UMT5TextEncoder(nn.Module):
    """``encoder(prompts)`` -> embeddings ``[B, text_len, C]`` (zero past each prompt) and lengths ``[B]``.

    ``model`` is a transformers ``UMT5EncoderModel`` (any size), ``tokenizer`` any transformers tokenizer with pad and
    end tokens. The class owns no weights of its own and never trains: gradients are off.
    """

    FLOAT16_ISLANDS = ("wo.weight",)

    def __init__(self, model: UMT5EncoderModel, tokenizer: Any, text_len: int = 512) -> None:
        super().__init__()
        if text_len < 1:
            raise ValueError(f"text_len must be at least 1, got {text_len}.")
        self.model = model
        self.tokenizer = tokenizer
        self.text_len = text_len
        self.eval()

    @property
    def device(self) -> torch.device:
        return self.model.shared.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.shared.weight.dtype

    @property
    def dim(self) -> int:
        """Width ``C`` of an embedding."""
        return self.model.config.d_model

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        """Clean and tokenise; a prompt over ``text_len`` tokens loses its tail but keeps the end token."""
        if isinstance(prompts, str) or not prompts:
            raise ValueError("prompts must be a non-empty list of strings.")
        texts = [clean_prompt(p) for p in prompts]
        rows = self.tokenizer(texts, padding=False, truncation=False, verbose=False)["input_ids"]
        dropped = tuple(max(0, len(row) - self.text_len) for row in rows)
        rows = [row if not cut else row[: self.text_len - 1] + row[-1:] for row, cut in zip(rows, dropped, strict=True)]
        lengths = torch.tensor([len(row) for row in rows])
        width = max(1, int(lengths.max()))
        ids = torch.full((len(rows), width), self.tokenizer.pad_token_id or 0)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask = (torch.arange(width) < lengths[:, None]).long()
        return Tokens(ids, mask, lengths, dropped)

    @torch.no_grad()
    def encode_tokens(self, ids: Tensor, mask: Tensor) -> Tensor:
        """``ids, mask [B, L]`` -> hidden states ``[B, L, C]``, zero where ``mask`` is 0."""
        hidden = self.model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device)).last_hidden_state
        return hidden.masked_fill(mask.to(hidden.device)[..., None] == 0, 0)

    def forward(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """``B`` prompts -> embeddings ``[B, text_len, C]`` on the model's device, lengths int64 ``[B]``.

        Computes at the longest prompt's length, not at ``text_len``: masked keys have exactly zero weight and the
        position bias depends on distances alone, so the kept rows do not change. A cut prompt is logged with counts.
        """
        tokens = self.tokenize(prompts)
        for i, cut in enumerate(tokens.dropped):
            if cut:
                total = cut + self.text_len
                log.warning("Prompt %d has %d tokens; the last %d beyond %d are cut.", i, total, cut, self.text_len)
        hidden = self.encode_tokens(tokens.ids, tokens.mask)
        out = hidden.new_zeros(hidden.shape[0], self.text_len, hidden.shape[2])
        out[:, : hidden.shape[1]] = hidden
        return out, tokens.lengths.to(hidden.device)
