"""Rows to what the networks see: text embeddings, VACE contexts, real latents; on the fly, or once for a whole table.

A row's key is a hash of its files' bytes, its prompt and the settings: a row that is in the folder is never encoded
again, also after ``kill -9`` or when the table has grown.
"""

import json
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from vdot.checkpoints import inspect_checkpoint, load_text_encoder, load_vae
from vdot.checkpoints.layouts import find_layout
from vdot.checkpoints.loading import Weights, read_headers
from vdot.checkpoints.reading import Rows
from vdot.conditioning import encode_context, join_latents, split_clips
from vdot.data.batch import Example
from vdot.data.decoding import Pixels, Workers, decode, widen
from vdot.data.manifest import BadRow, Entry, Layout, Row, TableConfig, check_table, explain
from vdot.data.shards import (
    META,
    NEGATIVE,
    STORE,
    VERSION,
    Record,
    Settings,
    find_rows,
    pack,
    part_files,
    read_shard,
    write_index,
    write_shard,
)
from vdot.data.world import WorldConfig, draw_pixels, world_rows
from vdot.errors import ConfigError, InputError, one_line
from vdot.models.text_encoder import UMT5TextEncoder
from vdot.models.vae import WanVAE
from vdot.parallel.launch import arrange
from vdot.parallel.state import Queue, Ranks
from vdot.request import Defaults
from vdot.runtime import log, pick_dtype
from vdot.video import to_model
from vdot.video.output import remove_leftovers

SHARD_BYTES = (
    512 << 20
)  # a shard is closed at this size, or at SHARD_ROWS (more of small ones): a killed run loses one at most
SHARD_ROWS = 64
ENCODERS = ("text_encoder", "vae")
TOGETHER = 32  # rows of small clips that go through the networks together
TOGETHER_ON_GPU = 128  # where starting the kernels of a few takes longer than they do
EVEN_ON_GPU = 32  # clips there are filled up to a multiple: cuDNN plans each convolution anew for every other number
TOGETHER_ON_CPU = 8  # clips in one pass of the autoencoder: more fall out of its cache, at half as much time again


# -- one row ----------------------------------------------------------------------------------------------------------


