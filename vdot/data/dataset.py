"""The order in which examples are drawn, and their supply: ahead of the training step, whatever files do meanwhile.

Which rows make up batch ``n`` depends on the seed and on ``n`` alone, so that a run resumes at any step without a
state, and any number of ranks and workers sees the same batches, bit for bit.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from hashlib import blake2b
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vdot.checkpoints import inspect_checkpoint
from vdot.checkpoints.layouts import PART_NAMES
from vdot.data.batch import Batch, Example, Shape, collate
from vdot.data.decoding import FatalRowError, Workers, decode
from vdot.data.encoding import Encoder, load_encoder, weights_identity
from vdot.data.manifest import DataConfig, Entry, Layout, check_table
from vdot.data.shards import NEGATIVE, Settings, find_rows, read_index, read_row, read_shard, unpack
from vdot.errors import ConfigError, InputError, one_line
from vdot.parallel.state import Ranks
from vdot.request import Defaults, parse_size
from vdot.runtime import log


class Kinds(Protocol):
    """All that is known of examples before loading one: its shape, its task, and whether it has a real clip."""

    @property
    def shapes(self) -> Sequence[Shape]: ...

    @property
    def tasks(self) -> Sequence[str]: ...

    @property
    def paired(self) -> Sequence[bool]:
        """Whether ``load`` gives a ``real``: batches either have it or not, so this decides what goes together."""
        ...


class Source(Kinds, Protocol):
    """Examples by index."""

    @property
    def identity(self) -> str:
        """Equal for sources that give the same examples in the same order."""
        ...

    def __len__(self) -> int: ...

    def load(self, index: int) -> Example:
        """Called from several threads. ``InputError`` or ``OSError`` when the row's files are at fault."""
        ...

    def negative(self) -> Tensor:
        """The negative prompt's rows ``[L, C]``."""
        ...

    def close(self) -> None: ...


class EncodedSource:
    """Rows that ``training/encode.py`` made; each is compared with its checksum when it is read."""

    def __init__(self, folder: str | Path, keep: int = 0) -> None:
        """Reads the index and the headers of all files; the first ``keep`` rows read stay in memory.

        ``InputError`` when a file is missing or damaged.
        """
        self.folder, self.keep = Path(folder), keep
        self._kept: dict[int, dict[str, Tensor]] = {}
        self.settings = Settings.read(self.folder)
        self.records = read_index(self.folder)
        self._places = find_rows(self.folder)
        missing = sum(record.key not in self._places for record in self.records)
        if missing or not self.records:
            raise InputError(
                f"{self.folder} lacks {missing} of its {len(self.records)} rows: run training/encode.py again, it "
                "makes those that are missing"
            )
        self.shapes = [record.shape for record in self.records]
        self.tasks = [record.task for record in self.records]
        self.paired = [record.paired for record in self.records]
        self.identity = _identity((record.key, record.task) for record in self.records)

    def __len__(self) -> int:
        return len(self.records)

    def load(self, index: int) -> Example:
        """Text as stored; context and real latents in float32."""
        record = self.records[index]
        stored = self._kept.get(index)
        if stored is None:
            stored = read_row(record.key, self._places[record.key])
            if len(self._kept) < self.keep:
                self._kept[index] = stored
        references = record.shape.references
        context, real = unpack(stored, references)
        return Example(stored["text"], context, real, references, record.task, record.prompt, index)

    def negative(self) -> Tensor:
        (key, place), *_ = read_shard(self.folder / NEGATIVE).items()
        return read_row(key, place)["text"]

    def close(self) -> None:
        """Nothing is open."""


class JointSource:
    """The rows of two sources, one after the other; both were encoded by the same networks."""

    def __init__(self, clips: Source, stills: Source) -> None:
        self.parts = (clips, stills)
        self.shapes = [*clips.shapes, *stills.shapes]
        self.tasks = [*clips.tasks, *stills.tasks]
        self.paired = [*clips.paired, *stills.paired]
        self.identity = _identity(part.identity for part in self.parts)

    def __len__(self) -> int:
        return len(self.tasks)

    def load(self, index: int) -> Example:
        clips, stills = self.parts
        return clips.load(index) if index < len(clips) else replace(stills.load(index - len(clips)), row=index)

    def negative(self) -> Tensor:
        return self.parts[0].negative()

    def close(self) -> None:
        for part in self.parts:
            part.close()


