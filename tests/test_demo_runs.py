"""The demonstrations' runs in processes: outcomes in order, errors of people, a process that is killed."""

import multiprocessing
import os
import signal
import time

import pytest
import torch

from distinit_plugin.demos.runs import Runs
from distinit_plugin.errors import UserError
from distinit_plugin.video.isolated import run_isolated


def late_first(item, folder, options):
    time.sleep(0.2 if item == 0 else 0.0)
    return item, os.getpid(), options["RUNNER.NUM_THREADS"]


def fails_at_two(item, folder, options):
    if item == 2:
        raise UserError("two is not allowed")
    return item


def dies_at_two(item, folder, options):
    if item == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_outcomes_come_in_order_from_other_processes(tmp_path):
    outcomes = list(Runs(tmp_path, processes=2).spread(late_first, range(4)))
    assert [item for item, _, _ in outcomes] == [0, 1, 2, 3]
    assert os.getpid() not in {process for _, process, _ in outcomes}
    assert {threads for _, _, threads in outcomes} == {1}


@pytest.mark.parametrize(
    ("do", "words"), [(fails_at_two, "two is not allowed"), (dies_at_two, r"process of a run crashed \(SIGKILL\)")]
)
def test_what_ends_a_run_is_told_and_no_process_is_left(tmp_path, do, words):
    outcomes = Runs(tmp_path, processes=2).spread(do, range(4))
    with pytest.raises(UserError, match=words):
        list(outcomes)
    assert multiprocessing.active_children() == []


def shared_out(_):
    return float(torch.ones(2000, 2000).exp().log().mean())


def shared_out_among_two(_):
    torch.set_num_threads(2)  # as a run with RUNNER.NUM_THREADS does
    return shared_out(_)


def test_processes_do_not_wait_for_threads_that_were_not_forked():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert shared_out(0) == pytest.approx(1.0)
        for do in (shared_out, shared_out_among_two):
            found = dict(run_isolated(do, [1, 2], num_workers=2, max_seconds=20))
            assert found == {1: pytest.approx(1.0), 2: pytest.approx(1.0)}
        assert torch.get_num_threads() == 2  # and this process still has its own
    finally:
        torch.set_num_threads(before)
