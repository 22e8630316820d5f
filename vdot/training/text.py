"""A small text encoder for the procedural world: it learns to say of each caption what there is to be seen.

The lesson is what a video transformer needs of it: each attribute is read from the embeddings by attention with a
query of its own and one linear layer, so whatever is learned can be read by cross-attention later.
"""

import io
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from vdot.checkpoints.saving import save_encoders
from vdot.data.captions import ABSENT, CLASSES, SCENE_CLASSES, Captions, caption_batches, draw_captions
from vdot.data.sprites import corpus
from vdot.distillation.steps import Log
from vdot.models.presets import PRESETS
from vdot.models.text_encoder import UMT5TextEncoder, clean_prompt
from vdot.parallel.state import Ranks
from vdot.runtime import DTYPES, log
from vdot.training.config import TrainConfig
from vdot.training.objectives import Section
from vdot.training.whole import WholeNetwork

ALONE = "[㐀-鿿]|[^\\w\\s▁]"  # a Chinese character, or a sign that is not the mark of white space


class AttributeReader(nn.Module):
    """Embeddings ``[B, L, C]`` to the classes of every attribute: one query, one linear layer each."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(CLASSES), dim) * dim**-0.5)
        self.heads = nn.ModuleDict({name: nn.Linear(dim, len(classes)) for name, classes in CLASSES.items()})

    def forward(self, embeddings: Tensor, mask: Tensor) -> list[Tensor]:
        """``mask [B, L]``, 1 on tokens -> logits ``[B, classes]`` of each attribute."""
        scores = torch.einsum("ac,blc->bal", self.queries, embeddings)
        weights = scores.masked_fill(mask[:, None] == 0, float("-inf")).softmax(-1)
        read = weights @ embeddings
        return [head(read[:, i]) for i, head in enumerate(self.heads.values())]


class TextEncoder(WholeNetwork):
    """A UMT5 of the tiny size and its own tokenizer, from nothing; the reader is thrown away in the end."""

    def __init__(self, config: TrainConfig, ranks: Ranks, device: torch.device) -> None:
        super().__init__(config, ranks, device)
        preset = PRESETS["tiny"]
        tokenizer = train_tokenizer(corpus(config.text.tokenizer_captions), preset.text.vocab_size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)  # equal on all ranks
            model = UMT5EncoderModel(UMT5Config(**asdict(preset.text), feed_forward_proj="gated-gelu", dropout_rate=0))
            reader = AttributeReader(preset.text.d_model)
        self.network: Any = nn.ModuleDict({"encoder": model, "reader": reader}).to(device).train()
        self.encoder = UMT5TextEncoder(model, tokenizer, preset.dit.text_len)
        # The word table is one parameter under two names; named_parameters gives it once.
        self.optimize(dict(self.network.named_parameters()))

    def batches(self, start: int) -> AbstractContextManager[Iterator[Captions]]:
        config, everyone = self.config, self.everyone
        return caption_batches(config.world.seed, "train", config.batch_size, start, everyone.rank, everyone.size)

    def step(self, step: int, batches: Sequence[Captions], section: Section) -> dict[str, float]:
        values = self.updater.update(step, batches, partial(self._differentiate, section), section)
        if self.ema is not None:
            self.ema.update(step)
        if self.due(self.config.text.evaluate_every, step):
            with section("sample"):
                values |= self.evaluate()
        return values

    def _differentiate(self, section: Section, batch: Captions, share: float) -> Log:
        with section("forward"):
            logits = self._read(batch.texts)
            losses = [F.cross_entropy(*pair, ignore_index=ABSENT) for pair in zip(logits, batch.classes.T, strict=True)]
            # A batch may lack a third thing altogether: the mean over nothing is no number.
            loss = torch.stack(losses).nan_to_num(0.0).mean()
        with section("backward"):
            (share * loss).backward()
        return {"loss": loss.detach()}

    def _read(self, texts: Sequence[str]) -> list[Tensor]:
        tokens = self.encoder.tokenize(texts)
        ids, mask = tokens.ids.to(self.device), tokens.mask.to(self.device)
        hidden = self.network["encoder"](input_ids=ids, attention_mask=mask).last_hidden_state
        return self.network["reader"](hidden, mask)

    def work(self, step: int, batch: Captions) -> tuple[float, float]:
        """By the rule of two operations per weight and token, and twice that in the backward pass."""
        tokens = self.encoder.tokenize(batch.texts[:8]).lengths.float().mean().item()
        blocks = sum(p.numel() for p in self.network["encoder"].encoder.block.parameters())
        return tokens, 6.0 * blocks * tokens

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Shares of right answers on held-out captions, of the averaged weights: per attribute, and of whole scenes."""
        count, size = self.config.text.evaluate_captions, max(1, self.config.batch_size)
        right: list[Tensor] = []
        with self.averaged(self.network):
            for first in range(0, count, size):
                captions = draw_captions(range(first, min(first + size, count)), "test")
                answers = torch.stack([logits.argmax(-1) for logits in self._read(captions.texts)], dim=1).cpu()
                right.append(torch.where(captions.classes == ABSENT, torch.nan, (answers == captions.classes).float()))
        return scores(torch.cat(right))

    def sample(self, step: int) -> dict[str, Path]:
        """There is nothing to look at."""
        return {}

    def export(self) -> Path:
        """``export/text_encoder`` and ``export/tokenizer``, in ``export_dtype``."""
        config = self.config
        assert config.output_dir is not None
        folder = Path(config.output_dir, "export")
        with self.ranks.agree():
            if self.ranks.rank == 0:
                with self.averaged(self.network):
                    state = {k: v.to("cpu", copy=True) for k, v in self.network["encoder"].state_dict().items()}
                model = UMT5EncoderModel(self.network["encoder"].config)
                model.load_state_dict(state)
                finished = UMT5TextEncoder(model, self.encoder.tokenizer, self.encoder.text_len)
                save_encoders(folder, finished.to(DTYPES[config.export_dtype]), overwrite=True)
                log.info("exported %s", folder)
        return folder