class LiveSource:
    """Rows of a checked table, decoded in ``workers`` processes and encoded where they are asked for."""

    def __init__(
        self, entries: Sequence[Entry], layout: Layout, encoder: Encoder, negative_prompt: str, workers: int = 2
    ) -> None:
        self.entries, self.layout, self.encoder = list(entries), layout, encoder
        self.shapes = [entry.shape for entry in self.entries]
        self.tasks = [entry.row.task for entry in self.entries]
        self.paired = [entry.paired for entry in self.entries]
        self.identity = _identity((entry.row, layout) for entry in self.entries)
        self.workers = Workers(decode, workers)
        self._negative = negative_prompt

    def __len__(self) -> int:
        return len(self.entries)

    def load(self, index: int) -> Example:
        entry = self.entries[index]
        return self.encoder.encode(entry, self.workers.call(entry.row, self.layout), index)

    def negative(self) -> Tensor:
        return self.encoder.embed(self._negative)

    def close(self) -> None:
        """End the processes."""
        self.workers.close()


def _identity(parts: Iterable[Any]) -> str:
    digest = blake2b(digest_size=16)
    for part in parts:
        digest.update(repr(part).encode(errors="surrogateescape"))
    return digest.hexdigest()


def open_source(
    config: DataConfig,
    checkpoint: str | Path,
    device: torch.device,
    dtype: str | torch.dtype | None = None,
    vae_dtype: str | torch.dtype | None = None,
    ranks: Ranks | None = None,
) -> Source:
    """The encoded folder of ``config``, or else its table with the networks of ``checkpoint``; all ranks call alike.

    Raises:
        ConfigError: neither is given, or the folder was made with other settings or weights.
        InputError, CheckpointError: one sentence each.
    """
    ranks = ranks or Ranks()
    if config.encoded is not None:
        with ranks.agree():
            return open_encoded(config, checkpoint, config.keep)
    with ranks.agree():
        notes = inspect_checkpoint(checkpoint).defaults
        defaults = Defaults.from_dict(notes or {}, f"{checkpoint}/defaults.json")
    entries, layout = check_table(config, defaults, ranks)
    with ranks.agree():
        encoder = load_encoder(checkpoint, device, dtype, vae_dtype)
    negative = defaults.negative_prompt if config.negative_prompt is None else config.negative_prompt
    return LiveSource(entries, layout, encoder, negative, config.workers)


def open_encoded(config: DataConfig, checkpoint: str | Path, keep: int = 0) -> EncodedSource | JointSource:
    """``config.encoded``, with ``config.stills.encoded`` if there is one; of each, ``keep`` rows stay in memory.

    Raises:
        ConfigError: as ``check_settings``, or the two folders differ in more than the size of their clips.
        InputError: a file is missing or damaged.
    """
    assert config.encoded is not None
    clips = EncodedSource(config.encoded, keep)
    check_settings(clips, config, checkpoint)
    if config.stills.encoded is None:
        return clips
    stills = EncodedSource(config.stills.encoded, keep)
    check_settings(stills, DataConfig(encoded=config.stills.encoded), checkpoint)
    if stills.settings.negative_prompt != clips.settings.negative_prompt:
        raise ConfigError(
            f"{clips.folder} and {stills.folder} were encoded with different negative prompts, "
            f"{clips.settings.negative_prompt!r} and {stills.settings.negative_prompt!r}: encode one of them again"
        )
    return JointSource(clips, stills)


