"""The command line of ``inference/vace_wan_inference.py``: parse, plan, generate, save."""

import argparse
import difflib
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from vdot.checkpoints import CheckpointInfo, inspect_checkpoint
from vdot.checkpoints.networks import network_configs
from vdot.chunks import heaviest
from vdot.conditioning import Condition
from vdot.config import GenerateConfig, load_config
from vdot.entry import enter
from vdot.errors import CheckpointError, ConfigError, one_line
from vdot.jobs import Job, Outcome, look_at_jobs, read_jobs, run_jobs, summary
from vdot.memory import MemoryPlan, is_out_of_memory, plan_generation
from vdot.models.attention import BACKENDS
from vdot.models.presets import PRESETS
from vdot.offload import offload_mode
from vdot.parallel.launch import Launch, arrange, own_device
from vdot.parallel.mesh import choose_sizes
from vdot.parallel.state import Ranks, end_together
from vdot.pipeline import VdotPipeline, VideoResult, checkpoint_defaults, checkpoint_schedule, explain_out_of_memory
from vdot.prompts import MODES, Extended, Writer, extend_prompt, find_writer
from vdot.record import check_overwrites, default_folder, fingerprint, settings_hash, writable, write_run
from vdot.request import Prepared, Request, prepare
from vdot.runtime import Stages, log, peak_memory, pick_device, pick_dtype, reset_peak, total_memory
from vdot.sampling import SOLVERS, FewStepSchedule

ROOT = Path(__file__).resolve().parents[1]

GROUPS: dict[str, dict[str, str]] = {
    "what to make": {
        "prompt": "what the video shows, in a sentence or a paragraph",
        "negative_prompt": "what to avoid; used only when the guidance scale is not 1",
        "src_video": "clip to follow or to edit",
        "src_mask": "video or image of the clip's size: white generates, black keeps",
        "src_ref_images": "pictures of what should appear: a.png,b.png",
        "size": '"480p", "720p" or "W*H"; with a clip the area limit, its aspect is kept (default: the checkpoint\'s)',
        "frame_num": "exact number of frames to get (default: the clip's, else the checkpoint's); more than the model "
        "makes at a time are made in chunks",
        "frame_mode": "how a clip is sampled: spread (over all of it, the original's way), trim (the first frames), "
        "resample (--fps or 16 frames of each second), all (every frame, in chunks where it is long)",
        "fps": "frame rate of the result (default: real speed)",
        "keep_source": "put the clip's own pixels back where the mask keeps; off: --no_keep_source",
        "feather": "pixels inside the mask over which the seam to the kept part is closed",
        "chunk_frames": "frames of one chunk of a long clip, 4n + 1 (default: what the checkpoint makes at a time)",
        "chunk_overlap": "frames that a chunk goes on from, the last ones of the chunk before, 4n + 1 (default: a "
        "fifth of a chunk)",
        "chunk_anchor": "hold the colours of later chunks to the first one's; off: --no_chunk_anchor",
        "use_prompt_extend": f"whether a language model writes the prompt out: {', '.join(MODES)}; plain is no, zh and "
        "en are languages, _ds is the hosted qwen-plus (its key in DASH_API_KEY)",
        "prompt_model": "folder of a transformers text-generation model, or the name of one at --prompt_url "
        "(else VDOT_PROMPT_MODEL)",
        "prompt_url": "base address of an OpenAI-compatible endpoint (else VDOT_PROMPT_URL), its key in "
        "VDOT_PROMPT_KEY",
        "prompt_timeout": "seconds to wait for one of three answers",
    },
    "how to sample (defaults travel with the checkpoint)": {
        "sample_steps": "network steps; 4 for VDOT, 50 for the VACE teachers",
        "sample_shift": "warp of the noise levels",
        "sample_solver": ", ".join(SOLVERS),
        "sample_guide_scale": "classifier-free guidance, a real number; 1 is off and costs half",
        "context_scale": "strength of clip, mask and references",
        "base_seed": "seed of the noise; -1 draws one and records it",
    },
    "model and machine": {
        "ckpt_dir": "checkpoint folder of any published layout (default: models/VDOT, else models/vdot-tiny)",
        "model_name": "checked against the checkpoint: vace-1.3B, vace-14B, vdot-14B, vdot-tiny",
        "device": "cuda, cuda:N, mps or cpu (default: the best there is)",
        "dtype": "float32, bfloat16 or float16 (default: bfloat16 on an accelerator, float32 on a CPU)",
        "vae_dtype": "the same for the autoencoder (default: as --dtype)",
        "attention": ", ".join(BACKENDS),
        "compile": "compile the transformer's blocks: slower first video, faster ones after",
        "offload_model": "false (all resident), true (one network at a time), block (one block at a time, 24 GB)",
        "t5_cpu": "run the text encoder on the CPU",
        "t5_fsdp": "split the text encoder's weights over the processes (no effect on one)",
        "dit_fsdp": "split the transformer's weights over the processes (no effect on one)",
        "ulysses_size": "processes that share the attention heads (default: chosen from those that torchrun started)",
        "ring_size": "processes that pass keys and values around; ulysses_size x ring_size processes make a video, and "
        "with --jobs several such groups work at once",
    },
    "where it goes": {
        "save_dir": "folder of the results (default: results/<model>/<time>)",
        "save_file": "the video itself, elsewhere",
        "jobs": "a .jsonl or .csv table of videos to make with one loaded model; resumable",
        "dry_run": "print the plan and the memory it takes, make nothing",
    },
}

