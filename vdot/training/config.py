"""A training run as YAML sees it."""

from dataclasses import dataclass, field

from vdot.data.manifest import DataConfig
from vdot.data.pictures import Stage
from vdot.data.world import WorldConfig
from vdot.distillation.config import DistillConfig, NoiseConfig
from vdot.errors import ConfigError

OBJECTIVES = ("distill", "flow", "vae", "text")


@dataclass
class OptimizerConfig:
    """AdamW. With the first beta 0, as the release has it, no first moment is kept."""

    kind: str = "adamw"  # or muon: for small networks that are whole on every rank
    lr: float = 2e-6
    betas: list[float] = field(default_factory=lambda: [0.0, 0.999])
    weight_decay: float = 0.01
    eps: float = 1e-8
    clip: float = 10.0  # largest norm of a gradient
    warmup: int = 0  # steps
    decay: str = "constant"  # constant | cosine, to 0 at the last step

    def __post_init__(self) -> None:
        if self.kind not in ("adamw", "muon"):
            raise ConfigError(f"an optimizer is adamw or muon, got {self.kind!r}")


@dataclass
class LoraConfig:
    """Adapters in place of whole networks: one frozen base is teacher, and carries generator and fake score."""

    rank: int = 0  # 0: train whole networks
    alpha: float | None = None  # None: the rank, so that the adapter acts with its own size
    targets: list[str] = field(default_factory=lambda: ["q", "k", "v", "o", "ffn.0", "ffn.2"])


@dataclass
class ParallelConfig:
    """How the work lies on the machines. Ranks are data-parallel groups of ulysses x ring ranks."""

    ulysses_size: int = 1  # ranks that share the heads of one video
    ring_size: int = 1  # ranks that share its tokens inside attention
    shard: bool = True  # split weights, gradients and optimizer states over all ranks (FSDP2)
    replicas: int = 1  # copies of the shards, usually one per machine (HSDP)
    offload: bool = False  # keep shards and optimizer states in host memory
    compute: str = "bfloat16"  # type of the matrix products; master weights and reductions are float32
    autocast: bool = False  # half precision by autocast over whole float32 weights, not by FSDP: quicker when small
    tf32: bool = False  # with compute float32: products in TensorFloat-32 where the GPU has it
    recompute: str = "full"  # of activations in the backward pass: none | selective (attention is kept) | full
    compile: bool = False  # torch.compile of the blocks; of the autoencoder's norms
    sync_each: bool = False  # reduce gradients after each micro batch: less memory, more communication


@dataclass
class FlowConfig:
    """Plain flow matching on real clips: how a teacher is trained or adapted."""

    noise: NoiseConfig = field(default_factory=lambda: NoiseConfig(5.0, [0.0, 1.0], [0.0, 1.0]))
    drop_text: float = 0.1  # share of samples that see the negative prompt, for guidance later
    # Share of samples whose source and mask are taken away: words and references alone have to tell, of every clip.
    drop_source: float = 0.0

    def __post_init__(self) -> None:
        for name in ("drop_text", "drop_source"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"flow.{name} is a share, from 0 to 1, got {getattr(self, name)}")


@dataclass
class VaeConfig:
    """The autoencoder, trained on clips of the procedural world (``world.size``, ``frames``, ``tasks``, ``seed``)."""

    # An existing autoencoder (ckpt_dir) keeps its own widths.
    base_dim: int = 16  # channels at full resolution
    dim_mult: list[int] = field(default_factory=lambda: [1, 2, 4, 4])  # times base_dim, at 1, 1/2, 1/4, 1/8 of the size
    stages: list[Stage] = field(default_factory=lambda: [Stage()])  # from small and many steps to what it is for
    freeze_encoder: bool = False  # latents stay what they are, for networks that know them: only the decoder learns
    conditions: float = 0.4  # share of clips that are not real: controls, masked sources, references on white
    squares: float = 0.0  # weight of squared errors beside absolute ones: small things count more, wide grounds less
    edges: float = 1.0  # weight of differences between neighbouring pixels beside that of the pixels
    motion: float = 0.5  # weight of differences between frames
    kl: float = 1e-4  # weight of the posterior's divergence, nats per latent value
    evaluate_every: int = 100  # steps; 0: never
    evaluate_clips: int = 12  # held out, of each kind
    statistics_clips: int = 256  # whose latents an export makes standard
    text_encoder: str | None = None  # checkpoint whose text encoder goes into the export as well

    def __post_init__(self) -> None:
        if len(self.dim_mult) != 4 or min(self.dim_mult) < 1:
            raise ConfigError(f"vae.dim_mult must be four whole numbers of at least 1, got {self.dim_mult}")


@dataclass
class TextConfig:
    """The small text encoder, trained on captions of the procedural world (from scene ``world.seed`` on)."""

    tokenizer_captions: int = 5000  # that the tokenizer learns from
    evaluate_every: int = 200  # steps; 0: never
    evaluate_captions: int = 1000  # held out


@dataclass
class ScheduleNote:
    """How a teacher trained here wants to be sampled; a distilled generator has its own schedule."""

    steps: int = 50
    shift: float = 5.0
    solver: str = "unipc"
    guide_scale: float = 5.0


@dataclass
class TrainConfig:
    """One run. ``None`` means: what the checkpoint says."""

    objective: str = (
        "distill"  # distill: VDOT | flow: flow matching on real clips | vae: the autoencoder | text: its text encoder
    )
    ckpt_dir: str | None = None  # the teacher; also where generator and fake score begin
    generator_init: str | None = None  # another checkpoint for the generator, e.g. of an earlier stage
    output_dir: str | None = None  # None: results/train/<name of the YAML>
    seed: int = 0
    steps: int = 1200
    batch_size: int = 1  # samples of one forward, over all ranks together; a multiple of the data-parallel groups
    accumulation: int = 1  # batches per update
    device: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    world: WorldConfig = field(default_factory=WorldConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    vae: VaeConfig = field(default_factory=VaeConfig)
    text: TextConfig = field(default_factory=TextConfig)
    schedule: ScheduleNote = field(default_factory=ScheduleNote)
    generator: OptimizerConfig = field(default_factory=OptimizerConfig)
    critic: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=4e-7))  # fake score and discriminator
    ema_decay: float = 0.99  # of the generator's weights; 0: none
    ema_start: int = 200  # updates of the generator before it begins
    lora: LoraConfig = field(default_factory=LoraConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    save_every: int = 100
    keep: int = 2  # checkpoints
    sample_every: int = 100  # 0: no sample grids
    sample_tasks: int = 8  # tasks in a grid, at most
    max_bad_steps: int = 10  # non-finite steps in a row before training stops
    export_every: int = 0  # 0: at the end only
    export_layouts: list[str] = field(
        default_factory=lambda: ["native"]
    )  # native, vdot (vdot_14b.pt), diffusers; none: no export
    export_dtype: str = "bfloat16"
    wandb: str = "disabled"  # disabled | offline | online
    wandb_project: str = "vdot"

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("objective", self.objective, OBJECTIVES),
            ("parallel.compute", self.parallel.compute, ("float32", "bfloat16")),
            ("parallel.recompute", self.parallel.recompute, ("none", "selective", "full")),
            ("wandb", self.wandb, ("disabled", "offline", "online")),
        ):
            if value not in choices:
                raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        for name in ("steps", "batch_size", "accumulation", "save_every", "keep", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        unknown = set(self.export_layouts) - {"native", "vdot", "diffusers"}
        if unknown:
            raise ConfigError(f"export_layouts knows native, vdot and diffusers, not {', '.join(sorted(unknown))}")
