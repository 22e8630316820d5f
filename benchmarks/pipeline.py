"""Request to frames: our pipeline against diffusers' WanVACEPipeline with the same networks, in turn in one run.

    python benchmarks/pipeline.py              # tiny and a larger random model; a quarter of an hour on 2 cores
    python benchmarks/pipeline.py --quick      # tiny model, text only, a minute
    python benchmarks/pipeline.py --threads 1  # CPU time instead of wall clock: for a machine that others use too

A request has "all" of clip, mask and reference, a "video" alone, or only the "text". Same weights, noise and noise
levels; 4 UniPC steps, guidance 1, 512 text rows. Ours
forgets all it keeps between requests before each call, but for the "again" column: another seed of the same request.
Agreement is of uint8 frames. In float32 they differ where rounding falls on another side; in bfloat16 each is compared
with diffusers' float32 frames, as rounding is amplified by the four steps.
"""

import argparse
import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import (
    DTYPES,
    cast,
    clock,
    interleave,
    library_dit,
    medians,
    milliseconds,
    random_dit,
    randomise,
    ratio,
    table,
)
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanVACEPipeline
from PIL import Image
from transformers import UMT5Config, UMT5EncoderModel

from vdot import VdotPipeline
from vdot.models.presets import DitConfig
from vdot.models.text_encoder import UMT5TextEncoder
from vdot.models.vace import VaceDiT
from vdot.models.vae import WanVAE
from vdot.sampling import FewStepSchedule, draw_noise

CHECKPOINT = Path(__file__).parents[1] / "models" / "vdot-tiny"
SCHEDULE = FewStepSchedule(steps=4, shift=8.0, solver="unipc", guide_scale=1.0)
PROMPT = "A red ball rolls over a wooden table, past a blue cup, while the camera follows it slowly to the right."
STAGES = {  # what of each pipeline is one stage: dotted method names
    "ours": {
        "text": ["_encode_prompts"],
        "condition": ["_encode_condition"],
        "sample": ["_sample"],
        "decode": ["_decode"],
    },
    "diffusers": {
        "text": ["encode_prompt"],
        "condition": ["preprocess_conditions", "prepare_video_latents", "prepare_masks"],
        "sample": ["transformer.forward", "scheduler.step"],
        "decode": ["vae.decode", "video_processor.postprocess_video"],
    },
}
HEAD = ("model", "request", "dtype", "ours", "diffusers", "ratio", "again", "stages: ours / diffusers", "frames agree")


@dataclass(frozen=True)
class Request:
    """What is asked for, in our form; ``theirs`` translates."""

    name: str
    frames: int
    height: int
    width: int
    video: bool = False
    mask: bool = False
    reference: bool = False

    def arrays(self) -> dict[str, np.ndarray]:
        """A disc that moves over a gradient, a box to repaint, and a picture."""
        y, x = np.mgrid[: self.height, : self.width] / max(self.height, self.width)
        base = np.stack([x, y, 1 - x], axis=-1)
        clip, masks = [], []
        for t in range(self.frames):
            disc = ((x - 0.2 - 0.5 * t / self.frames) ** 2 + (y - 0.5) ** 2 < 0.02)[..., None]
            clip.append(np.where(disc, [1.0, 0.2, 0.1], base))
            masks.append((abs(x - 0.5) < 0.25) & (abs(y - 0.5) < 0.25))
        found = {"src_video": np.stack(clip), "src_mask": np.stack(masks), "src_ref_images": base[:, ::-1]}
        wanted = zip(found, (self.video, self.mask, self.reference), strict=True)
        return {name: (255 * found[name]).astype(np.uint8) for name, want in wanted if want}

    def latent_shape(self) -> tuple[int, int, int, int]:
        return 16, (self.frames - 1) // 4 + 1 + self.reference, self.height // 8, self.width // 8


@dataclass
class Networks:
    """The three networks; both pipelines hold the same tensors."""

    name: str
    dit: VaceDiT
    text: UMT5TextEncoder
    vae: WanVAE

    def to(self, dtype: torch.dtype) -> "Networks":
        dit = copy.deepcopy(self.dit)
        cast(dit, dtype, VaceDiT.FLOAT32_ISLANDS)
        return replace(self, dit=dit, text=copy.deepcopy(self.text).to(dtype), vae=copy.deepcopy(self.vae).to(dtype))


