"""Adam without a first moment, parameter averages, gradient norms over shards, learning rates, the non-finite guard.

Everything works on the local shards of DTensors: no gathering, and the state has the parameters' placements, so that
:mod:`vdot.training.checkpoint` can store it and load it on another number of ranks.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from vdot.errors import ConfigError, TrainingError

BUCKET = 2**26  # elements handled by one foreach call, which bounds its temporary copies

Named = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]


def local(tensor: Tensor) -> Tensor:
    """This rank's part, sharing memory; a plain tensor itself."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _named(parameters: Named) -> dict[str, Tensor]:
    return dict(parameters.items() if isinstance(parameters, Mapping) else parameters)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Indices of consecutive non-empty tensors of one type and device, at most :data:`BUCKET` elements (or one)."""
    bucket: list[int] = []
    size, kind = 0, None
    for i, tensor in enumerate(tensors):
        if tensor.numel() == 0:  # ranks beyond a parameter's rows
            continue
        this = tensor.dtype, tensor.device
        if bucket and (this != kind or size + tensor.numel() > BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(i)
        size, kind = size + tensor.numel(), this
    if bucket:
        yield bucket


# --- optimizers ------------------------------------------------------------------------------------------------------


class SecondMomentAdam(torch.optim.Optimizer):
    """AdamW for beta1 = 0, which keeps no first moment: 4 instead of 8 bytes per float32 parameter.

    ``v <- beta2 v + (1 - beta2) g^2``; ``p <- p (1 - lr weight_decay) - lr g / (sqrt(v / (1 - beta2^t)) + eps)``.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        beta2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(list(params), {"lr": lr, "beta2": beta2, "eps": eps, "weight_decay": weight_decay})
        for p in self._parameters():
            self.state[p] = {"step": torch.tensor(0.0), "exp_avg_sq": torch.zeros_like(p.detach())}

    def _parameters(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            yield from group["params"]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            updated = [p for p in group["params"] if p.grad is not None]
            for p in updated:
                self.state[p]["step"] += 1
            locals_ = [local(p) for p in updated]
            for bucket in _buckets(locals_):
                self._update(group, [updated[i] for i in bucket], [locals_[i] for i in bucket])

    def _update(self, group: dict[str, Any], parameters: list[Tensor], values: list[Tensor]) -> None:
        lr, beta2 = group["lr"], group["beta2"]
        grads = [local(p.grad) for p in parameters if p.grad is not None]
        moments = [local(self.state[p]["exp_avg_sq"]) for p in parameters]
        roots = [(1 - beta2 ** self.state[p]["step"].item()) ** 0.5 for p in parameters]
        if group["weight_decay"]:
            torch._foreach_mul_(values, 1 - lr * group["weight_decay"])
        torch._foreach_mul_(moments, beta2)
        torch._foreach_addcmul_(moments, grads, grads, 1 - beta2)
        denominators = torch._foreach_sqrt(moments)
        torch._foreach_div_(denominators, roots)
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_addcdiv_(values, grads, denominators, -lr)


def make_optimizer(
    parameters: Named,
    lr: float,
    betas: tuple[float, float] = (0.0, 0.999),
    weight_decay: float = 0.0,
    eps: float = 1e-8,
) -> torch.optim.Optimizer:
    """AdamW for ``(name, parameter)`` pairs, in the form that keeps least; its state is there before the first step.

    Raises:
        ConfigError: numbers out of range, or no parameter that takes a gradient.
    """
    trained = [p for p in _named(parameters).values() if p.requires_grad]
    if not trained:
        raise ConfigError("there is nothing to train: no parameter of the network takes a gradient")
    if not (lr >= 0 and eps > 0 and weight_decay >= 0 and all(0 <= b < 1 for b in betas)):
        raise ConfigError(
            f"lr {lr}, eps {eps} and weight_decay {weight_decay} must not be negative, betas {betas} be in [0, 1)"
        )
    if betas[0] == 0:
        return SecondMomentAdam(trained, lr, betas[1], eps, weight_decay)
    fused = all(p.device.type == "cuda" for p in trained)
    how = {"fused": True} if fused else {"foreach": True}
    # torch's loops over many tensors take sharded or whole ones, not both.
    kinds = [[p for p in trained if isinstance(p, DTensor) == sharded] for sharded in (True, False)]
    groups = [{"params": kind} for kind in kinds if kind]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **how)  # type: ignore[arg-type]
    for p in trained:
        optimizer.state[p] = {
            "step": torch.zeros((), dtype=torch.float32, device=p.device if fused else "cpu"),
            "exp_avg": torch.zeros_like(p.detach()),
            "exp_avg_sq": torch.zeros_like(p.detach()),
        }
    return optimizer


def optimizer_state(optimizer: torch.optim.Optimizer, parameters: Named) -> dict[str, Tensor]:
    """The optimizer's own tensors, flat: ``{"<parameter name>.exp_avg_sq": ..., "<parameter name>.step": ...}``.

    Loading a checkpoint into them in place restores the optimizer. Learning rates are not part of it: they follow
    from the step (:func:`lr_at`).
    """
    names = {p: name for name, p in _named(parameters).items()}
    return {
        f"{names[p]}.{key}": value
        for group in optimizer.param_groups
        for p in group["params"]
        for key, value in optimizer.state[p].items()
    }


def lr_at(step: int, base: float, warmup: int = 0, total: int = 0, kind: str = "constant") -> float:
    """Learning rate of step ``step`` (the first is 0): linear to ``base`` over ``warmup`` steps, then ``kind``.

    "cosine" falls from ``base`` to 0 at step ``total``; "constant" stays.
    """
    if kind not in ("constant", "cosine"):
        raise ConfigError(f"unknown learning rate schedule {kind!r}: use constant or cosine")
    if step < warmup:
        return base * (step + 1) / warmup
    if kind == "constant":
        return base
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return base * 0.5 * (1 + math.cos(math.pi * done))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