EXAMPLES = """examples:
  a video from text
    %(prog)s --prompt "a red ball rolls over the grass"
  a subject from a picture
    %(prog)s --prompt "the toy drives through snow" --src_ref_images toy.png --size 832*480 --frame_num 81
  a clip edited where the mask is white, the rest kept to the pixel
    %(prog)s --prompt "a white cat on the sofa" --src_video clip.mp4 --src_mask mask.mp4
  the published VDOT-14B on one 24 GB card, planned first
    %(prog)s --ckpt_dir models/VDOT --offload_model block --prompt "..." --src_video depth.mp4 --dry_run

Any option can also be written key=value, or come from --config FILE (YAML, or the run.json of an earlier run, which
then repeats that run byte for byte)."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see --help)")


@dataclass(frozen=True)
class Form:
    """A command line: the options of ``schema`` in groups, and what ``--help`` says around them."""

    schema: type[GenerateConfig] = GenerateConfig
    groups: Mapping[str, Mapping[str, str]] = field(default_factory=lambda: GROUPS)
    description: str = "Make a video from text and any of a source clip, a mask and reference pictures."
    examples: str = EXAMPLES

    @property
    def types(self) -> dict[str, Any]:
        """Annotation of every option."""
        return {f.name: f.type for f in fields(self.schema)}


def build_parser(prog: str, form: Form) -> argparse.ArgumentParser:
    parser = Parser(
        prog=prog,
        description=form.description,
        epilog=form.examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any option below, the other way to write it")
    parser.add_argument("--config", metavar="FILE", help="YAML of options, or the run.json of an earlier run")
    types = form.types
    for title, options in form.groups.items():
        group = parser.add_argument_group(title)
        for name, text in options.items():
            group.add_argument(f"--{name}", metavar=_metavar(types[name]), help=text)
    for name in ("keep_source", "chunk_anchor"):
        parser.add_argument(f"--no_{name}", dest=name, action="store_const", const="false", help=argparse.SUPPRESS)
    return parser


def _name_values(argv: Sequence[str], types: Mapping[str, Any]) -> list[str]:
    """``--dry_run`` -> ``--dry_run=true``, but ``--offload_model block`` -> ``--offload_model=block``.

    The value of a switch is optional, and argparse would take the key=value after it for one.
    """
    switches = {f"--{name}" for name in types if types[name] is bool or name == "offload_model"}
    named: list[str] = []
    for token in argv:
        if named and named[-1] in switches:
            has_value = not token.startswith("-") and "=" not in token
            named[-1] += f"={token}" if has_value else "=true"
            if has_value:
                continue
        named.append(token)
    if named and named[-1] in switches:
        named[-1] += "=true"
    return named


def _metavar(annotation: Any) -> str:
    kinds = {"bool": "BOOL", "int": "N", "float": "X"}
    return next((letter for kind, letter in kinds.items() if kind in str(annotation)), "TEXT")


def parse(argv: Sequence[str], prog: str, form: Form | None = None) -> GenerateConfig:
    """Defaults, then ``--config``, then flags and ``key=value``. ``ConfigError`` for anything not understood."""
    form = form or Form()
    parser = build_parser(prog, form)
    args, unknown = parser.parse_known_intermixed_args(_name_values(argv, form.types))
    if unknown:
        known = [s for a in parser._actions for s in a.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1)
        raise ConfigError(f"unknown option {unknown[0]}; " + (f"did you mean {near[0]}?" if near else "see --help"))
    given = {k: v for k, v in vars(args).items() if v is not None and k not in ("overrides", "config")}
    return load_config(form.schema, args.config, args.overrides, given)


def find_checkpoint(ckpt_dir: str | None) -> tuple[Path, str]:
    """The folder to load and why it was chosen."""
    if ckpt_dir is not None:
        return Path(ckpt_dir), "as asked"
    for name in ("VDOT", "vdot-tiny"):
        for base in (Path(), ROOT):
            folder = base / "models" / name
            if folder.is_dir() and any(folder.iterdir()):
                why = "found" if name == "VDOT" else "the small model of this repository: no --ckpt_dir, no models/VDOT"
                return folder, why
    raise CheckpointError("no checkpoint: give --ckpt_dir FOLDER, or put one into models/VDOT")


MODEL_NAMES = {"vace-1.3B": "1.3B", "vace-14B": "14B", "vdot-14B": "14B", "vdot-tiny": "tiny"}


def check_model_name(name: str | None, info: CheckpointInfo) -> None:
    """The release loads 14B whatever the name says; here the name must fit."""
    if name is None:
        return
    if name not in MODEL_NAMES:
        raise ConfigError(f"unknown model_name {name!r}: use {', '.join(MODEL_NAMES)}, or leave it out")
    if info.dit is not None and info.dit != PRESETS[MODEL_NAMES[name]].dit:
        raise CheckpointError(f"{info.path} is not {name}: its transformer is {info.dit.dim} wide; drop --model_name")


def check_options(config: GenerateConfig) -> None:
    """What needs no checkpoint to be seen as wrong; what would need several processes is refused, never ignored."""
    offload_mode(config.offload_model)
    if config.attention not in BACKENDS:
        raise ConfigError(f"unknown attention {config.attention!r}: choose one of {', '.join(BACKENDS)}")
    writer_of(config)
    if config.save_file and config.jobs:
        raise ConfigError("save_file names one video, a jobs table makes several: use --save_dir")
    if config.save_file and Path(config.save_file).suffix.lower() != ".mp4":
        raise ConfigError(f"save_file {config.save_file!r} must end in .mp4, which is what is written")
    if config.save_file and Path(config.save_file).is_dir():
        raise ConfigError(f"save_file {config.save_file!r} is a folder: give the name of the video")


def writer_of(config: GenerateConfig, device: torch.device | str = "cpu") -> Writer | None:
    """The language model that extends prompts, if one is asked for."""
    several = config.jobs is not None
    model, url = config.prompt_model, config.prompt_url
    return find_writer(config.use_prompt_extend, model, url, config.prompt_timeout, device, keep=several)


def request_of(config: GenerateConfig) -> Request:
    return Request(
        prompt=config.prompt or "",
        negative_prompt=config.negative_prompt,
        src_video=config.src_video or None,  # scripts pass "" for "none"
        src_mask=config.src_mask or None,
        src_ref_images=config.src_ref_images,
        size=config.size or None,
        frame_num=config.frame_num,
        frame_mode=config.frame_mode,
        fps=config.fps,
        keep_source=config.keep_source,
        feather=config.feather,
        context_scale=config.context_scale,
        seed=config.base_seed if config.base_seed >= 0 else secrets.randbelow(2**31),
        chunk_frames=config.chunk_frames,
        chunk_overlap=config.chunk_overlap,
        chunk_anchor=config.chunk_anchor,
    )


def schedule_of(config: GenerateConfig, default: FewStepSchedule) -> FewStepSchedule:
    return default.override(
        steps=config.sample_steps,
        shift=config.sample_shift,
        solver=config.sample_solver,
        guide_scale=config.sample_guide_scale,
    )


@contextmanager
def step_bar(shown: bool = True) -> Iterator[Callable[..., None]]:
    """One progress bar for the steps, which appears with the first of them."""
    bars: list[tqdm] = []

    def on_step(step: int, steps: int, _: Any) -> None:
        if not bars:
            bars.append(
                tqdm(
                    total=steps,
                    desc="sample",
                    unit="step",
                    leave=False,
                    file=sys.stderr,
                    disable=None if shown else True,
                )
            )
        bars[0].update(step - bars[0].n)

    try:
        yield on_step
    finally:
        for bar in bars:
            bar.close()


def main(argv: Sequence[str] | None = None, prog: str = "vace_wan_inference.py") -> int:
    """Exit code: 0 done, 1 some jobs failed, 2 the request cannot be met (one sentence on stderr), 130 Ctrl-C."""
    return enter(partial(_run, sys.argv[1:] if argv is None else argv, prog))


def _run(argv: Sequence[str], prog: str, ranks: Ranks) -> int:
    with ranks.agree():
        config = parse(argv, prog)
    return make(config, ranks)


def make(config: GenerateConfig, ranks: Ranks) -> int:
    """What the options ask for: a video, a table of them, or the plan alone; the exit code."""
    with ranks.agree():
        check_options(config)
        path, why = find_checkpoint(config.ckpt_dir)
        log.info("checkpoint %s (%s)", path, why)
        info = inspect_checkpoint(path)
        check_model_name(config.model_name, info)
    session = open_session(config, path, info, ranks, many=config.jobs is not None)
    if config.jobs is not None:
        return session.run_table(config.jobs)
    with ranks.agree():
        prepared = session.prepare(config)
        plan = session.describe(config, prepared)
        if not config.dry_run:
            session.check_fit(plan)
    if not config.dry_run:
        session.make_one(config, prepared, plan)
    return 0


def open_session(config: GenerateConfig, path: Path, info: CheckpointInfo, ranks: Ranks, many: bool) -> "Session":
    """The processes laid out for one video or for ``many``; collective. Nothing is loaded yet."""
    with ranks.agree():
        device = own_device(pick_device(config.device), Launch.from_environment())
        sizes = _sizes(config, info, ranks.world, many)
    arrange(ranks, device, *sizes)
    if ranks.world > 1:
        log.info("%d processes: %s", ranks.world, ranks.mesh.describe())
    elif config.t5_fsdp or config.dit_fsdp:
        log.info("note  --t5_fsdp and --dit_fsdp have no effect on one process")
    return Session(config, path, info, device, ranks)


def _sizes(config: GenerateConfig, info: CheckpointInfo, world: int, many: bool) -> tuple[int, int]:
    """``(ulysses, ring)`` of this run."""
    # Several videos at once need a whole model per process, unless its weights are split.
    together = config.dit_fsdp and config.ulysses_size is None and config.ring_size is None
    heads = 40 if info.dit is None else info.dit.num_heads
    per_node = Launch.from_environment().local_world
    return choose_sizes(world, config.ulysses_size, config.ring_size, heads, per_node, many and not together)


class Session:
    """One loaded model and the requests made of it."""

    def __init__(
        self, config: GenerateConfig, path: Path, info: CheckpointInfo, device: torch.device, ranks: Ranks
    ) -> None:
        self.config, self.path, self.info = config, path, info
        self.device, self.ranks = device, ranks
        self.dtype = pick_dtype(config.dtype, self.device)
        self.vae_dtype = self.dtype if config.vae_dtype is None else pick_dtype(config.vae_dtype, self.device)
        self.files = [file for part in info.parts.values() for file in part.files]
        self.fingerprint = fingerprint(self.files)
        self.writer = writer_of(config, device)
        self._pipeline: VdotPipeline | None = None
        self._plans: dict[tuple, MemoryPlan] = {}

    @property
    def pipeline(self) -> VdotPipeline:
        """Loaded on first use: a bad request costs no loading, a finished batch neither."""
        if self._pipeline is None:
            c = self.config
            several: dict[str, Any] = {}
            if self.ranks.world > 1:
                several = {"t5_fsdp": c.t5_fsdp, "dit_fsdp": c.dit_fsdp, "ranks": self.ranks}
            with Stages(self.device)("load"):
                self._pipeline = VdotPipeline.from_pretrained(
                    self.path,
                    self.device,
                    self.dtype,
                    self.vae_dtype,
                    offload_mode(c.offload_model),
                    c.attention,
                    c.compile,
                    c.t5_cpu,
                    **several,
                )
        return self._pipeline

    def release(self) -> None:
        """Let go of the networks; they load again when needed."""
        self._pipeline = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def prepare(self, config: GenerateConfig) -> Prepared:
        return prepare(request_of(config), checkpoint_defaults(self.info))

    def schedule(self, config: GenerateConfig) -> FewStepSchedule:
        return schedule_of(config, checkpoint_schedule(self.info))

    def describe(self, config: GenerateConfig, prepared: Prepared) -> MemoryPlan:
        """Print what will be made and what it takes."""
        s = self.schedule(config)
        for line in prepared.lines():
            log.info("%s", line)
        if self.writer is not None:
            log.info("prompt  will be written out by %s (%s)", self.writer.name, config.use_prompt_extend)
        log.info(
            "steps %d, %s, shift %g, guidance %g: %d network evaluations",
            s.steps,
            s.solver,
            s.shift,
            s.guide_scale,
            s.evaluations * len(prepared.chunks),
        )
        plan = self._plan(heaviest(prepared.condition, prepared.chunks), s)
        if len(prepared.chunks) > 1:
            log.info("in each of the %d chunks:", len(prepared.chunks))
        together = self.ranks.mesh.sequence.size
        if together > 1:
            split = {"transformer": config.dit_fsdp, "text": config.t5_fsdp}
            plan = plan.shared(together, [network for network, on in split.items() if on])
            log.info("on each of %d processes:", together)
        for line in plan.describe(offload_mode(config.offload_model), self.device.type == "cpu"):
            log.info("%s", line)
        return plan

    def _plan(self, condition: Condition, schedule: FewStepSchedule) -> MemoryPlan:
        """Counted once per shape: a table asks for the same one many times."""
        parts = (condition.source is None, condition.mask is None)
        key = (*condition.latent_shape, len(condition.references), *parts, schedule.evaluations, schedule.guided)
        if key not in self._plans:
            dtypes = (self.dtype, self.dtype, self.vae_dtype)
            configs, kind = network_configs(self.path), self.device.type
            self._plans[key] = plan_generation(*configs, condition, schedule, dtypes, kind)
        return self._plans[key]

    def check_fit(self, plan: MemoryPlan) -> None:
        """``InputError`` for what this machine can never hold, rather than a killed process or a late failure."""
        mode, on_cpu = offload_mode(self.config.offload_model), self.device.type == "cpu"
        plan.check_fit(mode, total_memory(self.device), on_cpu)

    def make_one(self, config: GenerateConfig, prepared: Prepared, plan: MemoryPlan) -> None:
        """The video of the command line, where it says; the first process writes."""
        folder = default_folder(self.path) if config.save_dir is None else Path(config.save_dir)
        with ExitStack() as stack:
            with self.ranks.agree():
                if self.ranks.leads:
                    folder = stack.enter_context(writable(folder, fresh=config.save_dir is None))
                video = Path(config.save_file) if config.save_file else folder / "out_video.mp4"
                if self.ranks.leads:
                    stack.enter_context(writable(video.parent))
            self.generate(config, folder, video, prepared, plan)

    def generate(self, config: GenerateConfig, folder: Path, video: Path, prepared: Prepared, plan: MemoryPlan) -> None:
        """One video and its record."""
        with self.ranks.agree():
            check_overwrites(config, folder, video)
        extended = self._extend(config)
        request, schedule = self.ranks.share(request_of(config)), self.schedule(config)  # one seed for all
        if extended is not None:
            request = replace(request, prompt=extended.prompt)
        try:
            pipeline = self.pipeline
            reset_peak(self.device)
            with step_bar(shown=self.ranks.rank == 0) as on_step:
                result = pipeline.generate(request, schedule, prepared, on_step)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                self._out_of_step(error)
                raise
            known = explain_out_of_memory(plan)
            self._out_of_step(known)
            raise known from error
        with self.ranks.agree():
            if self.ranks.leads:
                self._write(result, config, folder, video, prepared, extended)

    def _extend(self, config: GenerateConfig) -> Extended | None:
        """The prompt written out, where that is asked for; one process asks for its group."""
        if self.writer is None:
            return None
        with self.ranks.agree():
            made = None
            if self.ranks.leads:
                with Stages(self.device)("extend prompt"):
                    made = extend_prompt(config.prompt or "", config.use_prompt_extend, self.writer)
                log.info("prompt  %s", made.prompt)
        return self.ranks.share(made)

    def _out_of_step(self, error: Exception) -> None:
        """A rank that broke off inside common work cannot go on with another video: the others wait for it."""
        if self.ranks.control is not None:
            code = getattr(error, "exit_code", 1)
            end_together(self.ranks, error, f"error: rank {self.ranks.rank}: {one_line(error)}", code)

    def _write(
        self,
        result: VideoResult,
        config: GenerateConfig,
        folder: Path,
        video: Path,
        prepared: Prepared,
        extended: Extended | None,
    ) -> None:
        checkpoint = {"path": str(self.path), "layout": self.info.layout, "fingerprint": self.fingerprint}
        resolved = {key: str(getattr(self, key)).removeprefix("torch.") for key in ("dtype", "vae_dtype")}
        machine = {"device": self.device.type, "peak_memory": peak_memory(self.device)}
        record = write_run(result, config, folder, checkpoint, video, resolved, extended, machine)
        for note in result.notes[len(prepared.notes) :]:
            log.info("note  %s", note)
        count = "1 frame" if len(result.frames) == 1 else f"{len(result.frames)} frames"
        log.info("%s: %s, %s, %.4g fps, seed %d", video, count, record["size"], result.fps, result.seed)

    def run_table(self, table: str) -> int:
        """All rows of a jobs file; 1 if any failed."""
        with self.ranks.agree():
            jobs = read_jobs(table, self.config)
        folder = Path(self.config.save_dir or default_folder(self.path).with_name(Path(table).stem))
        if self.config.dry_run:
            return self.describe_jobs(jobs) if self.ranks.rank == 0 else 0
        outcomes = self.run_jobs(jobs, folder)
        if self.ranks.rank:
            return 0
        for line in summary(outcomes):
            log.info("%s", line)
        return 1 if any(outcome.status == "failed" for outcome in outcomes) else 0

    def run_jobs(self, jobs: list[Job], folder: Path) -> list[Outcome]:
        """See :func:`vdot.jobs.run_jobs`."""

        def generate(config: GenerateConfig, video: Path) -> None:
            with self.ranks.agree():
                prepared = self.prepare(config)
                plan = self.describe(config, prepared)
                self.check_fit(plan)
            self.generate(config, Path(config.save_dir or folder), video, prepared, plan)

        with writable(folder) if self.ranks.leads else nullcontext():
            hashed = partial(settings_hash, checkpoint=self.fingerprint)
            return run_jobs(jobs, folder, generate, hashed, self.ranks)

    def describe_jobs(self, jobs: list[Job]) -> int:
        """See :func:`vdot.jobs.look_at_jobs`."""
        return look_at_jobs(jobs, lambda row: self.describe(row, self.prepare(row)))
