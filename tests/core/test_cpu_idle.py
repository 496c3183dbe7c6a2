"""CPUs are kept busy during a block only, by threads of the lowest priority."""

import os
import sys
import threading
import time

import pytest

from gptjax.core import cpu_idle

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="uses Linux's scheduler")


def waiting(count):
    """Returns True once that many threads of this process have the lowest priority."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        try:
            policies = [os.sched_getscheduler(int(thread)) for thread in os.listdir("/proc/self/task")]
        except ProcessLookupError:
            continue
        if policies.count(os.SCHED_IDLE) == count:
            return True
        time.sleep(0.01)
    return False


def test_there_is_a_waiting_thread_a_processor_for_the_block_alone(monkeypatch):
    monkeypatch.setenv("GPTJAX_WAKEFUL", "1")
    before = threading.active_count()
    with cpu_idle.keep_awake():
        assert waiting(len(os.sched_getaffinity(0)))
        start, until = time.process_time(), time.monotonic() + 60  # a busy machine leaves them little
        while time.process_time() - start < 0.1 and time.monotonic() < until:
            time.sleep(0.1)
        assert time.process_time() - start >= 0.1, "they wait actively"
    assert threading.active_count() == before and waiting(0)


def test_an_error_in_the_block_ends_them(monkeypatch):
    monkeypatch.setenv("GPTJAX_WAKEFUL", "1")
    with pytest.raises(ValueError, match="this"), cpu_idle.keep_awake():
        raise ValueError("this")
    assert waiting(0)


@pytest.mark.parametrize("variable, wanted", [("0", True), ("1", False)])
def test_it_can_be_turned_off(monkeypatch, variable, wanted):
    monkeypatch.setenv("GPTJAX_WAKEFUL", variable)
    with cpu_idle.keep_awake(wanted):
        time.sleep(0.05)
        assert waiting(0)


@pytest.mark.parametrize("virtual, limit, expected", [(True, False, True), (True, True, False), (False, False, False)])
def test_it_is_for_virtual_machines_without_a_limit(monkeypatch, virtual, limit, expected):
    monkeypatch.delenv("GPTJAX_WAKEFUL", raising=False)
    monkeypatch.setattr(cpu_idle, "_is_virtual", lambda: virtual)
    monkeypatch.setattr(cpu_idle, "_has_quota", lambda: limit)
    assert cpu_idle.is_enabled() == expected
