"""VdotPipeline: the one way from a request to a video. Command line, page and benchmark all call it."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vdot.checkpoints import CheckpointInfo, inspect_checkpoint, load_dit, load_text_encoder, load_vae
from vdot.chunks import Assembly, groups_of
from vdot.conditioning import Condition, encode_context
from vdot.errors import CheckpointError, ConfigError, InputError, MissingDependencyError, VdotError
from vdot.memory import GIB, OFFLOAD_MODES, MemoryPlan
from vdot.models.attention import attention_backend, set_attention_backend
from vdot.models.text_encoder import UMT5TextEncoder
from vdot.models.vace import VaceDiT
from vdot.models.vae import WanVAE
from vdot.offload import HOST, Placement, offload_mode
from vdot.parallel.shard import Fsdp, is_sharded
from vdot.parallel.state import Ranks
from vdot.parallel.ulysses import parallelize
from vdot.parallel.vae import SharedVAE
from vdot.request import Defaults, Media, Prepared, Request, prepare
from vdot.runtime import Stages, log, pick_device, pick_dtype, start_aside
from vdot.sampling import VACE_SCHEDULE, VDOT_SCHEDULE, FewStepSchedule, draw_noise, sample
from vdot.video import from_model, write_video

Progress = Callable[[int, int, Tensor], None]  # (step from 1, steps of all passes, latents [1, 16, F, H, W])
KEPT = 4  # prompts and conditions remembered, so that other seeds of the same request encode nothing


@dataclass
class VideoResult:
    """``frames`` uint8 ``[T, H, W, 3]``, ``latents [16, F, H, W]`` without references, and how they came about."""

    frames: np.ndarray
    fps: float
    latents: Tensor
    seed: int
    schedule: FewStepSchedule
    prepared: Prepared
    seconds: dict[str, float] = field(default_factory=dict)
    audio_from: str | None = None
    notes: tuple[str, ...] = ()

    def save(self, path: str | Path) -> None:
        """Write an mp4 (H.264, and the source's sound where the timing allows), atomically."""
        plan = self.prepared.plan
        if self.audio_from is not None and plan is not None:
            span = {"audio_start": plan.audio_start, "audio_end": plan.audio_end}
            write_video(path, self.frames, self.fps, audio_from=self.audio_from, **span)
        else:
            write_video(path, self.frames, self.fps)


class VdotPipeline:
    """Text, source video, mask and references, in any combination, to a video.

    Build one with :meth:`from_pretrained`; call it as often as needed, the networks stay loaded.
    """

    def __init__(
        self,
        dit: VaceDiT,
        text_encoder: UMT5TextEncoder | None,
        vae: WanVAE,
        schedule: FewStepSchedule | None = None,
        defaults: Defaults | None = None,
        device: str | torch.device | None = None,
        offload: str = "false",
        t5_cpu: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        self.dit, self.text_encoder, self.vae = dit.eval(), text_encoder, vae.eval()
        self.ranks = ranks or Ranks()
        self.schedule = schedule or FewStepSchedule()
        self.defaults = defaults or Defaults()
        self.device = device if isinstance(device, torch.device) else pick_device(device)
        self.placement = Placement(self.device, offload)
        self.text_placement = Placement(HOST, "false") if t5_cpu else self.placement
        self._prompts: OrderedDict[str, tuple[Tensor, int]] = OrderedDict()
        self._contexts: OrderedDict[bytes, Tensor] = OrderedDict()
        for module in (dit, vae):
            module.requires_grad_(False)
        self.placement.install(dit)
        if text_encoder is not None:
            self.text_placement.install(text_encoder.eval().requires_grad_(False))
        self.placement.install(vae, by_blocks=False)
        parallelize(dit, self.ranks.mesh)
        group = self.ranks.mesh.sequence
        self.shared_vae = SharedVAE(vae, group) if group.size > 1 else None

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        vae_dtype: str | torch.dtype | None = None,
        offload: str = "false",
        attention: str = "sdpa",
        compile: bool = False,
        t5_cpu: bool = False,
        t5_fsdp: bool = False,
        dit_fsdp: bool = False,
        ranks: Ranks | None = None,
    ) -> "VdotPipeline":
        """Load any published or exported checkpoint folder.

        Args:
            path: folder; its layout is recognised, see ``vdot.checkpoints``.
            device: default CUDA, MPS or CPU, whichever is there first.
            dtype: of the transformer and text encoder; default bfloat16 on an accelerator, float32 on a CPU.
            vae_dtype: of the autoencoder; default as ``dtype``.
            offload: "false" (all resident), "true" (one network at a time) or "block" (one block at a time).
            attention: backend name, see ``vdot.models.attention``.
            compile: compile the transformer's blocks; pays off from the second video on.
            t5_fsdp, dit_fsdp: split the network's weights over the ranks; alone, nothing.
            ranks: the processes that make each video together (``vdot.parallel.launch``); all call alike.

        Raises:
            CheckpointError, ConfigError, MissingDependencyError: one sentence each.
        """
        place = device if isinstance(device, torch.device) else pick_device(device)
        ranks = ranks or Ranks()
        with ranks.agree():
            info = inspect_checkpoint(path)
            precision = pick_dtype(dtype, place)
            start = place if offload_mode(offload) == "false" else HOST
            try:
                attention_backend(attention)  # before gigabytes are read
            except ImportError as error:
                raise MissingDependencyError(str(error)) from error
            except ValueError as error:
                raise ConfigError(str(error)) from error
            split = _sharder(ranks, offload) if dit_fsdp else None
            dit = load_dit(path, dtype=precision, device=place if split else start, sharder=split)
            set_attention_backend(dit, attention)
            if compile:
                for block in (*dit.blocks, *dit.vace_blocks):
                    block.compile()
            text_encoder = None
            if ranks.leads or t5_fsdp:  # one rank embeds the prompts for all, unless each holds a part
                split = _sharder(ranks, offload, on_host=t5_cpu) if t5_fsdp else None
                home = HOST if t5_cpu else place if split else start
                text_encoder = load_text_encoder(path, dtype=precision, device=home, sharder=split)
                _check_width(path, dit, text_encoder)
            vae_type = precision if vae_dtype is None else pick_dtype(vae_dtype, place)
            vae = load_vae(path, dtype=vae_type, device=start)
        schedule, defaults = checkpoint_schedule(info), checkpoint_defaults(info)
        return cls(dit, text_encoder, vae, schedule, defaults, place, offload, t5_cpu, ranks)

    # -- generating ----------------------------------------------------------------------------------------------

    def __call__(
        self,
        prompt: str,
        src_video: Media | None = None,
        src_mask: Media | None = None,
        src_ref_images: Sequence[Media] | Media | None = None,
        size: str | None = None,
        frame_num: int | None = None,
        steps: int | None = None,
        shift: float | None = None,
        solver: str | None = None,
        guide_scale: float | None = None,
        negative_prompt: str | None = None,
        context_scale: float = 1.0,
        keep_source: bool = True,
        seed: int = 2025,
        frame_mode: str = "spread",
        fps: float | None = None,
        feather: float = 8.0,
        chunk_frames: int | None = None,
        chunk_overlap: int | None = None,
        chunk_anchor: bool = True,
        on_step: Progress | None = None,
    ) -> VideoResult:
        """Generate one video.

        Args:
            prompt: what the video shows.
            src_video: clip to follow or edit: a file, or uint8 ``[T, H, W, 3]`` used as it is.
            src_mask: white generates, black keeps: video or image file, or ``[T, H, W]``; needs ``src_video``.
            src_ref_images: one or more pictures of what should appear: files, or uint8 ``[H, W, 3]``.
            size: "480p", "720p" or "W*H"; with a source file the area limit, its aspect is kept. Default: the
                checkpoint's own, 480p for the published ones.
            frame_num: frames to get, exactly. Default 81 for the published checkpoints; a source file gives its own.
                More than the checkpoint makes at a time are made in chunks, as is a longer source array.
            steps, shift, solver, guide_scale: override the checkpoint's schedule.
            negative_prompt: used when ``guide_scale`` is not 1.
            context_scale: strength of source, mask and references.
            keep_source: put the source's own pixels back where the mask keeps, feathered over ``feather`` pixels.
            seed: of the noise; the same on every device and number of ranks.
            frame_mode: how a source file is sampled: "spread", "trim", "resample" or "all" (see ``vdot.video``).
            fps: of the result; default real speed.
            chunk_frames, chunk_overlap: frames of one pass of a long clip, and those that it shares with the one
                before; both 4n + 1 (default: the checkpoint's own, and about a fifth of it).
            chunk_anchor: hold the colours of later chunks to the first one's.
            on_step: see :meth:`generate`.

        Raises:
            InputError, ConfigError: one sentence saying what does not fit, or that the result is not finite.
        """
        request = Request(
            prompt,
            negative_prompt,
            src_video,
            src_mask,
            src_ref_images,
            size,
            frame_num,
            frame_mode,
            fps,
            keep_source,
            feather,
            context_scale,
            seed,
            chunk_frames,
            chunk_overlap,
            chunk_anchor,
        )
        schedule = self.schedule.override(steps=steps, shift=shift, solver=solver, guide_scale=guide_scale)
        return self.generate(request, schedule, on_step=on_step)

    @torch.no_grad()
    def generate(
        self,
        request: Request,
        schedule: FewStepSchedule | None = None,
        prepared: Prepared | None = None,
        on_step: Progress | None = None,
    ) -> VideoResult:
        """As :meth:`__call__`, of a :class:`Request`; ``prepared`` if it was prepared before (to show its plan).

        ``on_step`` is called after each step with (step, steps, latents), counted over all passes of a long clip: there
        are ``steps = schedule.steps * len(prepared.chunks)`` and the last call has ``step == steps``; the latents are
        those of the pass at work. An exception that it raises ends the generation and comes out as it is; nothing is
        half-written, and the pipeline can be used again (with several ranks all of them must raise).

        With several ranks every one of them calls alike, and the first one's result has the frames.
        """
        schedule = schedule or self.schedule
        stages = Stages(self.device)
        if prepared is None:
            with stages("read inputs"):
                prepared = prepare(request, self.defaults)
        with stages("encode text"):
            prompts = [request.prompt]
            if schedule.guided:
                negative = request.negative_prompt
                prompts.append(self.defaults.negative_prompt if negative is None else negative)
            texts_ready = self._encode_prompts(prompts)
        frames, latents = self._passes(texts_ready, prepared, request, schedule, stages, on_step)
        audio, notes = self._audio(request, prepared)
        return VideoResult(
            frames,
            prepared.fps,
            latents,
            request.seed,
            schedule,
            prepared,
            stages.seconds,
            audio,
            (*prepared.notes, *notes),
        )

    def _passes(
        self,
        texts_ready: Callable[[], list[tuple[Tensor, int]]],
        prepared: Prepared,
        request: Request,
        schedule: FewStepSchedule,
        stages: Stages,
        on_step: Progress | None,
    ) -> tuple[np.ndarray, Tensor]:
        """Frames ``[T, H, W, 3]`` (on the first rank) and latents ``[16, F, H, W]``, of each chunk what is new."""
        chunks, texts, latents = prepared.chunks, None, []
        clip = _assembly(prepared, request)
        for number, chunk in enumerate(chunks):
            if len(chunks) > 1:
                last = min(chunk.stop, prepared.frame_num) - 1
                log.info("chunk %d of %d: frames %d to %d", number + 1, len(chunks), chunk.start, last)
            condition = clip.condition(chunk, self.ranks.share)
            with stages("encode condition"):
                context = self._encode_condition(condition)
                texts = texts or texts_ready()
            report = _counted(on_step, number, len(chunks), schedule.steps)
            with stages("sample"):
                seed = request.seed + number  # other noise: the same would draw the same texture again
                made = self._sample(texts, context, condition, seed, request.context_scale, schedule, report)
            if not made.isfinite().all():
                raise InputError(
                    "sampling ended in numbers that are not finite: use a guidance or context scale nearer to 1, "
                    "or another --dtype"
                )
            made = made[:, :, len(condition.references) :]
            with stages("decode"):
                decoded = self._decode(made)
            if self.ranks.leads:
                clip.add(chunk, decoded)
            latents.append(made[0, :, groups_of(chunk.known) + 1 if number else 0 :].float().cpu())
        return clip.frames, torch.cat(latents, dim=1)

    def _encode_prompts(self, prompts: list[str]) -> Callable[[], list[tuple[Tensor, int]]]:
        """Begin to embed what is not remembered; the function returned waits for it, and is called on every rank."""
        missing = [p for p in dict.fromkeys(prompts) if p not in self._prompts]
        aside = self.text_placement.device != self.device  # the host embeds while the device encodes the condition
        begun = start_aside(self._embed, missing, aside=aside) if missing else None

        def texts() -> list[tuple[Tensor, int]]:
            if begun is not None:
                embedded = begun()
                if self.ranks.control is not None and not self._embeds_everywhere:
                    embedded = self.ranks.share(embedded)
                self._prompts.update(
                    {p: (rows.to(self.device), length) for p, (rows, length) in zip(missing, embedded, strict=True)}
                )
            found = [self._prompts[p] for p in prompts]
            _forget_oldest(self._prompts)
            return found

        return texts

    @property
    def _embeds_everywhere(self) -> bool:
        """Whether the text encoder is split over the ranks: then all of them run it, and all get the result."""
        return self.text_encoder is not None and is_sharded(self.text_encoder)

    def _embed(self, prompts: list[str]) -> list[tuple[Tensor, int]]:
        """``[1, length, C]`` and length of each prompt, on the first rank or on all that hold a part of the encoder."""
        if self.text_encoder is None:
            return []
        with self.text_placement.use(self.text_encoder):
            embedded, lengths = self.text_encoder(prompts)
        rows = [(row[None, :length], length) for row, length in zip(embedded, lengths.tolist(), strict=True)]
        return rows if self.ranks.control is None else [(row.cpu(), length) for row, length in rows]

    def _encode_condition(self, condition: Condition) -> Tensor:
        key = _digest(condition)
        if key not in self._contexts:
            with self.placement.use(self.vae):
                together = None if self.shared_vae is None else self.shared_vae.encode_clips
                self._contexts[key] = encode_context(self.vae, condition, self.device, together)
        context = self._contexts[key]
        _forget_oldest(self._contexts)
        return context

    def _sample(
        self,
        texts: list[tuple[Tensor, int]],
        context: Tensor,
        condition: Condition,
        seed: int,
        context_scale: float,
        schedule: FewStepSchedule,
        report: Callable[[int, Tensor], None] | None,
    ) -> Tensor:
        noise, generator = draw_noise(condition.latent_shape, seed)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            told = [self.dit(x, t, text, context, context_scale, lengths=[length]).float() for text, length in texts]
            if not schedule.guided:
                return told[0]
            wanted, unwanted = told
            return unwanted + schedule.guide_scale * (wanted - unwanted)

        with self.placement.use(self.dit):
            return sample(velocity, noise[None].to(self.device), schedule, generator, report)

    def _decode(self, latents: Tensor) -> np.ndarray:
        """``[1, 16, F, h, w]`` -> uint8 ``[T, H, W, 3]``, converted as it is decoded: no float video is ever held."""
        with self.placement.use(self.vae):
            if self.shared_vae is None:
                return np.concatenate([from_model(piece[0].cpu()) for piece in self.vae.decode_stream(latents)])
            video = self.shared_vae.decode(latents, _to_bytes)
        if video is None:  # the first rank has it
            return np.empty((0, 8 * latents.shape[-2], 8 * latents.shape[-1], 3), np.uint8)
        return video[0].permute(1, 2, 3, 0).cpu().numpy()

    @staticmethod
    def _audio(request: Request, prepared: Prepared) -> tuple[str | None, tuple[str, ...]]:
        """The file whose sound goes with the result, and a sentence when it cannot."""
        if prepared.plan is None or isinstance(request.src_video, np.ndarray) or request.src_video is None:
            return None, ()
        if not prepared.has_audio:
            return None, ()
        if not prepared.plan.keeps_timing:
            return None, ("the sound of the source is left out: the result does not play at its speed",)
        return str(request.src_video), ("the sound of the source is carried over",)


def _sharder(ranks: Ranks, offload: str, on_host: bool = False) -> Fsdp | None:
    """Splits weights over the ranks that make a video together; None for one alone."""
    mesh = ranks.mesh.host_mesh if on_host else ranks.mesh.device_mesh
    return None if mesh is None or ranks.mesh.sequence.size == 1 else Fsdp(mesh, offload_mode(offload) != "false")


def _check_width(path: str | Path, dit: VaceDiT, text_encoder: UMT5TextEncoder) -> None:
    if text_encoder.dim != dit.config.text_dim:
        want, got = dit.config.text_dim, text_encoder.dim
        raise CheckpointError(f"{path}: the transformer takes text of width {want}, its text encoder makes {got}")


def _assembly(prepared: Prepared, request: Request) -> Assembly:
    return Assembly(
        prepared.condition,
        prepared.chunks,
        prepared.frame_num,
        prepared.source,
        None if len(prepared.chunks) == 1 else prepared.mask,
        request.feather if request.keep_source else None,
        prepared.chunk_anchor,
    )


def _counted(on_step: Progress | None, before: int, passes: int, steps: int) -> Callable[[int, Tensor], None] | None:
    """``on_step`` for one pass, its steps counted on from those of the passes ``before``."""
    if on_step is None:
        return None

    def report(step: int, x: Tensor) -> None:
        on_step(before * steps + step, passes * steps, x)

    return report


def _to_bytes(piece: Tensor) -> Tensor:
    """Pixels in [-1, 1] to uint8, as :func:`vdot.video.from_model` does, where they are."""
    return ((piece.nan_to_num(nan=-1.0) + 1) * 127.5).round().to(torch.uint8)


def _forget_oldest(cache: OrderedDict[Any, Any]) -> None:
    while len(cache) > KEPT:
        cache.popitem(last=False)


def _digest(condition: Condition) -> bytes:
    """What makes two conditions the same."""
    digest = hashlib.blake2b(repr((condition.frames, condition.height, condition.width)).encode())
    for tensor in (condition.source, condition.mask, *condition.references):
        digest.update(b"none" if tensor is None else np.ascontiguousarray(tensor.numpy()).tobytes())
        digest.update(b"|")
    return digest.digest()


def checkpoint_schedule(info: CheckpointInfo) -> FewStepSchedule:
    """The schedule that travels with a checkpoint; published folders carry none, so their layout tells."""
    if info.schedule is not None:
        return FewStepSchedule.from_dict(info.schedule, f"{info.path}/schedule.json")
    return VDOT_SCHEDULE if info.layout == "vdot" else VACE_SCHEDULE


def checkpoint_defaults(info: CheckpointInfo) -> Defaults:
    return Defaults() if info.defaults is None else Defaults.from_dict(info.defaults, f"{info.path}/defaults.json")


def explain_out_of_memory(plan: MemoryPlan) -> VdotError:
    """One sentence for a device that ran out of memory, with the counted peak of each mode."""
    modes = ", ".join(f"{mode} {plan.peak(mode) / GIB:.1f} GiB" for mode in OFFLOAD_MODES)
    return InputError(
        "the device ran out of memory: use a smaller --size, --frame_num or --chunk_frames, or another --offload_model "
        f"(counted peaks: {modes})"
    )
