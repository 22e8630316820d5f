"""The method as YAML sees it; the defaults are the release's settings, with the decisions that this project takes."""

from dataclasses import dataclass, field

from vdot.distillation.losses import BALANCES, DMD_NORMALIZERS
from vdot.errors import ConfigError
from vdot.sampling import FewStepSchedule
from vdot.transport import OTConfig


@dataclass
class ScheduleConfig:
    """The generator's own sampler: what training rolls out, and what the export says. See FewStepSchedule."""

    steps: int = 4
    shift: float = 8.0
    solver: str = "renoise"
    noise_levels: list[float] | None = None

    def build(self) -> FewStepSchedule:
        levels = None if self.noise_levels is None else tuple(self.noise_levels)
        return FewStepSchedule(self.steps, self.shift, self.solver, noise_levels=levels)


@dataclass
class NoiseConfig:
    """At which noise level samples are judged: uniform in ``raw``, warped by ``shift``, clamped to ``clamp``."""

    shift: float = 5.0
    raw: list[float] = field(default_factory=lambda: [0.02, 0.98])
    clamp: list[float] = field(default_factory=lambda: [0.02, 0.98])


@dataclass
class DmdConfig:
    """Distribution matching."""

    weight: float = 0.2
    guidance: float = 3.0  # of the teacher
    normalizer: str = "time"  # time | mean_abs | none, see losses.dmd_gradient


@dataclass
class GanConfig:
    """The discriminator. Its weight on the critic's side acts on F's features as well."""

    weight: float = 0.1  # of the generator
    critic_weight: float = 0.1
    relativistic: bool = True
    noise: NoiseConfig = field(default_factory=lambda: NoiseConfig(12.0, [0.0, 1.0]))
    r1: float = 0.0  # finite-difference smoothness on real clips
    r2: float = 0.0  # and on generated ones
    perturbation: float = 0.01  # standard deviation of that difference
    taps: list[int] | None = None  # blocks whose output is judged; None: the preset's of this size
    inner: int | None = None  # width of the heads; None: the preset's
    num_heads: int | None = None
    ffn_dim: int | None = None
    time: bool = True  # whether the heads see the time embedding


@dataclass
class DistillConfig:
    """Who learns from whom, how often and how much."""

    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)  # of the scores and of the critic's denoising
    dmd: DmdConfig = field(default_factory=DmdConfig)
    ot_weight: float = 0.8
    ot_scale: float = 0.1  # norm of a frame's OT gradient with balance: release
    ot: OTConfig = field(default_factory=OTConfig)
    gan: GanConfig = field(default_factory=GanConfig)
    balance: str = "rms"  # rms: each term's gradient has unit size before its weight | release: its raw reductions
    draws: str = "shared"  # shared: one noise and one evaluation for DMD and OT | separate: two, as the release
    generator_every: int = 5  # steps of the critic per step of the generator
    # DMD and OT in every second step of the generator, GAN in the others, the discriminator in every second step of
    # the critic; false: everything in each.
    alternate: bool = True
    # Keep the graph of one forward at a time: one forward more in adversarial steps, half the activations.
    one_graph: bool = False

    def __post_init__(self) -> None:
        _one_of("dmd.normalizer", self.dmd.normalizer, DMD_NORMALIZERS)
        _one_of("balance", self.balance, BALANCES)
        _one_of("draws", self.draws, ("shared", "separate"))
        if self.generator_every < 1:
            raise ConfigError(f"generator_every must be at least 1, got {self.generator_every}")
        for name, noise in (("noise", self.noise), ("gan.noise", self.gan.noise)):
            for key, span in (("raw", noise.raw), ("clamp", noise.clamp)):
                if len(span) != 2 or not 0 <= span[0] <= span[1] <= 1:
                    raise ConfigError(f"{name}.{key} must be two noise levels, low and high, in [0, 1], got {span}")

    def weights(self) -> dict[str, float]:
        return {"dmd": self.dmd.weight, "ot": self.ot_weight, "gan": self.gan.weight}


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
