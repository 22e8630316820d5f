"""The coarse preview: its colours, its estimate, its file; and what a lost rank leaves as the reason."""

import io
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vdot.page.crew import Crew
from vdot.page.options import PageConfig
from vdot.page.preview import Estimate, animation, fit_colours, paint
from vdot.parallel.launch import Launch


def test_colours_of_an_autoencoder_that_is_linear_are_found_exactly():
    matrix = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))

    def encode(video):  # [1, 3, 1, H, W] -> [1, 16, 1, H/8, W/8]
        return torch.einsum("lc,bcthw->blthw", matrix, F.avg_pool3d(video, (1, 8, 8))) + 0.3

    vae = SimpleNamespace(encode=encode)
    place = SimpleNamespace(use=lambda _: nullcontext())
    colours = fit_colours(SimpleNamespace(vae=vae, placement=place, device="cpu"))
    video = torch.rand(1, 3, 1, 32, 48, generator=torch.Generator().manual_seed(2)) * 2 - 1
    shown = paint(encode(video)[0], colours)
    truth = (F.avg_pool3d(video, (1, 8, 8))[0].permute(1, 2, 3, 0) + 1) * 127.5
    assert shown.shape == (1, 4, 6, 3) and np.abs(shown - truth.numpy()).max() <= 0.51


def test_the_estimate_is_of_the_first_evaluation_of_a_step():
    class Network(nn.Module):
        def forward(self, x, t):
            return 2 * x

    network = Network()
    heard = Estimate(network)
    x = torch.ones(1, 16, 3, 2, 2)
    network(x, torch.tensor([250.0]))
    network(5 * x, torch.tensor([250.0]))  # guidance asks once more
    assert torch.equal(heard.take(references=1), 0.5 * x[0, :, 1:])  # x - t / 1000 * v
    assert heard.take(references=0) is None


def test_the_animation_has_every_frame_and_its_pace():
    from PIL import Image

    frames = np.stack([np.full((6, 10, 3), 40 * i, np.uint8) for i in range(5)])
    with Image.open(io.BytesIO(animation(frames, fps=4))) as picture:
        assert picture.format == "WEBP" and picture.n_frames == 5 and picture.size == (320, 192)


class Board:
    def __init__(self) -> None:
        self.notes: dict[str, str] = {}
        self.counts: dict[str, int] = {}

    def write(self, key: str, value: str) -> None:
        self.notes[key] = value

    def read(self, key: str) -> str | None:
        return self.notes.get(key)

    def count(self, key: str) -> int:
        self.counts[key] = self.counts.get(key, 0) + 1
        return self.counts[key]


def crew(board: Board, rank: int, code: int) -> Crew:
    made = Crew(PageConfig(), Launch())
    made.launch, made.board = Launch(rank, 2, rank, 2), board  # type: ignore[assignment]
    made.pipe = SimpleNamespace(close=lambda: None)
    made.process = SimpleNamespace(join=lambda *_: None, is_alive=lambda: False, exitcode=code)
    return made


@pytest.mark.parametrize("killed", [True, False])
def test_the_known_reason_is_shown_and_an_echo_only_without_one(killed, monkeypatch):
    monkeypatch.setattr("vdot.page.crew.WHY", 0.5)
    board = Board()
    first, second = crew(board, 0, 1), crew(board, 1, -9 if killed else 1)
    second.end("RuntimeError: connection closed", known=False)
    why = first.end("RuntimeError: reset by peer", known=False)
    if killed:
        assert "(rank 1) was killed by signal 9" in why
    else:
        assert why == "RuntimeError: connection closed"  # who said it first
    assert first.generation == second.generation == 1 and board.read("begun/1")
