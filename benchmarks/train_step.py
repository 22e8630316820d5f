"""A training step against the release's order of work, with the same small networks in the same run.

    python benchmarks/train_step.py --threads 1       # ten minutes; CPU time, for a machine that others use too
    python benchmarks/train_step.py --quick           # small latents, a minute

"release" does what the public trainer does, in its order: prompts and clips go through text encoder and autoencoder in
every step; all 512 text rows are attended to; DMD and OT draw a noise each and evaluate both scores for it, with six
forwards; Sinkhorn is a loop over frames of sixty iterations with autograd through all of them; fake and real clips go
through the critic as one batch, gradients through both; all activations are computed again. "ours" is
vdot.distillation.steps on encoded rows. Same weights, latents, prompts, noise levels and float32. Four kinds of step:
generator with DMD and OT, generator with GAN, critic that denoises, critic that also judges (the release then leaves
out denoising: less work than ours).

Operations are those of matrix products and attention. Memory is the highest resident size of a process of its own while
it does one step, over what it held before (Linux; weights are not in it, gradients are).
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import psutil
import torch
from common import count_flops, interleave, medians, milliseconds, random_dit, randomise, ratio, table
from torch import Tensor

from vdot.checkpoints import load_text_encoder, load_vae
from vdot.conditioning import Condition, encode_context
from vdot.data.batch import Batch
from vdot.distillation import losses
from vdot.distillation.config import DistillConfig
from vdot.distillation.draws import Draws
from vdot.distillation.networks import Cast, Network
from vdot.distillation.rollout import rollout
from vdot.distillation.steps import critic_step, generator_step
from vdot.flow import add_noise, sigma_to_t, velocity_to_x0
from vdot.models.discriminator import Discriminator
from vdot.models.presets import DitConfig
from vdot.models.vace import VaceDiT
from vdot.training.recompute import recompute

CHECKPOINT = Path(__file__).parents[1] / "models" / "vdot-tiny"
PROMPT = "A red ball rolls over a wooden table, past a blue cup, while the camera follows it slowly to the right."
KINDS = ("generator, DMD and OT", "generator, GAN", "critic", "critic that judges")
DIT = DitConfig(dim=256, ffn_dim=1024, num_heads=4, num_layers=6, vace_layers=(0, 2, 4), text_dim=128)
CPU = torch.device("cpu")


class Bench:
    """Both ways over one set of networks. ``latent``: frames, rows and columns."""

    def __init__(self, latent: tuple[int, int, int], mode: str) -> None:
        self.config = DistillConfig()
        self.schedule = self.config.schedule.build()
        self.text, self.vae = load_text_encoder(CHECKPOINT), load_vae(CHECKPOINT)
        self.dits = [random_dit(DIT, seed=seed) for seed in range(3)]
        for dit, trained in zip(self.dits, (True, False, True), strict=True):
            dit.requires_grad_(trained).train()
            recompute(dit, mode)
        self.heads = Discriminator(DIT.dim, inner=128, num_heads=4, ffn_dim=512)
        randomise(self.heads)
        frames, rows, columns = latent
        generator = torch.Generator().manual_seed(0)
        clip = torch.rand(3, 4 * frames - 3, 8 * rows, 8 * columns, generator=generator) * 2 - 1
        mask = torch.zeros(clip.shape[1:])
        mask[..., : 4 * columns] = 1
        self.clip, self.condition = clip, Condition(clip.shape[1], clip.shape[2], clip.shape[3], clip, mask)
        self.batch, self.negative = self.encode()
        generator_net, real, fake = map(Network, self.dits)
        self.cast = Cast(generator_net, real, fake, self.negative, self.heads, (2, 4, 5))

    @torch.no_grad()
    def encode(self) -> tuple[Batch, Tensor]:
        """What the release does in every step, and ours once for all."""
        context = encode_context(self.vae, self.condition, CPU)
        real = self.vae.encode(self.clip[None])
        embedded, lengths = self.text([PROMPT, "blurred, static, overexposed"])
        n, m = (int(length) for length in lengths)
        batch = Batch(embedded[:1, :n], (n,), context, real, 0, ("bench",), (PROMPT,), (0,), (0,))
        return batch, embedded[1, :m]

    def draws(self, role: str) -> Draws:
        return Draws(0, 0, role, (0,), self.batch.shape.latent, CPU)

    def clear(self) -> None:
        for module in (*self.dits, self.heads):
            module.zero_grad(set_to_none=True)

    # --- ours

    def ours(self, kind: str) -> None:
        self.clear()
        if kind.startswith("generator"):
            terms = {"gan"} if "GAN" in kind else {"dmd", "ot"}
            generator_step(self.cast, self.batch, self.draws("g"), self.schedule, self.config, terms, _section)
        else:
            judge = "judges" in kind
            critic_step(self.cast, self.batch, self.draws("c"), self.schedule, self.config, judge, _section)

    # --- the release's order

    def release(self, kind: str) -> None:
        self.clear()
        batch, negative = self.encode()
        generator, real, fake = (self._padded(dit, batch.text, batch.context) for dit in self.dits)
        against = self._padded(self.dits[1], negative[None], batch.context)
        draws = self.draws(kind[0])
        exit_step = draws.choice("exit", self.schedule.steps)
        with torch.set_grad_enabled(kind.startswith("generator")):
            made = rollout(generator, draws.noise("start"), self.schedule, exit_step, draws.sequence("renoise"))
        x = made.x0
        if kind == "critic":
            sigma, noise = self._level(draws, "denoise"), draws.noise("denoise")
            losses.denoising_loss(fake(add_noise(x, noise, sigma), sigma_to_t(sigma)), noise, x).backward()
        elif "GAN" in kind or "judges" in kind:
            sigma, noise = self._level(draws, "gan", 12.0), draws.noise("gan")
            both = torch.cat([add_noise(x, noise, sigma), add_noise(batch.real, noise, sigma)])
            logits = self._logits(both, sigma_to_t(sigma).expand(2), batch)
            loss = losses.generator_gan_loss if "GAN" in kind else losses.discriminator_gan_loss
            loss(logits[:1], logits[1:]).backward()
        else:
            gradients = {}
            for name in ("dmd", "ot"):
                sigma, noise = self._level(draws, name), draws.noise(name)
                with torch.no_grad():
                    noisy, t = add_noise(x.detach(), noise, sigma), sigma_to_t(sigma)
                    fake_x0 = velocity_to_x0(noisy, fake(noisy, t), sigma)
                    real_x0 = velocity_to_x0(noisy, torch.lerp(against(noisy, t), real(noisy, t), 3.0), sigma)
                if name == "dmd":
                    gradients[name] = losses.dmd_gradient(fake_x0, real_x0, sigma)
                else:
                    gradients[name] = unrolled_sinkhorn(fake_x0, real_x0)
            total = losses.combine(gradients, self.config.weights(), "release", 0.1)
            x.backward(total)

    def _padded(self, dit: VaceDiT, text: Tensor, context: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """The network under a prompt of which all rows are attended to."""
        rows = torch.nn.functional.pad(text, (0, 0, 0, DIT.text_len - text.shape[1]))
        return lambda x, t: dit(x, t, rows.expand(len(x), -1, -1), context)

    def _logits(self, x: Tensor, t: Tensor, batch: Batch) -> Tensor:
        rows = torch.nn.functional.pad(batch.text, (0, 0, 0, DIT.text_len - batch.text.shape[1])).expand(2, -1, -1)
        _, features = self.dits[2](x, t, rows, batch.context, taps=self.cast.taps)
        return self.heads(*features)

    def _level(self, draws: Draws, purpose: str, shift: float = 5.0) -> Tensor:
        return draws.sigma(purpose, shift, (0.02, 0.98), (0.02, 0.98))


def unrolled_sinkhorn(fake: Tensor, real: Tensor, eps: float = 0.1, iterations: int = 60) -> Tensor:
    """Per frame: log-domain updates, and autograd back through all of them."""
    leaf = fake.detach().requires_grad_()
    x, y = (torch.nn.functional.avg_pool2d(z[0].transpose(0, 1), 2).flatten(2).transpose(1, 2) for z in (leaf, real))
    total = torch.zeros(())
    for a, b in zip(x, y, strict=True):  # [N, 16] each
        scaled = torch.cdist(a, b).square() / eps
        f, g = torch.zeros(len(a)), torch.zeros(len(b))
        log_a, log_b = -torch.tensor(float(len(a))).log(), -torch.tensor(float(len(b))).log()
        for _ in range(iterations):
            f = log_a - torch.logsumexp(g[None] - scaled, dim=1)
            g = log_b - torch.logsumexp(f[:, None] - scaled, dim=0)
        total = total + (torch.exp(f[:, None] + g[None] - scaled) * scaled * eps).sum()
    return torch.autograd.grad(total, leaf)[0]


def _section(name: str) -> nullcontext:
    return nullcontext()


def peak(latent: tuple[int, int, int], way: str, kind: str) -> float:
    """Bytes that one step adds at most, in a process of its own."""
    command = [sys.executable, __file__, "--latent", ",".join(map(str, latent)), "--one", f"{way}:{kind}"]
    # Large blocks go back to the system at once: what the heap happens to keep changes results by a factor of two.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def one_step(latent: tuple[int, int, int], way: str, kind: str) -> None:
    bench = Bench(latent, "full" if way == "release" else "selective")
    Path("/proc/self/clear_refs").write_text("5")  # the highest size so far is forgotten
    before = psutil.Process().memory_info().rss
    getattr(bench, way)(kind)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(1024 * int(status["VmHWM"].split()[0]) - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--latent", default="5,30,52", help="frames,rows,columns of the latents (default: 480p, 17 frames)"
    )
    parser.add_argument("--quick", action="store_true", help="3 frames of 16 x 16")
    parser.add_argument("--threads", type=int, help="CPU threads; 1 reports CPU time")
    parser.add_argument("--seconds", type=float, default=60, help="per kind of step")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    frames, height, width = (3, 16, 16) if args.quick else map(int, args.latent.split(","))
    latent = (frames, height, width)
    if args.one:
        one_step(latent, *args.one.split(":"))
        return
    ours, release = Bench(latent, "selective"), Bench(latent, "full")
    rows = []
    for kind in KINDS:
        calls = {"ours": lambda k=kind: ours.ours(k), "release": lambda k=kind: release.release(k)}
        for call in calls.values():
            call()
        taken = interleave(calls, args.seconds, rounds=(3, 9))
        time, memory = medians(taken), {way: peak(latent, way, kind) for way in calls}
        flops = {way: count_flops(call) for way, call in calls.items()}
        rows.append(
            [
                kind,
                f"{milliseconds(time['ours'])} / {milliseconds(time['release'])}",
                f"{ratio(taken['ours'], taken['release']):.2f}",
                f"{memory['ours'] / 1e6:.0f} / {memory['release'] / 1e6:.0f} MB",
                f"{memory['ours'] / memory['release']:.2f}",
                f"{flops['ours'] / 1e9:.0f} / {flops['release'] / 1e9:.0f} GFLOP",
                f"{flops['ours'] / flops['release']:.2f}",
            ]
        )
        print(f"{kind}: done", file=sys.stderr)
    print(table(["step", "time, ours / release", "ratio", "memory", "ratio", "operations", "ratio"], rows))


if __name__ == "__main__":
    main()
