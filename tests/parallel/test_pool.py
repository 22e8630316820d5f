"""The processes that the other tests of this folder run in: what is said when one of them dies."""

import os
import signal

import pytest
import torch.distributed as dist


def crash_of(rank: int) -> int:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGSEGV)
    return dist.get_rank()


def test_a_process_that_dies_says_where_and_fails_one_test_only(pool):
    with pytest.raises(pytest.fail.Exception, match=r"rank 1 exit code -11:(.|\n)*crash_of"):
        pool.run(2, crash_of, 1)
    assert pool.run(2, crash_of, 2) == [0, 1]
