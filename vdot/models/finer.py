"""A transformer with smaller patches, begun from one with larger ones.

Halving the patch makes four tokens of one: four times the work, and much finer pictures from the same number of weights
(Peebles and Xie, "Scalable Diffusion Models with Transformers", 2023, figure 6). Where little can be spent, the coarse
one learns what there is to see and the fine one goes on from it.
"""

from dataclasses import replace
from math import prod

import torch

from vdot.models.vace import VaceDiT


@torch.no_grad()
def finer(dit: VaceDiT) -> VaceDiT:
    """``dit`` with patches of 1 x 1 x 1, a token for every latent pixel; it shares all other weights with ``dit``.

    Patch embeddings are summed over the patch and the head is averaged over it, so that where latents are constant
    within each of the old patches every new token is embedded as the old one was, and what the head makes of a token
    is the mean of what it made of the patch. It has to be trained on: tokens have other neighbours, and positions
    (RoPE) count finer steps.

    Raises:
        ValueError: the patches cannot be smaller.
    """
    patch = dit.config.patch_size
    if prod(patch) == 1:
        raise ValueError("the patches of this transformer are 1 x 1 x 1 already")
    state = dict(dit.state_dict())
    for key in ("patch_embedding.weight", "vace_patch_embedding.weight"):
        state[key] = state[key].float().sum((2, 3, 4), keepdim=True).to(state[key].dtype)
    for key in ("head.head.weight", "head.head.bias"):  # rows lie as (position in the patch, channel)
        rows = state[key].float().unflatten(0, (prod(patch), -1))
        state[key] = rows.mean(0).to(state[key].dtype)
    with torch.device("meta"):
        new = VaceDiT(replace(dit.config, patch_size=(1, 1, 1)))
    new.load_state_dict(state, assign=True)
    return new
