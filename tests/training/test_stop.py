"""A signal lets the step finish; all ranks stop at the same one; a lost rank still ends all."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from tests.conftest import ROOT
from tests.parallel.test_failures import torchrun
from vdot.training.stop import SIGNALS, StopSignal

PROGRAM = ROOT / "tests" / "training" / "stopping.py"


@pytest.mark.parametrize("name", SIGNALS)
def test_the_first_signal_only_asks(name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop.requested and not stop.agreed()
        os.kill(os.getpid(), number)
        assert stop.requested and stop.agreed() and stop.reason == name
        assert signal.getsignal(number) != before
    assert signal.getsignal(number) == before
    assert stop.requested


def test_a_second_ctrl_c_stops_at_once(capfd):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        assert "Ctrl-C again stops at once" in capfd.readouterr().err
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_sigterm_twice_and_ctrl_c_after_it_only_ask():
    with StopSignal() as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert stop.requested


def test_can_be_asked_without_a_signal_and_outside_the_main_thread():
    stop = StopSignal()
    stop.request("time limit")
    assert stop.agreed() and stop.reason == "time limit"
    inside: list[bool] = []

    def work() -> None:
        with StopSignal() as other:
            inside.append(other.agreed())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [False]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict:
    """Two ranks, three ways to end them."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(PROGRAM), str(tmp_path_factory.mktemp("stopping"))]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("how", ["launcher", "one rank"])
def test_all_ranks_save_the_same_step_and_leave_well(outcomes, how):
    outcome = outcomes[how]
    assert outcome["codes"] == [0, 0], outcome["errors"]
    steps = {text.split()[0] for text in outcome["stopped"]}
    assert len(outcome["stopped"]) == 2 and steps == {str(outcome["saved"])}
    reasons = [text.split()[1] for text in outcome["stopped"]]
    assert reasons == (["SIGTERM", "SIGTERM"] if how == "launcher" else ["None", "SIGUSR1"])
    assert outcome["errors"].count("error") == 0


def test_a_lost_rank_still_ends_all_with_one_message(outcomes):
    outcome = outcomes["lost"]
    assert outcome["codes"] == [1, -signal.SIGKILL] and outcome["saved"] is None
    assert outcome["errors"].count("error: rank 1") == 1 and "was killed" in outcome["errors"]
    assert outcome["seconds"] < 60  # not the minutes of a collective that waits


@pytest.mark.slow
def test_under_torchrun(tmp_path):
    """The launcher forwards SIGTERM and waits; its own exit code is its own affair."""
    timer = threading.Thread(target=_terminate_when_ready, args=(tmp_path,))
    timer.start()
    result = torchrun(2, PROGRAM, tmp_path)
    timer.join()
    assert len({(tmp_path / f"stopped{rank}").read_text() for rank in range(2)}) == 1, result.stderr
    assert "error: rank" not in result.stderr


def _terminate_when_ready(folder) -> None:
    import time

    import psutil

    for _ in range(600):
        if all((folder / f"ready{rank}").exists() for rank in range(2)):
            break
        time.sleep(0.1)
    worker = psutil.Process(int((folder / "ready0").read_text()))
    os.kill(worker.ppid(), signal.SIGTERM)