class Encoder:
    """The text encoder and the autoencoder, for rows. Equal prompts, conditions and clips are computed once.

    May be called from several threads; the networks run in one at a time.
    """

    def __init__(self, text_encoder: UMT5TextEncoder, vae: WanVAE, keep: int = 16) -> None:
        """``keep``: prompts, contexts and clips remembered, of each as many."""
        self.text_encoder, self.vae = text_encoder.eval(), vae.eval()
        self.device = vae.device
        self.together, self.even = (TOGETHER, 1) if self.device.type == "cpu" else (TOGETHER_ON_GPU, EVEN_ON_GPU)
        self._keep = keep
        self._kept: dict[str, OrderedDict[Any, Tensor]] = {}
        self._lock = threading.Lock()

    def embed(self, prompt: str) -> Tensor:
        """Rows ``[L, C]`` of a prompt in the text encoder's type, on the CPU."""

        def compute() -> Tensor:
            embedded, lengths = self.text_encoder([prompt])
            return embedded[0, : int(lengths[0])].cpu()

        return self._once("text", prompt, compute)

    def encode(self, entry: Entry, pixels: Pixels, index: int) -> Example:
        """The example of a row, on the CPU; context and real latents in float32.

        Raises:
            InputError: the files no longer give the shape that they were checked with.
        """
        references = len(pixels.references)
        context = self._once("context", pixels.condition_key, lambda: self._context(pixels))
        real = None
        if pixels.real is not None:
            clip = self._once("real", pixels.real_key, lambda: self._clip(pixels))
            real = torch.cat([context[:16, :references], clip], dim=1)
        row = entry.row
        example = Example(self.embed(row.prompt), context, real, references, row.task, row.prompt, index)
        if example.shape != entry.shape:
            raise InputError(f"the files of line {row.line} have changed: they give {example.shape}, not {entry.shape}")
        return example

    @torch.no_grad()
    def encode_many(self, rows: Sequence[tuple[Entry, Pixels]]) -> list[Example]:
        """As :meth:`encode`, for small clips of one size: those of all rows go through the networks together.

        What is done for each row or clip alone is little, and nothing of it waits for the device.
        """
        prompts = [entry.row.prompt if pixels.prompt is None else pixels.prompt for entry, pixels in rows]
        with self._lock:
            embedded, counts = self.text_encoder(prompts)
            lengths = counts.tolist()
            texts = [text[:n] for text, n in zip(embedded[:, : max(lengths)].cpu(), lengths, strict=True)]
            conditions, reals = widen([pixels for _, pixels in rows], self.device)
            parts = [split_clips(condition, self.device) for condition in conditions]
            clips = [clip for split, _ in parts for clip in split] + [real for real in reals if real is not None]
            latents = iter(self._encode_clips(clips))
            contexts = _to_host([join_latents(list(islice(latents, len(split))), mask) for split, mask in parts])
            encoded = iter(_to_host(list(latents)))
        examples = []
        for (entry, pixels), prompt, text, context in zip(rows, prompts, texts, contexts, strict=True):
            references = len(pixels.references)
            whole = None if pixels.real is None else torch.cat([context[:16, :references], next(encoded)], dim=1)
            examples.append(Example(text, context, whole, references, entry.row.task, prompt, 0))
        return examples

    def _encode_clips(self, clips: Sequence[Tensor]) -> list[Tensor]:
        """``[3, T, H, W]`` each -> latents ``[16, F, h, w]``, in batches of one shape; one grey everywhere once."""
        made: dict[int, Tensor] = {}
        groups: dict[torch.Size, list[int]] = {}
        for index, clip in enumerate(clips):
            groups.setdefault(clip.shape, []).append(index)
        for shape, group in groups.items():
            stacked = torch.stack([clips[i] for i in group])
            ranges = torch.stack(stacked.flatten(1).aminmax(dim=1)).tolist()  # one wait for all of them
            grey = {i: low for i, low, high in zip(group, *ranges, strict=True) if low == high}
            made |= {i: self.vae.encode_constant(value, *shape[1:])[0].float() for i, value in grey.items()}
            there = [place for place, i in enumerate(group) if i not in grey]
            # Elsewhere the autoencoder takes as many at once as it has memory for.
            for places in _cut(there, TOGETHER_ON_CPU if self.device.type == "cpu" else len(there)):
                filled = places + places[-1:] * (-len(places) % self.even)
                latents = self.vae.encode(stacked[filled])[: len(places)].float()
                made |= dict(zip([group[place] for place in places], latents, strict=True))
        return [made[index] for index in range(len(clips))]

    def _context(self, pixels: Pixels) -> Tensor:
        return encode_context(self.vae, pixels.condition(), self.device)[0].cpu()

    def _clip(self, pixels: Pixels) -> Tensor:
        assert pixels.real is not None
        return self.vae.encode(to_model(pixels.real)[None].to(self.device))[0].float().cpu()

    @torch.no_grad()
    def _once(self, kind: str, key: Any, compute: Callable[[], Tensor]) -> Tensor:
        with self._lock, torch.no_grad():
            kept = self._kept.setdefault(kind, OrderedDict())
            if key not in kept:
                kept[key] = compute()
                if len(kept) > self._keep:
                    kept.popitem(last=False)
            kept.move_to_end(key)
            return kept[key]


def _cut(values: list[int], length: int) -> list[list[int]]:
    return [values[first : first + length] for first in range(0, len(values), length)] if values else []


def _to_host(latents: Sequence[Tensor]) -> list[Tensor]:
    """``[C, F, h, w]`` each, of any number of frames, to the CPU in one copy."""
    return list(torch.cat(list(latents), dim=1).cpu().split([x.shape[1] for x in latents], dim=1)) if latents else []


def load_encoder(
    checkpoint: str | Path,
    device: torch.device,
    dtype: str | torch.dtype | None = None,
    vae_dtype: str | torch.dtype | None = None,
) -> Encoder:
    """Of a checkpoint folder, in the precisions that ``VdotPipeline`` would pick. ``CheckpointError`` as it raises."""
    precision = pick_dtype(dtype, device)
    vae_precision = precision if vae_dtype is None else pick_dtype(vae_dtype, device)
    text_encoder = load_text_encoder(checkpoint, precision, device)
    return Encoder(text_encoder, load_vae(checkpoint, vae_precision, device))


