"""Optimizers, averages and norms against torch's own and closed forms, on one rank and on two."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from vdot.errors import ConfigError, TrainingError
from vdot.training import optim
from vdot.training.optim import (
    Ema,
    Guard,
    SecondMomentAdam,
    clip_gradients,
    grad_norm,
    lr_at,
    make_optimizer,
    optimizer_state,
    set_lr,
)


def parameters(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=g).to(dtype)) for shape in ((17, 5), (3,), (), (0, 4), (2, 3, 4))]


def named(values: list[nn.Parameter]) -> dict[str, nn.Parameter]:
    return {f"p{i}": p for i, p in enumerate(values)}


def give_gradients(values: list[nn.Parameter], step: int) -> None:
    g = torch.Generator().manual_seed(100 + step)
    for p in values:
        p.grad = (10 ** (step % 3) * torch.randn(p.shape, generator=g)).to(p.dtype)


# --- optimizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bucket", [2**26, 20])
def test_second_moment_adam_is_torch_adamw_with_beta1_zero(dtype, bucket, monkeypatch):
    """Twenty steps, gradients of three magnitudes, one parameter without a gradient now and then: equal bit for bit."""
    monkeypatch.setattr(optim, "BUCKET", bucket)
    ours, theirs = parameters(dtype=dtype), parameters(dtype=dtype)
    options = {"lr": 3e-3, "eps": 1e-8, "weight_decay": 0.02}
    mine = SecondMomentAdam(ours, beta2=0.95, **options)
    torchs = torch.optim.AdamW(theirs, betas=(0.0, 0.95), foreach=True, **options)
    for step in range(20):
        for values, optimizer in ((ours, mine), (theirs, torchs)):
            set_lr(optimizer, lr_at(step, 3e-3, warmup=5))
            give_gradients(values, step)
            if step % 4 == 1:
                values[1].grad = None
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(mine.state[a]["exp_avg_sq"], torchs.state[b]["exp_avg_sq"])
    assert mine.state[ours[1]]["step"] == 15


def test_the_smallest_optimizer_is_chosen_and_its_state_is_there_at_once():
    values = parameters()
    values[0].requires_grad_(False)
    adam = make_optimizer(named(values), 1e-3, betas=(0.0, 0.9))
    assert isinstance(adam, SecondMomentAdam)
    assert set(optimizer_state(adam, named(values))) == {
        f"p{i}.{key}" for i in range(1, 5) for key in ("step", "exp_avg_sq")
    }
    both = make_optimizer(named(values), 1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    assert isinstance(both, torch.optim.AdamW)
    assert set(optimizer_state(both, named(values))) == {
        f"p{i}.{key}" for i in range(1, 5) for key in ("step", "exp_avg", "exp_avg_sq")
    }
    # the state made ahead is what AdamW would have made itself
    plain = parameters()
    torchs = torch.optim.AdamW(plain[1:], lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, foreach=True)
    for step in range(3):
        for set_of, optimizer in ((values, both), (plain, torchs)):
            give_gradients(set_of, step)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(values[1:], plain[1:], strict=True))


@pytest.mark.parametrize("betas", [(0.0, 0.9), (0.9, 0.99)])
def test_state_copied_in_place_continues_bit_for_bit(betas):
    a, b = parameters(), parameters(1)
    one, two = (make_optimizer(named(values), 1e-2, betas) for values in (a, b))
    for step in range(3):
        give_gradients(a, step)
        one.step()
    with torch.no_grad():
        for to, of in zip(b, a, strict=True):
            to.copy_(of)
        here, there = optimizer_state(two, named(b)), optimizer_state(one, named(a))
        for name, tensor in here.items():
            tensor.copy_(there[name])
    for values, optimizer in ((a, one), (b, two)):
        give_gradients(values, 3)
        optimizer.step()
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_impossible_numbers_are_refused():
    values = named(parameters())
    for options in ({"lr": -1.0}, {"lr": 1.0, "betas": (0.0, 1.0)}, {"lr": 1.0, "eps": 0.0}):
        with pytest.raises(ConfigError):
            make_optimizer(values, **options)
    for p in values.values():
        p.requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing to train"):
        make_optimizer(values, 1.0)


def test_learning_rates():
    assert [lr_at(step, 1.0, warmup=4) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    cosine = [lr_at(step, 2.0, warmup=2, total=12, kind="cosine") for step in range(14)]
    assert cosine[:3] == [1.0, 2.0, 2.0]
    assert cosine[7] == pytest.approx(1.0) and cosine[12] == cosine[13] == pytest.approx(0)
    assert lr_at(0, 1.0) == 1.0
    with pytest.raises(ConfigError, match="linear"):
        lr_at(0, 1.0, kind="linear")


# --- moving average --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_average_has_its_closed_form(dtype):
    """``a_n = d^n p_0 + (1 - d) sum_k d^(n-k) p_k``, in float32 whatever the parameters are."""
    p = nn.Parameter(torch.tensor([1.0, -2.0], dtype=dtype))
    ema, decay, history = Ema({"p": p}, 0.9), 0.9, [p.detach().double()]
    for step in range(30):
        with torch.no_grad():
            p.copy_(torch.tensor([math.sin(step), 0.01 * step]))
        history.append(p.detach().double())
        ema.update(step)
    n = len(history) - 1
    expected = decay**n * history[0] + (1 - decay) * sum(decay ** (n - k) * history[k] for k in range(1, n + 1))
    assert ema.averages["p"].dtype == torch.float32
    torch.testing.assert_close(ema.averages["p"].double(), expected, rtol=1e-6, atol=1e-7)


def test_average_follows_until_it_starts_and_skips_what_is_not_trained():
    p, frozen = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2), requires_grad=False)
    ema = Ema({"p": p, "frozen": frozen}, 0.5, start=2)
    seen = []
    for step in range(4):
        with torch.no_grad():
            p.fill_(step + 1)
        ema.update(step)
        seen.append(ema.averages["p"][0].item())
    assert seen == [1.0, 2.0, 2.5, 3.25]
    assert set(ema.state()) == {"p"}


def test_swapped_shows_the_average_and_gives_the_weights_back_exactly():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2).to(torch.bfloat16))
    ema = Ema(net.named_parameters(), 0.9)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape))
    ema.update(0)
    before = copy.deepcopy(net.state_dict())
    averages = {name: average.clone() for name, average in ema.averages.items()}
    with pytest.raises(KeyError), ema.swapped(net):
        for name, p in net.named_parameters():
            assert torch.equal(p, averages[name].to(p.dtype))
        raise KeyError
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(torch.equal(averages[name], value) for name, value in ema.averages.items())


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [0.1, 1e9])
def test_clipping_is_torchs(max_norm):
    ours, theirs = parameters(), parameters()
    for values in (ours, theirs):
        give_gradients(values, 1)
        values[1].grad = None
    norm = clip_gradients(ours, max_norm)
    expected = nn.utils.clip_grad_norm_(theirs, max_norm)
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=0)
    assert grad_norm([]) == 0 and clip_gradients([nn.Parameter(torch.ones(2))], 1.0) == 0


def test_large_bfloat16_gradients_do_not_overflow():
    p = nn.Parameter(torch.zeros(10000, dtype=torch.bfloat16))
    p.grad = torch.full_like(p, 3.0)
    assert grad_norm([p]).item() == pytest.approx(300.0) and grad_norm([p]).dtype == torch.float32


class Net(nn.Module):
    """Three rows and one row over two ranks (2 + 1, 1 + 0), and a parameter that every rank has whole."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.whole = nn.Linear(5, 3), nn.Linear(3, 1), nn.Parameter(torch.randn(5))

    def forward(self, x):
        return self.b(self.a(x * self.whole).tanh())


