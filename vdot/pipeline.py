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
from vdot.conditioning import Condition, encode_context, keep_source
from vdot.errors import CheckpointError, ConfigError, InputError, MissingDependencyError, VdotError
from vdot.memory import GIB, OFFLOAD_MODES, MemoryPlan
from vdot.models.attention import attention_backend, set_attention_backend
from vdot.models.text_encoder import UMT5TextEncoder
from vdot.models.vace import VaceDiT
from vdot.models.vae import WanVAE
from vdot.offload import HOST, Placement, offload_mode
from vdot.request import Defaults, Media, Prepared, Request, prepare
from vdot.runtime import Stages, pick_device, pick_dtype
from vdot.sampling import VACE_SCHEDULE, VDOT_SCHEDULE, FewStepSchedule, draw_noise, sample
from vdot.video import from_model, write_video

Progress = Callable[[int, int, Tensor], None]  # (step from 1, steps, latents [1, 16, F, H, W])
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
        text_encoder: UMT5TextEncoder,
        vae: WanVAE,
        schedule: FewStepSchedule | None = None,
        defaults: Defaults | None = None,
        device: str | torch.device | None = None,
        offload: str = "false",
        t5_cpu: bool = False,
    ) -> None:
        self.dit, self.text_encoder, self.vae = dit.eval(), text_encoder.eval(), vae.eval()
        self.schedule = schedule or FewStepSchedule()
        self.defaults = defaults or Defaults()
        self.device = device if isinstance(device, torch.device) else pick_device(device)
        self.placement = Placement(self.device, offload)
        self.text_placement = Placement(HOST, "false") if t5_cpu else self.placement
        self._prompts: OrderedDict[str, tuple[Tensor, int]] = OrderedDict()
        self._contexts: OrderedDict[bytes, Tensor] = OrderedDict()
        for module in (dit, text_encoder, vae):
            module.requires_grad_(False)
        self.placement.install(dit)
        self.text_placement.install(text_encoder)
        self.placement.install(vae, by_blocks=False)

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

        Raises:
            CheckpointError, ConfigError, MissingDependencyError: one sentence each.
        """
        place = device if isinstance(device, torch.device) else pick_device(device)
        info = inspect_checkpoint(path)
        precision = pick_dtype(dtype, place)
        start = place if offload_mode(offload) == "false" else HOST
        try:
            attention_backend(attention)  # before gigabytes are read
        except ImportError as error:
            raise MissingDependencyError(str(error)) from error
        except ValueError as error:
            raise ConfigError(str(error)) from error
        dit = load_dit(path, dtype=precision, device=start)
        set_attention_backend(dit, attention)
        if compile:
            for block in (*dit.blocks, *dit.vace_blocks):
                block.compile()
        text_encoder = load_text_encoder(path, dtype=precision, device=HOST if t5_cpu else start)
        if text_encoder.dim != dit.config.text_dim:
            want, got = dit.config.text_dim, text_encoder.dim
            raise CheckpointError(f"{path}: the transformer takes text of width {want}, its text encoder makes {got}")
        vae = load_vae(path, dtype=precision if vae_dtype is None else pick_dtype(vae_dtype, place), device=start)
        return cls(dit, text_encoder, vae, checkpoint_schedule(info), checkpoint_defaults(info), place, offload, t5_cpu)

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
            steps, shift, solver, guide_scale: override the checkpoint's schedule.
            negative_prompt: used when ``guide_scale`` is not 1.
            context_scale: strength of source, mask and references.
            keep_source: put the source's own pixels back where the mask keeps, feathered over ``feather`` pixels.
            seed: of the noise; the same on every device and number of ranks.
            frame_mode: how a source file is sampled: "spread", "trim" or "resample" (see ``vdot.video``).
            fps: of the result; default real speed.
            on_step: called after each step with (step, steps, latents).

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
        """As :meth:`__call__`, of a :class:`Request`; ``prepared`` if it was prepared before (to show its plan)."""
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
            texts = self._encode_prompts(prompts)
        with stages("encode condition"):
            context = self._encode_condition(prepared.condition)
        with stages("sample"):
            latents = self._sample(texts, context, prepared.condition, request, schedule, on_step)
        if not latents.isfinite().all():
            raise InputError(
                "sampling ended in numbers that are not finite: use a guidance or context scale nearer to 1, "
                "or another --dtype"
            )
        latents = latents[:, :, len(prepared.condition.references) :]
        with stages("decode"):
            frames = self._decode(latents)[: prepared.frame_num]
        frames = self._composite(frames, prepared, request)
        audio, notes = self._audio(request, prepared)
        return VideoResult(
            frames,
            prepared.fps,
            latents[0].float().cpu(),
            request.seed,
            schedule,
            prepared,
            stages.seconds,
            audio,
            (*prepared.notes, *notes),
        )

    def _encode_prompts(self, prompts: list[str]) -> list[tuple[Tensor, int]]:
        missing = [p for p in dict.fromkeys(prompts) if p not in self._prompts]
        if missing:
            with self.text_placement.use(self.text_encoder):
                embedded, lengths = self.text_encoder(missing)
            for prompt, rows, length in zip(missing, embedded, lengths.tolist(), strict=True):
                self._prompts[prompt] = (rows[None].to(self.device), length)
        texts = [self._prompts[p] for p in prompts]
        _forget_oldest(self._prompts)
        return texts

    def _encode_condition(self, condition: Condition) -> Tensor:
        key = _digest(condition)
        if key not in self._contexts:
            with self.placement.use(self.vae):
                self._contexts[key] = encode_context(self.vae, condition, self.device)
        context = self._contexts[key]
        _forget_oldest(self._contexts)
        return context

    def _sample(
        self,
        texts: list[tuple[Tensor, int]],
        context: Tensor,
        condition: Condition,
        request: Request,
        schedule: FewStepSchedule,
        on_step: Progress | None,
    ) -> Tensor:
        noise, generator = draw_noise(condition.latent_shape, request.seed)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            told = [
                self.dit(x, t, text, context, request.context_scale, lengths=[length]).float() for text, length in texts
            ]
            if not schedule.guided:
                return told[0]
            wanted, unwanted = told
            return unwanted + schedule.guide_scale * (wanted - unwanted)

        def report(step: int, x: Tensor) -> None:
            if on_step is not None:
                on_step(step, schedule.steps, x)

        with self.placement.use(self.dit):
            return sample(velocity, noise[None].to(self.device), schedule, generator, report)

    def _decode(self, latents: Tensor) -> np.ndarray:
        """``[1, 16, F, h, w]`` -> uint8 ``[T, H, W, 3]``, converted as it is decoded: no float video is ever held."""
        with self.placement.use(self.vae):
            return np.concatenate([from_model(piece[0].cpu()) for piece in self.vae.decode_stream(latents)])

    @staticmethod
    def _composite(frames: np.ndarray, prepared: Prepared, request: Request) -> np.ndarray:
        mask = prepared.condition.mask
        if mask is None or prepared.source is None or not request.keep_source:
            return frames
        count = prepared.frame_num
        return keep_source(frames, prepared.source[:count], mask[:count].numpy(), request.feather)

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
        "the device ran out of memory: use a smaller --size or --frame_num, or another --offload_model "
        f"(counted peaks: {modes})"
    )