def weights_identity(checkpoint: str | Path) -> dict[str, str]:
    """Of T5 and VAE, those that are there: a hash of one row of every tensor, equal for equal weights in any layout."""
    layout = find_layout(checkpoint)
    return {part: _part_identity(read_headers(part, layout.parts[part])) for part in ENCODERS if part in layout.parts}


def _part_identity(weights: Weights) -> str:
    by_file: dict[Any, dict[str, str]] = {}
    for name, source in weights.tensors.items():
        by_file.setdefault(source.file, {})[source.name] = name
    rows: dict[str, bytes] = {}
    for file, names in by_file.items():
        # bfloat16, because the same weights are published in several precisions
        for stored, row in file.read_rows({name: Rows(0, 1, torch.bfloat16) for name in names}):
            rows[names[stored]] = row.reshape(-1).view(torch.uint8).numpy().tobytes()
    digest = blake2b(digest_size=16)
    for name in sorted(rows):
        digest.update(f"{name} {weights.shapes[name]}".encode() + rows[name])
    return digest.hexdigest()


def settings_of(checkpoint: str | Path, layout: Layout, encoder: Encoder, store: str, negative_prompt: str) -> Settings:
    """``ConfigError`` for a type that is not stored."""
    if store not in STORE:
        raise ConfigError(f"unknown store {store!r}: use {' or '.join(STORE)}")
    return Settings(
        version=VERSION,
        weights=weights_identity(checkpoint),
        layout=layout,
        dtype=str(encoder.text_encoder.dtype).removeprefix("torch."),
        vae_dtype=str(encoder.vae.dtype).removeprefix("torch."),
        store=store,
        text_len=encoder.text_encoder.text_len,
        negative_prompt=negative_prompt,
    )


# -- the whole table --------------------------------------------------------------------------------------------------


class Reader(Protocol):
    """Where the pixels of rows come from."""

    small: bool  # of many rows at once
    function: Callable[..., Pixels]  # makes them, in a process of its own

    def arguments(self, entry: Entry) -> tuple[Any, ...]:
        """What ``function`` is given."""
        ...

    def paired(self, entry: Entry) -> bool:
        """Whether there is a real clip."""
        ...

    def identify(self, entry: Entry) -> Iterator[str]:
        """All that decides the pixels; ``OSError`` when a file cannot be read."""
        ...


class FileReader:
    """A table's files. Those of one row are hundreds of megabytes of pixels: one row at a time."""

    small = False
    function = staticmethod(decode)

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def arguments(self, entry: Entry) -> tuple[Any, ...]:
        return entry.row, self.layout

    def paired(self, entry: Entry) -> bool:
        return entry.paired

    def identify(self, entry: Entry) -> Iterator[str]:
        row = entry.row
        for column, path in (("source", row.src_video), ("mask", row.src_mask), ("real", row.video)):
            yield f"{column} {_hash_file(path) if path else None} "
        for path in row.references:
            yield f"reference {_hash_file(path)} "


class WorldReader:
    """Clips of the procedural world, in place of files."""

    small = True
    function = staticmethod(draw_pixels)

    def __init__(self, config: WorldConfig) -> None:
        self.config = config

    def arguments(self, entry: Entry) -> tuple[Any, ...]:
        return self.config, entry.row.line, entry.row.task

    def paired(self, entry: Entry) -> bool:
        return True

    def identify(self, entry: Entry) -> Iterator[str]:
        c = self.config
        view = () if c.view == "far" else (c.view,)  # the keys of what was encoded before there were views stay
        yield repr((entry.row.line, entry.row.task, c.size, c.frames, c.seed, c.split, *view))