def train(betas: tuple[float, float], steps: int) -> dict:
    """Norms and final weights, average and optimizer state, gathered; alone or sharded over all ranks."""
    net = Net()
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(net, mesh=mesh, ignored_params={net.whole})
        assert isinstance(net.a.weight, DTensor) and not isinstance(net.whole, DTensor)
    weights = dict(net.named_parameters())
    optimizer, ema, norms = make_optimizer(weights, 0.1, betas, weight_decay=0.01), Ema(weights, 0.5), []
    for step in range(steps):
        net(torch.randn(8, 5, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        norms.append(clip_gradients(weights.values(), 0.5).item())
        norms.append(grad_norm(weights.values()).item())
        optimizer.step()
        optimizer.zero_grad()
        ema.update(step)
    x = torch.ones(1, 5)
    with torch.no_grad():
        plain = net(x)
        with ema.swapped(net):
            averaged = net(x)
        again = net(x)
    assert torch.equal(plain, again) and not torch.equal(plain, averaged)
    tensors = {**weights, **{f"ema.{k}": v for k, v in ema.state().items()}, **optimizer_state(optimizer, weights)}
    whole = {k: (t.full_tensor() if isinstance(t, DTensor) else t).detach() for k, t in tensors.items()}
    return {"norms": torch.tensor(norms), "averaged": averaged, **whole}


@pytest.mark.parametrize("betas", [(0.0, 0.9), (0.9, 0.99)])
def test_two_ranks_are_one(betas, pool):
    """Norm, clipping, optimizer, average: shards of uneven and no rows beside whole parameters."""
    alone = train(betas, 4)
    for rank in pool.run(2, train, betas, 4):
        assert rank.keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(rank[name], value, rtol=1e-5, atol=1e-6, msg=name)


# --- what is not finite ----------------------------------------------------------------------------------------------


def test_guard_skips_counts_and_stops_with_a_diagnosis():
    guard = Guard(limit=3)
    good, bad = {"loss": 1.0, "norm": 2.0}, {"loss": 1.0, "norm": math.nan}
    assert [guard.check(i, v) for i, v in enumerate((good, bad, bad, good, bad, bad))] == [0, 1, 1, 0, 1, 1]
    assert guard.state() == {"in_a_row": {"norm": 2}, "total": 4}
    resumed = Guard(limit=3)
    resumed.restore(guard.state())
    with pytest.raises(
        TrainingError, match=r"3 updates in a row .*\(the last in step 6: loss = inf, norm = nan\)"
    ) as error:
        resumed.check(6, {"loss": math.inf, "norm": math.nan})
    assert error.value.exit_code == 1 and "lower learning rate" in str(error.value)
    assert resumed.total == 5


def test_guard_is_not_reassured_by_another_optimizer():
    guard = Guard(limit=3)
    with pytest.raises(TrainingError, match="norm_generator = nan"):
        for step in range(9):
            assert not guard.check(step, {"norm_critic": 1.0})
            if step % 2 == 0:
                guard.check(step, {"norm_generator": math.nan})
    assert step == 4 and guard.total == 3