def tiny() -> Networks:
    pipe = VdotPipeline.from_pretrained(CHECKPOINT, device="cpu", dtype="float32")
    return Networks("vdot-tiny", pipe.dit, pipe.text_encoder, pipe.vae)


def larger() -> Networks:
    """Random, 60 M parameters: width 512, twice the tiny model's autoencoder."""
    tokenizer = tiny().text.tokenizer
    dit = random_dit(DitConfig(512, 2048, 8, 10, vace_layers=(0, 2, 4, 6, 8), text_dim=256))
    text = UMT5EncoderModel(
        UMT5Config(vocab_size=1024, d_model=256, d_kv=64, d_ff=512, num_layers=6, num_heads=4, tie_word_embeddings=True)
    )
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=32)
    randomise(vae)
    return Networks("random 512 wide", dit, UMT5TextEncoder(text, tokenizer), WanVAE(vae))


def our_call(networks: Networks, request: Request) -> tuple[VdotPipeline, Callable[..., np.ndarray]]:
    pipe = VdotPipeline(networks.dit, networks.text, networks.vae, SCHEDULE, device="cpu")
    arguments: dict[str, Any] = request.arrays()
    size = {} if request.video else {"size": f"{request.width}*{request.height}", "frame_num": request.frames}

    def call(again: bool = False) -> np.ndarray:
        if not again:
            pipe._prompts.clear()
            pipe._contexts.clear()
            pipe.vae._constants.clear()
        return pipe(PROMPT, **arguments, **size, keep_source=False, seed=0).frames

    return pipe, call


def library_vae(vae: WanVAE) -> AutoencoderKLWan:
    """The library's own autoencoder with the same weights: WanVAE swaps layer classes in the one it is given."""
    model = AutoencoderKLWan.from_config(vae.model.config).to(vae.dtype)
    model.load_state_dict(vae.model.state_dict())
    return model.eval().to(vae.device)


def their_call(networks: Networks, request: Request, dtype: torch.dtype) -> tuple[Any, Callable[..., np.ndarray]]:
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0)
    set_timesteps = scheduler.set_timesteps

    def same_levels(steps: int, device: Any = None) -> None:
        """The library's own levels differ from the original's, which we keep, by up to 2e-3."""
        set_timesteps(steps, device=device)
        scheduler.sigmas, scheduler.timesteps = SCHEDULE.sigmas(), SCHEDULE.timesteps()
        scheduler.set_begin_index(0)

    scheduler.set_timesteps = same_levels  # type: ignore[method-assign]
    pipe: Any = WanVACEPipeline(
        tokenizer=networks.text.tokenizer,
        text_encoder=networks.text.model,
        vae=library_vae(networks.vae),
        scheduler=scheduler,
        transformer=library_dit(networks.dit, dtype),
    )
    pipe.set_progress_bar_config(disable=True)
    names = {"src_video": "video", "src_mask": "mask", "src_ref_images": "reference_images"}
    media: dict[str, Any] = {}
    for name, array in request.arrays().items():
        media[names[name]] = [Image.fromarray(frame) for frame in (array if name != "src_ref_images" else array[None])]
    noise = draw_noise(request.latent_shape(), 0)[0][None]

    def call() -> np.ndarray:
        frames = pipe(
            prompt=PROMPT,
            height=request.height,
            width=request.width,
            num_frames=request.frames,
            num_inference_steps=4,
            guidance_scale=1.0,
            latents=noise,
            **media,
        ).frames[0]
        return (frames * 255).round().astype(np.uint8)

    return pipe, call


@contextmanager
def staged(owner: Any, stages: Mapping[str, list[str]]) -> Iterator[dict[str, float]]:
    """Seconds spent in the named methods of ``owner`` while the block runs."""
    spent = dict.fromkeys(stages, 0.0)
    undo: list[tuple[Any, str]] = []
    for stage, paths in stages.items():
        for path in paths:
            *parents, name = path.split(".")
            holder = owner
            for parent in parents:
                holder = getattr(holder, parent)
            undo.append((holder, name))
            object.__setattr__(holder, name, _timed(getattr(holder, name), spent, stage))
    try:
        yield spent
    finally:
        for holder, name in undo:
            object.__delattr__(holder, name)