def scores(right: Tensor) -> dict[str, float]:
    """``right [N, len(CLASSES)]``, 1 or 0 or NaN for what is absent -> shares by attribute, things taken together."""
    names = list(CLASSES)
    columns: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        columns.setdefault(name if name in SCENE_CLASSES else name.rsplit("_", 1)[0], []).append(i)
    values = {f"accuracy_{name}": right[:, which].nanmean().item() for name, which in columns.items()}
    return values | {
        "accuracy": right.nanmean().item(),
        "accuracy_scene": right.nan_to_num(1.0).amin(dim=1).mean().item(),
    }


def train_tokenizer(captions: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A SentencePiece unigram model of at most ``vocab_size`` pieces, deterministic, in the form of UMT5's.

    Pad is 0, end 1, unknown 2, and white space a leading mark. Signs and Chinese characters stand for themselves: with
    no spaces between them, whole sentences would become pieces.
    """
    import sentencepiece

    cleaned = (unicodedata.normalize("NFKC", clean_prompt(text)) for text in captions)
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(re.sub(ALONE, "\t\\g<0>\t", text) for text in cleaned),
        pretokenization_delimiter="\t",
        model_writer=file,
        model_type="unigram",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        normalization_rule_name="identity",  # done above
        character_coverage=1.0,
        required_chars="".join(map(chr, range(33, 127))),  # whatever a user types can be spelled
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=1,
    )
    trained = sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())
    pieces = [(trained.id_to_piece(i), trained.get_score(i)) for i in range(trained.vocab_size())]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.normalizer = normalizers.NFKC()
    alone = pre_tokenizers.Split(Regex(ALONE), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), alone])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