# --- moving average of the weights -----------------------------------------------------------------------------------


class Ema:
    """``average <- decay average + (1 - decay) parameter``, in float32, each rank its own shards.

    Args:
        parameters: ``(name, parameter)`` pairs; those without gradient are left out, as they do not move.
        start: updates before which the average is the parameter itself.
    """

    def __init__(self, parameters: Named, decay: float, start: int = 0) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"the decay of the weights' moving average must be in [0, 1), got {decay}")
        self.decay, self.start = decay, start
        self.parameters = {name: p for name, p in _named(parameters).items() if p.requires_grad}
        with torch.no_grad():
            self.averages = {name: p.detach().to(torch.float32, copy=True) for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After the optimizer's step ``step`` (the first is 0)."""
        weight = 1.0 if step < self.start else 1 - self.decay
        averages = [local(average) for average in self.averages.values()]
        parameters = [local(p) for p in self.parameters.values()]
        for bucket in _buckets(averages):
            current = [parameters[i].float() for i in bucket]
            torch._foreach_lerp_([averages[i] for i in bucket], current, weight)

    def state(self) -> dict[str, Tensor]:
        """The averages by parameter name; loading a checkpoint into them in place restores this object."""
        return dict(self.averages)

    @contextmanager
    def swapped(self, module: nn.Module) -> Iterator[None]:
        """``module``, whose parameters these are, has the averages as its weights within the block."""
        _reshard(module)
        kept = {name: local(p).clone() for name, p in self.parameters.items()}
        try:
            with torch.no_grad():
                for name, p in self.parameters.items():
                    local(p).copy_(local(self.averages[name]))
            yield
        finally:
            _reshard(module)
            with torch.no_grad():
                for name, p in self.parameters.items():
                    local(p).copy_(kept[name])


def _reshard(module: nn.Module) -> None:
    """FSDP may still hold gathered copies of the weights, which would not see a change of the shards."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


# --- gradients -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def grad_norm(parameters: Iterable[Tensor]) -> Tensor:
    """L2 norm over all gradients, float32 ``[]`` on their device, equal on all ranks.

    Sharded gradients are summed over the ranks that share them; whole ones (equal on all ranks) count once.
    Collective over the shards' mesh.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros(())
    shares: dict[Any, list[Tensor]] = {}
    for grad in grads:
        shares.setdefault(_shard_groups(grad), []).append(local(grad))
    total = torch.zeros((), device=grads[0].device, dtype=torch.float32)
    for groups, tensors in shares.items():  # in the order of the parameters: alike on all ranks
        square = _square(tensors, total)
        for group in groups:
            dist.all_reduce(square, group=group)
        total = total + square
    return total.sqrt()


def _shard_groups(grad: Tensor) -> tuple[Any, ...]:
    """The process groups over which ``grad`` is cut."""
    if not isinstance(grad, DTensor):
        return ()
    mesh = grad.device_mesh
    return tuple(mesh.get_group(i) for i, placement in enumerate(grad.placements) if isinstance(placement, Shard))


def _square(tensors: list[Tensor], like: Tensor) -> Tensor:
    filled = [t for t in tensors if t.numel()]
    if not filled:
        return torch.zeros_like(like)
    norms = torch._foreach_norm(filled, 2, dtype=torch.float32)
    return torch.stack([n.to(like.device) for n in norms]).square().sum()


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients down to a common norm of at most ``max_norm``; returns :func:`grad_norm` before that.

    Nothing waits for the device. A non-finite norm makes all gradients non-finite: let :class:`Guard` see it first.
    """
    parameters = list(parameters)
    norm = grad_norm(parameters)
    grads = [local(p.grad) for p in parameters if p.grad is not None]
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for bucket in _buckets(grads):
        torch._foreach_mul_([grads[i] for i in bucket], scale.to(grads[bucket[0]].device))
    return norm


class Guard:
    """Skips updates whose numbers are not finite, and ends training after ``limit`` in a row of the same number.

    In a row means: among the checks that had this number, so that one guard serves optimizers that take turns.
    The values must already be equal on all ranks (reduced losses, :func:`grad_norm`), so that all decide alike.
    """

    def __init__(self, limit: int = 10) -> None:
        self.limit = limit
        self.total = 0  # updates skipped
        self.in_a_row: dict[str, int] = {}

    def check(self, step: int, values: Mapping[str, float]) -> bool:
        """Whether to skip an update in step ``step`` because one of its losses or norms is not finite.

        Raises:
            TrainingError: it was the ``limit``-th time in a row.
        """
        bad = {name: value for name, value in values.items() if not math.isfinite(value)}
        self.in_a_row |= {name: self.in_a_row.get(name, 0) + 1 if name in bad else 0 for name in values}
        self.total += bool(bad)
        if any(self.in_a_row[name] >= self.limit for name in bad):
            raise TrainingError(self._diagnosis(step, bad))
        return bool(bad)

    def _diagnosis(self, step: int, bad: Mapping[str, float]) -> str:
        what = ", ".join(f"{name} = {value}" for name, value in bad.items())
        return (
            f"{max(self.in_a_row[name] for name in bad)} updates in a row were not finite and were skipped "
            f"(the last in step {step}: {what}); the weights are still those before them: resume from the last "
            "checkpoint with a lower learning rate, a smaller gradient clip or float32, and look at the data since then"
        )

    def state(self) -> dict[str, Any]:
        """For the checkpoint's ``meta``."""
        return {"total": self.total, "in_a_row": {name: count for name, count in self.in_a_row.items() if count}}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.total, self.in_a_row = state["total"], dict(state["in_a_row"])