def _timed(method: Callable[..., Any], spent: dict[str, float], stage: str) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        begin = clock()
        try:
            return method(*args, **kwargs)
        finally:
            spent[stage] += clock() - begin

    return timed


def agreement(ours: np.ndarray, theirs: np.ndarray, exact: np.ndarray, dtype: torch.dtype) -> str:
    """Stops the benchmark if the two do not make the same video."""

    def apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return abs(a.astype(np.int16) - b)

    if dtype == torch.float32:
        gap = apart(ours, theirs)
        if gap.max() > 3:
            raise SystemExit(f"frames differ by up to {gap.max()} of 255: not the same video, nothing to compare")
        return f"{(gap == 0).mean():.2%} equal, rest within {gap.max()}/255"
    return f"mean {apart(ours, exact).mean():.2f} / {apart(theirs, exact).mean():.2f} of 255 from float32"


def measure(networks: Networks, request: Request, dtype_name: str, seconds: float, compiled: bool) -> list[str]:
    """One row of the table."""
    dtype = DTYPES[dtype_name]
    exact = their_call(networks, request, torch.float32)[1]()
    networks = networks.to(dtype)
    our_pipe, ours = our_call(networks, request)
    their_pipe, theirs = their_call(networks, request, dtype)
    if compiled:
        torch._dynamo.reset()
        for block in (*our_pipe.dit.blocks, *our_pipe.dit.vace_blocks):
            block.compile(fullgraph=True)
        their_pipe.transformer.compile_repeated_blocks(fullgraph=True)
    agree = agreement(ours(), theirs(), exact, dtype)
    with staged(our_pipe, STAGES["ours"]) as our_stages:
        ours()
    with staged(their_pipe, STAGES["diffusers"]) as their_stages:
        theirs()
    taken = interleave({"ours": ours, "diffusers": theirs, "again": lambda: ours(again=True)}, seconds, rounds=(2, 20))
    median = medians(taken)
    stages = [f"{s} {milliseconds(our_stages[s])} / {milliseconds(their_stages[s])}" for s in our_stages]
    return [
        networks.name,
        f"{request.name}, {request.frames}x{request.height}x{request.width}",
        dtype_name + (", compiled" if compiled else ""),
        milliseconds(median["ours"]),
        milliseconds(median["diffusers"]),
        f"{ratio(taken['ours'], taken['diffusers']):.2f}",
        f"{ratio(taken['again'], taken['diffusers']):.2f}",
        "; ".join(stages),
        agree,
    ]


def requests(frames: int, height: int, width: int) -> list[Request]:
    every = Request("all", frames, height, width, True, True, True)
    return [
        every,
        replace(every, name="video", mask=False, reference=False),
        replace(every, name="text", video=False, mask=False, reference=False),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny model, text only, float32")
    parser.add_argument("--threads", type=int, help="of torch; with 1, CPU time is measured (default: all, wall clock)")
    parser.add_argument("--dtype", choices=DTYPES, help="only this one")
    parser.add_argument("--model", choices=("tiny", "larger"), help="only this one")
    parser.add_argument("--request", choices=("all", "video", "text"), help="only this one")
    parser.add_argument("--compile", action="store_true", help="compile the transformer blocks of both")
    parser.add_argument("--seconds", type=float, default=20.0, help="time to measure each row for (default 20)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.quick:
        args.model, args.dtype, args.seconds = "tiny", "float32", 2.0
        args.request = args.request or "text"
    models = {"tiny": (tiny, requests(17, 128, 128)), "larger": (larger, requests(17, 128, 128)[:1])}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)
    rows = []
    with torch.no_grad():
        for name in [args.model] if args.model else models:
            build, wanted = models[name]
            networks = build()
            for request in [r for r in wanted if args.request in (None, r.name)]:
                for dtype in [args.dtype] if args.dtype else DTYPES:
                    rows.append(measure(networks, request, dtype, args.seconds, args.compile))
                    print("  ".join(rows[-1]), flush=True)
    print("\n" + table(HEAD, rows))


if __name__ == "__main__":
    main()