def check_settings(source: EncodedSource, config: DataConfig, checkpoint: str | Path) -> None:
    """``ConfigError`` when ``config`` asks for what the folder does not hold, or ``checkpoint`` encodes otherwise."""
    settings, usual = source.settings, DataConfig()
    have = {**asdict(settings.layout), "negative_prompt": settings.negative_prompt}
    for name, value in have.items():
        wanted = getattr(config, name, None)
        if name == "size" and wanted is not None:
            wanted = "{}*{}".format(*parse_size(wanted))
        if wanted is not None and wanted != getattr(usual, name) and wanted != value:
            raise ConfigError(
                f"{source.folder} was encoded with {name} {value}, {wanted} is asked for: leave {name} out of the "
                "data's settings, or encode the table again into another folder"
            )
    for part, identity in weights_identity(checkpoint).items():
        if identity != settings.weights.get(part):
            raise ConfigError(
                f"{source.folder} was encoded with another {PART_NAMES[part]} than that of {checkpoint}: encode the "
                "table again with this checkpoint, into another folder"
            )


class Sampler:
    """Which rows make up which batch.

    A batch's rows share one shape, and have a real clip or have none. First such a group is drawn, by the summed
    weights of its rows over the size of its batches, then each row of the batch inside it by weight, so that every
    sample of the run is a row with the probability of its weight. A task's weight is shared by its rows alike.
    """

    def __init__(
        self,
        shapes: Sequence[Shape],
        tasks: Sequence[str],
        weights: Mapping[str, float] | None = None,
        batch_size: int = 1,
        seed: int = 0,
        paired: Sequence[bool] | None = None,
        *,
        pixels: int = 0,
        multiple: int = 1,
    ) -> None:
        """``weights`` are relative and by task, 1 for a task that is not named; 0 leaves a task out.

        ``pixels``: in place of ``batch_size`` samples a batch has as many as have this many latent pixels, references
        counted, rounded down to a multiple of ``multiple``, and at least that.

        Raises:
            ConfigError: a weight of a task that is not there, negative or not finite, or nothing left to draw.
        """
        if batch_size < 1:
            raise ConfigError(f"the batch size must be at least 1, got {batch_size}")
        if not tasks:
            raise InputError("there are no rows to train on")
        self.seed, self.tasks = seed, list(tasks)
        self.weights = _row_weights(tasks, weights or {})
        kinds = list(zip(shapes, paired or [True] * len(tasks), strict=True))
        members: dict[tuple[Shape, bool], list[int]] = {}
        for row, kind in enumerate(kinds):
            if self.weights[row] > 0:
                members.setdefault(kind, []).append(row)
        self.groups = [np.array(rows) for rows in members.values()]
        self._sizes = [batch_size] * len(self.groups)
        if pixels:
            self._sizes = [max(1, pixels // latent_pixels(shape) // multiple) * multiple for shape, _ in members]
        self._group_of = {row: number for number, rows in enumerate(self.groups) for row in rows.tolist()}
        each = zip(self.groups, self._sizes, strict=True)
        self._group_chances = np.cumsum([self.weights[rows].sum() / size for rows, size in each])
        self._row_chances = [np.cumsum(self.weights[rows]) for rows in self.groups]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of samples that a batch can have, in ascending order."""
        return tuple(sorted(set(self._sizes)))

    @property
    def mean_size(self) -> float:
        """Samples of a batch, over a long run."""
        return float(self.weights.sum() / self._group_chances[-1])

    def draw(self, number: int) -> list[int]:
        """Rows of global batch ``number``, with replacement."""
        rng = np.random.default_rng((self.seed, number))
        group = _pick(self._group_chances, rng.random())
        rows, chances, size = self.groups[group], self._row_chances[group], self._sizes[group]
        return [int(rows[_pick(chances, rng.random())]) for _ in range(size)]

    def substitutes(self, number: int, place: int, row: int) -> Iterator[int]:
        """Every other row of the group of ``row``, which sample ``place`` of batch ``number`` drew, its task first."""
        group = self.groups[self._group_of[row]]
        order = np.random.default_rng((self.seed, number, place)).permutation(group).tolist()
        for same_task in (True, False):
            yield from (
                other for other in order if other != row and (self.tasks[other] == self.tasks[row]) == same_task
            )


class JointSampler:
    """Of a ``JointSource``: a batch is one of stills with the probability ``share``, else one of clips."""

    def __init__(self, clips: Sampler, stills: Sampler, share: float, seed: int = 0) -> None:
        self.parts, self.share, self.seed, self.first = (clips, stills), share, seed, len(clips.tasks)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of samples that a batch can have, in ascending order."""
        return tuple(sorted({size for part in self.parts for size in part.sizes}))

    def draw(self, number: int) -> list[int]:
        """Rows of global batch ``number``; those of stills are counted on from the clips'."""
        clips, stills = self.parts
        if np.random.default_rng((self.seed, number, _WHICH)).random() >= self.share:
            return clips.draw(number)
        return [self.first + row for row in stills.draw(number)]

    def substitutes(self, number: int, place: int, row: int) -> Iterator[int]:
        """As a ``Sampler``'s: a clip takes the place of a clip."""
        clips, stills = self.parts
        if row < self.first:
            return clips.substitutes(number, place, row)
        return (self.first + other for other in stills.substitutes(number, place, row - self.first))


_WHICH = 2**31  # keys the draws between clips and stills; the places in a batch, which key substitutes, are smaller


def make_sampler(
    source: Source, config: DataConfig, batch_size: int, seed: int, multiple: int = 1
) -> Sampler | JointSampler:
    """Batches of ``source`` by the weights of ``config``; those of stills, if any, are multiples of ``multiple``."""
    clips, *more = source.parts if isinstance(source, JointSource) else (source,)
    first = Sampler(clips.shapes, clips.tasks, config.task_weights, batch_size, seed, clips.paired)
    if not more:
        return first
    second = stills_sampler(clips.shapes, more[0], config, batch_size, seed, multiple)
    return JointSampler(first, second, config.stills.share, seed)


def stills_sampler(
    clips: Sequence[Shape], stills: "Kinds", config: DataConfig, batch_size: int, seed: int = 0, multiple: int = 1
) -> Sampler:
    """Batches with the latent pixels of ``batch_size`` of the smallest of ``clips``."""
    pixels = batch_size * min(map(latent_pixels, clips))
    kinds = (stills.shapes, stills.tasks, config.stills.task_weights)
    return Sampler(*kinds, seed=seed, paired=stills.paired, pixels=pixels, multiple=multiple)


def latent_pixels(shape: Shape) -> int:
    """Of one example, references among them."""
    return math.prod(shape.latent[1:])


def _pick(cumulated: np.ndarray, chance: float) -> int:
    """Index drawn by cumulated weights, from ``chance`` in [0, 1)."""
    return min(int(np.searchsorted(cumulated, chance * cumulated[-1], side="right")), len(cumulated) - 1)


def _row_weights(tasks: Sequence[str], weights: Mapping[str, float]) -> np.ndarray:
    names, counts = np.unique(np.array(tasks), return_counts=True)
    for name, weight in weights.items():
        if name not in names:
            raise ConfigError(f"task_weights names the task {name!r}, which has no rows: tasks are {', '.join(names)}")
        if not math.isfinite(weight) or weight < 0:
            raise ConfigError(f"the weight of the task {name!r} must be a number from 0 up, got {weight}")
    each = {name: weights.get(name, 1.0) / count for name, count in zip(names.tolist(), counts, strict=True)}
    rows = np.array([each[task] for task in tasks])
    if not rows.any():
        raise ConfigError("task_weights are 0 for every task: nothing is left to train on")
    return rows


class Feeder:
    """Iterator of this rank's part of each global batch, loaded ahead in threads, a batch in each.

    Rank ``dp_rank`` of ``dp_size`` gets consecutive samples of every global batch. A row whose file cannot be read is
    reported once and replaced, from then on, by another one of its group; ``failures`` counts such rows. What is no
    fault of a file is raised. ``close`` (or leaving the ``with`` block) ends the threads, not the source.
    """

    def __init__(
        self,
        source: Source,
        sampler: Sampler | JointSampler,
        dp_rank: int = 0,
        dp_size: int = 1,
        workers: int = 2,
        start: int = 0,
        prefetch: int = 2,
    ) -> None:
        """``start``: number of the first batch; ``prefetch``: batches loaded ahead; no ``workers``: none, on demand.

        Raises:
            ConfigError: ranks that do not divide the batch, or numbers out of range.
        """
        odd = next((size for size in sampler.sizes if size % dp_size), None)
        if odd is not None or not 0 <= dp_rank < dp_size:
            raise ConfigError(
                f"a global batch of {odd or sampler.sizes[0]} cannot be shared by {dp_size} data-parallel ranks: "
                f"use a multiple of {dp_size}"
            )
        if workers < 0 or prefetch < 1:
            raise ConfigError(f"workers must be at least 0 and prefetch at least 1, got {workers} and {prefetch}")
        self.source, self.sampler, self.number = source, sampler, start
        self._rank, self._ranks, self._most = dp_rank, dp_size, sampler.sizes[-1]
        self._bad: dict[int, str] = {}  # row -> why it cannot be read
        self._lock = Lock()
        # One OpenMP thread each: with a second team beside the training's there are more threads than cores; libgomp
        # then puts waiting ones to sleep at once, and waking them was a third of a small model's step on two cores.
        self._pool = ThreadPoolExecutor(workers, "vdot-feeder", torch.set_num_threads, (1,)) if workers else None
        self._ahead: deque[Future[Batch]] = deque()
        self._prefetch = prefetch

    @property
    def failures(self) -> int:
        """Rows that could not be read so far."""
        return len(self._bad)

    def __enter__(self) -> "Feeder":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __iter__(self) -> "Feeder":
        return self

    def __next__(self) -> Batch:
        """Never ends. ``InputError`` when no row of a group can be read any more; other errors as they are."""
        if self._pool is None:
            batch = self._batch(self.number)
        else:
            while len(self._ahead) <= self._prefetch:
                self._ahead.append(self._pool.submit(self._batch, self.number + len(self._ahead)))
            batch = self._ahead.popleft().result()
        self.number += 1
        return batch

    def close(self) -> None:
        """Drop what was loaded ahead and wait for the threads to end. Also after an error, and twice."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._ahead.clear()

    def _batch(self, number: int) -> Batch:
        """This rank's samples of global batch ``number``."""
        rows, first = self.sampler.draw(number), number * self._most
        share = len(rows) // self._ranks
        places = range(self._rank * share, (self._rank + 1) * share)
        examples = [self._load(number, place, rows[place]) for place in places]
        return collate(examples, [first + place for place in places])

    def _load(self, number: int, place: int, drawn: int) -> Example:
        """The drawn row or, if its file is at fault, the first substitute that loads."""
        if drawn not in self._bad:
            example = self._try(drawn)
            if example is not None:
                return example
        for row in self.sampler.substitutes(number, place, drawn):
            if row not in self._bad:
                example = self._try(row)
                if example is not None:
                    return example
        shape = self.source.shapes[drawn]
        raise InputError(f"no row of the shape {shape} can be read any more; the first failed with: {self._bad[drawn]}")

    def _try(self, row: int) -> Example | None:
        error: Exception | None = None
        for _ in range(2):  # a network disk may have stumbled
            try:
                return self._checked(row)
            except (InputError, OSError) as caught:
                error = caught
                if isinstance(caught, FatalRowError):
                    break
        assert error is not None
        self._report(row, one_line(error))
        return None

    def _checked(self, row: int) -> Example:
        """Batches are made by what was known of a row before, so it must still be that."""
        example = self.source.load(row)
        if example.shape != self.source.shapes[row] or (example.real is not None) != self.source.paired[row]:
            raise InputError(f"it has become {example.shape}, which is not what it was when training began")
        return example

    def _report(self, row: int, reason: str) -> None:
        with self._lock:
            if row in self._bad:
                return
            self._bad[row] = reason
        log.warning(
            "row %d (%s) cannot be read: %s; another row of its shape takes its place from now on (%d so far)",
            row,
            self.source.tasks[row],
            reason,
            self.failures,
        )
