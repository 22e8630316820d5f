"""The page under torchrun: two ranks make each video, a cancelled one stops both, a lost rank brings all back."""

import os
import re
import signal
import time

import psutil
import pytest

from tests.page.conftest import MINUTES, Served, serving
from tests.parallel.conftest import free_port


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}")
    with serving(tmp_path_factory.mktemp("ranks"), "size=64*64", launcher=launcher) as served:
        served.wait_said(r"load +\d")
        yield served


def workers(page: Served) -> list[psutil.Process]:
    """The processes that generate, one of each rank, in the order of ranks."""
    ranks = {}
    for process in psutil.Process(page.process.pid).children(recursive=True):
        if "multiprocessing.spawn" in " ".join(process.cmdline()):
            ranks[int(process.environ()["RANK"])] = process
    return [ranks[rank] for rank in sorted(ranks)]


def generate(page: Served, steps: int = 4):
    from gradio_client import Client

    client = Client(page.url, verbose=False, httpx_kwargs={"timeout": MINUTES})
    return client, client.submit(preset="t2v", prompt="a ball", steps=steps, seed=7, api_name="/generate")


def wait_sampling(page: Served, times: int) -> None:
    page.wait_said(r"encode condition +\d", times)
    time.sleep(0.5)


@pytest.mark.slow
def test_a_lost_rank_brings_a_message_and_a_restart(ranks, monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    _, job = generate(ranks)
    _, facts = job.result(MINUTES)
    assert facts["frames"] == 17 and "2 processes: ulysses 2" in ranks.said()
    before = workers(ranks)
    assert len(before) == 2
    _, job = generate(ranks, steps=500)
    wait_sampling(ranks, 2)
    os.kill(before[1].pid, signal.SIGKILL)
    with pytest.raises(Exception, match=r"rank 1.* was killed by signal 9.*try once more"):
        job.result(MINUTES)
    _, job = generate(ranks)  # waits until the model is there again
    _, again = job.result(MINUTES)
    assert again["frames"] == 17
    assert not {p.pid for p in before} & {p.pid for p in workers(ranks)}


@pytest.mark.slow
def test_cancel_stops_both_ranks_and_the_next_one_works(ranks, visit):
    tab = visit(ranks, login=None)
    tab.locator("#vdot-prompt textarea").fill("a ball")
    tab.get_by_role("button", name="Advanced").click()
    tab.locator("#vdot-steps input").fill("900")
    tab.locator("#vdot-steps input").blur()
    tab.locator("#vdot-generate").click()
    words = tab.locator("#vdot-status")
    words.get_by_text(re.compile(r"Step \d+ of 900")).wait_for()
    tab.locator("#vdot-cancel").click()
    words.get_by_text(re.compile(r"Cancelled\.")).wait_for()
    both = workers(ranks)
    tab.locator("#vdot-steps input").fill("2")
    tab.locator("#vdot-steps input").blur()
    tab.locator("#vdot-generate").click()
    words.get_by_text(re.compile("Done in")).wait_for()
    assert workers(ranks) == both  # nobody was started again for it