def open_rows(config: "EncodeConfig", defaults: Defaults, ranks: Ranks) -> tuple[Sequence[Entry], Layout, Reader]:
    """The table's rows, or the world's; ``ConfigError`` if both are named."""
    world = config.world
    if config.path is not None and world.clips:
        raise ConfigError("name what to encode once: a table (--table), or world.clips of the procedural world")
    if not world.clips:
        entries, layout = check_table(config, defaults, ranks)
        return entries, layout, FileReader(layout)
    layout = Layout(f"{world.size}*{world.size}", world.frames, "spread", None, world.frames)
    tasks, shapes = world_rows(world)
    rows = [Entry(Row(i, task, ""), shape) for i, (task, shape) in enumerate(zip(tasks, shapes, strict=True))]
    return rows, layout, WorldReader(world)


@dataclass
class EncodeConfig(TableConfig):
    """``training/encode.py``: a table once through text encoder and autoencoder."""

    world: WorldConfig = field(default_factory=WorldConfig)  # clips of the procedural world in place of a table
    ckpt_dir: str | None = None
    out: str | None = None
    store: str = "bfloat16"  # type of text and contexts on disk: bfloat16 or float32
    device: str | None = None
    dtype: str | None = None  # that the text encoder computes in; None: bfloat16, float32 on a CPU
    vae_dtype: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of a row: its key, or why it has none. ``seconds`` is 0 for a row that was there."""

    line: int
    task: str
    key: str | None
    seconds: float = 0.0
    error: str = ""


@dataclass
class Summary:
    """What came of a table."""

    outcomes: list[Outcome]
    nbytes: int  # of all rows on disk

    @property
    def bad(self) -> list[BadRow]:
        return [BadRow(o.line, o.error, "replace the file or leave the row out") for o in self.outcomes if not o.key]

    def lines(self) -> list[str]:
        """In words, with counts by task."""
        there = [outcome for outcome in self.outcomes if outcome.key is not None]
        new = [outcome.seconds for outcome in there if outcome.seconds]
        lines = [
            f"{len(there)} rows are encoded, {len(new)} of them now, in {self.nbytes / 2**30:.3g} GiB",
            *(f"  {task}: {count}" for task, count in sorted(Counter(o.task for o in there).items())),
        ]
        if new:
            each = sum(new) / len(new)
            hours = each * len(there) / 3600
            lines.append(f"{each:.2f} s a row: every pass of training over the table is {hours:.2g} hours shorter")
        return lines


def open_folder(folder: Path, settings: Settings, encoder: Encoder) -> None:
    """Make ``folder``, or go on with what is in it; damaged files go. Call on one rank.

    Raises:
        ConfigError: it holds rows made with other settings. OutputError: it cannot be written.
    """
    if (folder / META).exists():
        difference = Settings.read(folder).difference(settings)
        if difference is not None:
            raise ConfigError(f"{folder} was encoded with {difference}: give another folder, or the same settings")
        remove_leftovers(folder)
    for path in part_files(folder):
        try:
            read_shard(path)
        except InputError as error:
            log.warning("%s; it is deleted and its rows are encoded anew", one_line(error).split(":")[0])
            path.unlink()
    text = encoder.embed(settings.negative_prompt).to(STORE[settings.store])
    write_shard(folder / NEGATIVE, {"negative": {"text": text}})
    settings.write(folder)


class TableEncoder:
    """Encodes rows that are not in ``folder`` yet; each rank has one, and they share nothing but the folder."""

    def __init__(self, encoder: Encoder, folder: Path, settings: Settings, reader: Reader, workers: int = 2) -> None:
        self.encoder, self.folder, self.settings, self.reader = encoder, folder, settings, reader
        self.there = set(find_rows(folder))
        self.together = encoder.together if reader.small else 1
        self._ahead = max(1, workers)
        self._workers = Workers(reader.function, workers)
        self._threads = ThreadPoolExecutor(self._ahead, "vdot-encode")
        self._settings_text = json.dumps(settings.of_rows(), sort_keys=True)

    def __enter__(self) -> "TableEncoder":
        return self

    def __exit__(self, *_: Any) -> None:
        self._workers.close()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def encode(self, entries: Sequence[Entry]) -> list[Outcome]:
        """Encode and write what is missing of ``entries``. ``OutputError`` when the disk refuses."""
        keys = list(self._threads.map(self._key, entries))
        todo: dict[str, Entry] = {}
        for key, entry in zip(keys, entries, strict=True):
            if isinstance(key, str) and key not in self.there:
                todo.setdefault(key, entry)
        seconds: dict[str, float] = {}
        errors: dict[str, Exception] = {}
        shard = _Shard(self.folder)
        decoded = self._decoded(todo)
        while part := list(islice(decoded, self.together)):
            errors |= {key: pixels for key, _, pixels in part if isinstance(pixels, Exception)}
            rows = [(key, entry, pixels) for key, entry, pixels in part if not isinstance(pixels, Exception)]
            start = time.perf_counter()
            try:
                examples = self._examples([(entry, pixels) for _, entry, pixels in rows])
            except (InputError, OSError) as error:
                errors |= {key: error for key, _, _ in rows}
                continue
            each = (time.perf_counter() - start) / max(1, len(rows))
            for (key, _, _), example in zip(rows, examples, strict=True):
                shard.add(key, pack(example, STORE[self.settings.store]))
                seconds[key] = each
        shard.close()
        self.there.update(seconds)

        def outcome(key: str | Exception, entry: Entry) -> Outcome:
            if isinstance(key, str) and key not in errors:
                return Outcome(entry.row.line, entry.row.task, key, seconds.pop(key, 0.0))
            error = key if isinstance(key, Exception) else errors[key]
            return Outcome(entry.row.line, entry.row.task, None, error=one_line(error))

        return [outcome(key, entry) for key, entry in zip(keys, entries, strict=True)]

    def _examples(self, rows: list[tuple[Entry, Pixels]]) -> list[Example]:
        if not self.reader.small:
            return [self.encoder.encode(entry, pixels, 0) for entry, pixels in rows]
        return self.encoder.encode_many(rows) if rows else []

    def _key(self, entry: Entry) -> str | Exception:
        """Of a row's contents, or why they cannot be read."""
        digest = blake2b(self._settings_text.encode(), digest_size=16)
        digest.update(json.dumps(entry.row.prompt).encode())
        try:
            for part in self.reader.identify(entry):
                digest.update(part.encode())
        except OSError as error:
            return error
        return digest.hexdigest()

    def _decoded(self, todo: dict[str, Entry]) -> Iterator[tuple[str, Entry, Pixels | Exception]]:
        """Pixels of the rows in order, decoded a few ahead."""

        def read(entry: Entry) -> Pixels | Exception:
            try:
                return self._workers.call(*self.reader.arguments(entry))
            except (InputError, OSError) as error:
                return error

        waiting = deque(todo.items())
        begun: deque[tuple[str, Entry, Future[Pixels | Exception]]] = deque()
        while waiting or begun:
            while waiting and len(begun) <= self._ahead + 2 * self.together:
                key, entry = waiting.popleft()
                begun.append((key, entry, self._threads.submit(read, entry)))
            key, entry, future = begun.popleft()
            yield key, entry, future.result()


