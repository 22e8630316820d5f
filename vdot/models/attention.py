"""Attend: the one place that picks an attention backend.

``Attend`` has no parameters, so ``vdot.parallel`` can replace it by a module that exchanges heads or blocks between
ranks without touching the network.
"""

from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# q [B, Lq, N, D], k and v [B, Lk, N, D], bias broadcastable to [B, N, Lq, Lk] or None -> [B, Lq, N, D]
AttentionFn = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


# Scores per head up to which a CPU trains by plain products: the fused backward pass is slower there than they are, and
# a large part of a training step of the tiny model (benchmarks/small_training.py).
FEW_SCORES = 512 * 512


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """PyTorch's scaled dot-product attention: the default everywhere, and what a biased call always uses."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if q.device.type == "cpu" and q.requires_grad and q.shape[2] * k.shape[2] <= FEW_SCORES:
        return _products(q, k, v, bias).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


def _products(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """``softmax(q k^T / sqrt(D) + bias) v``, ``[B, N, L, D]`` each, the softmax in float32."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


def _unbiased(kernel: Callable[[Tensor, Tensor, Tensor], Any]) -> AttentionFn:
    """Kernels without an additive bias serve self-attention; the short, biased cross-attention stays on SDPA."""

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        if bias is not None:
            return sdpa(q, k, v, bias)
        out = kernel(q, k, v)
        return out[0] if isinstance(out, tuple) else out

    return attend


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(q, k, v)


def _flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    out: Any = _compiled(flex_attention)(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


@cache
def _compiled(fn: Callable) -> Callable:
    # Uncompiled flex_attention materialises L x L scores.
    return torch.compile(fn, dynamic=False)


def _load(module: str, attribute: str, install: str) -> Callable:
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, OSError) as error:
        raise ImportError(f"this attention backend needs {module}.{attribute}: install it with `{install}`") from error


def _flash3() -> AttentionFn:
    fn = _load("flash_attn_interface", "flash_attn_func", "python setup.py install in flash-attention/hopper")
    return _unbiased(fn)


def _flash2() -> AttentionFn:
    return _unbiased(_load("flash_attn", "flash_attn_func", "pip install flash-attn --no-build-isolation"))


def _sage() -> AttentionFn:
    return _unbiased(partial(_load("sageattention", "sageattn", "pip install sageattention"), tensor_layout="NHD"))


def _cudnn_backend() -> AttentionFn:
    if not (torch.cuda.is_available() and torch.backends.cudnn.is_available()):
        raise ImportError("this attention backend needs a CUDA device with cuDNN: choose --attention sdpa here")
    return _unbiased(_cudnn)


BACKENDS: dict[str, Callable[[], AttentionFn]] = {
    "sdpa": lambda: sdpa,
    "flash2": _flash2,
    "flash3": _flash3,
    "cudnn": _cudnn_backend,
    "sage": _sage,
    "flex": lambda: _unbiased(_flex),
}


def attention_backend(name: str) -> AttentionFn:
    """The backend called ``name``. ``ValueError`` for an unknown name, ``ImportError`` naming what to install."""
    if name not in BACKENDS:
        raise ValueError(f"unknown attention backend {name!r}: choose one of {', '.join(BACKENDS)}")
    try:
        return BACKENDS[name]()
    except ImportError as error:
        raise ImportError(f"attention backend {name!r} is not available: {error}") from error


class Attend(nn.Module):
    """Parameterless seam ``(q [B,Lq,N,D], k, v [B,Lk,N,D], bias) -> [B,Lq,N,D]``, scaled by ``1/sqrt(D)``."""

    def __init__(self, backend: str = "sdpa") -> None:
        super().__init__()
        self.use(backend)

    def use(self, backend: str) -> None:
        self.backend, self.fn = backend, attention_backend(backend)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.fn(q, k, v, bias)

    def extra_repr(self) -> str:
        return self.backend


def set_attention_backend(model: nn.Module, name: str) -> None:
    """Switch every :class:`Attend` of ``model``; raises as :func:`attention_backend` and then changes nothing."""
    attention_backend(name)
    for module in model.modules():
        if isinstance(module, Attend):
            module.use(name)