class _Shard:
    """Rows that wait to be written together."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: dict[str, dict[str, Tensor]] = {}
        self.nbytes = 0

    def add(self, key: str, stored: dict[str, Tensor]) -> None:
        self.rows[key] = stored
        self.nbytes += sum(tensor.nbytes for tensor in stored.values())
        if self.nbytes >= SHARD_BYTES:
            self.close()

    def close(self) -> None:
        if self.rows:
            name = blake2b("".join(self.rows).encode(), digest_size=8).hexdigest()
            write_shard(self.folder / f"part-{name}.safetensors", self.rows)
        self.rows, self.nbytes = {}, 0


def _hash_file(path: str) -> str:
    digest = blake2b(digest_size=16)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def encode_rows(
    entries: Sequence[Entry],
    encoder: Encoder,
    folder: Path,
    settings: Settings,
    reader: Reader,
    ranks: Ranks,
    workers: int = 2,
) -> Summary | None:
    """Encode ``entries`` into a folder that :func:`open_folder` made; ranks take chunks of the table as they get free.

    Each rank works for itself (``vdot.parallel.launch.arrange`` with 1 and 1). The first one gets the summary.
    """
    most = max(SHARD_ROWS, 8 * encoder.together) if reader.small else SHARD_ROWS
    # Small enough that the ranks end at about the same time.
    chunk = most if ranks.world == 1 else max(1, min(most, len(entries) // (4 * ranks.world)))
    chunks = [entries[i : i + chunk] for i in range(0, len(entries), chunk)]
    queue = Queue(ranks, len(chunks))
    # Chunks are handed out in order: the number of the last one is how far all ranks have come.
    with (
        TableEncoder(encoder, folder, settings, reader, workers) as table,
        _Progress(len(entries), ranks.rank == 0) as bar,
    ):
        for number in queue:
            bar.reach(number * chunk)
            outcomes = table.encode(chunks[number])
            if not any(outcome.seconds for outcome in outcomes):
                bar.skip((number + 1) * chunk)
            queue.report(number, [asdict(outcome) for outcome in outcomes])
        bar.reach(len(entries))
        results = queue.collect()
    if ranks.rank:
        return None
    nbytes = sum(path.stat().st_size for path in part_files(folder))
    return Summary([Outcome(**outcome) for result in results for outcome in result], nbytes)


class _Progress:
    """A bar on a terminal; elsewhere a line a minute."""

    def __init__(self, total: int, shown: bool) -> None:
        self.shown, self.total = shown, total
        self.bar = tqdm(total=total, desc="encode", unit="row", leave=False, disable=None if shown else True)
        self.start = self.said = time.monotonic()
        self.skipped = 0

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()

    def reach(self, done: int) -> None:
        self.bar.update(done - self.bar.n)
        now = time.monotonic()
        if self.shown and self.bar.disable and done > self.skipped and now - self.said >= 60:
            left = (now - self.start) / (done - self.skipped) * (self.total - done) / 60
            log.info("%d of %d rows, %.0f min left", done, self.total, left)
            self.said = now

    def skip(self, done: int) -> None:
        """The rows up to here were there: they say nothing about how long the others take."""
        self.start, self.skipped = time.monotonic(), done


def encode_table(config: EncodeConfig, device: torch.device, ranks: Ranks) -> Summary | None:
    """All of ``training/encode.py`` but the command line; every rank calls alike, the first gets the summary.

    Raises:
        ConfigError, InputError, CheckpointError, OutputError: one sentence each; what was encoded so far stays.
    """
    with ranks.agree():
        if config.ckpt_dir is None or config.out is None:
            raise ConfigError("give the checkpoint that encodes (ckpt_dir) and the folder to fill (out)")
        folder, info = Path(config.out), inspect_checkpoint(config.ckpt_dir)
        defaults = Defaults.from_dict(info.defaults or {}, f"{info.path}/defaults.json")
    entries, layout, reader = open_rows(config, defaults, ranks)
    with ranks.agree():
        encoder = load_encoder(info.path, device, config.dtype, config.vae_dtype)
        negative = defaults.negative_prompt if config.negative_prompt is None else config.negative_prompt
        settings = settings_of(info.path, layout, encoder, config.store, negative)
    with ranks.agree():
        if ranks.rank == 0:
            open_folder(folder, settings, encoder)
    arrange(ranks, device, 1, 1)
    summary = encode_rows(entries, encoder, folder, settings, reader, ranks, config.workers)
    if summary is not None:
        bad = summary.bad
        for line in explain(bad):
            log.error("%s", line)
        if bad and not config.skip_bad_rows:
            raise InputError(
                f"{len(bad)} of {len(entries)} rows could not be encoded (each is listed above), the rest is there: "
                "mend them and run again, or leave them out with skip_bad_rows"
            )
        write_index(folder, _records(entries, summary.outcomes, reader))
    return summary


def _records(entries: Sequence[Entry], outcomes: Sequence[Outcome], reader: Reader) -> list[Record]:
    """The rows that training reads, in the order of the table."""
    return [
        Record(outcome.key, entry.row.line, entry.row.task, entry.row.prompt, reader.paired(entry), entry.shape)
        for entry, outcome in zip(entries, outcomes, strict=True)
        if outcome.key is not None
    ]
