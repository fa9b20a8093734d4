"""Threads that share work out: all of it is done, and failures come out."""

from __future__ import annotations

import threading

import pytest

from asyncagent.crew import Crew

WATCHDOG_S = 30


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("num_items", [0, 1, 2, 50])
def test_every_item_once(num_threads: int, num_items: int) -> None:
    """However many threads there are, each item is taken once, and a crew can be used again."""
    crew = Crew("crew", num_threads, lambda: None)
    for _ in range(3):
        done: list[int] = []
        crew.share(done.append, range(num_items))
        assert sorted(done) == list(range(num_items))
    crew.close()


def test_items_are_worked_on_at_the_same_time() -> None:
    """Three items that wait for each other can only end on three threads."""
    prepared: list[str] = []
    crew = Crew("crew", 3, lambda: prepared.append(threading.current_thread().name))
    barrier = threading.Barrier(3, timeout=WATCHDOG_S)
    names: list[str] = []

    def meet(_: int) -> None:
        barrier.wait()
        names.append(threading.current_thread().name)

    crew.share(meet, range(3))
    assert sorted(prepared) == ["crew-1", "crew-2"]
    assert set(names) == {threading.current_thread().name, "crew-1", "crew-2"}
    crew.close()
    crew.close()


def test_a_failure_comes_out_when_all_have_ended() -> None:
    """The first failure is raised, the rest is left out, and nobody still works afterwards."""
    crew = Crew("crew", 2, lambda: None)
    together = threading.Barrier(2, timeout=WATCHDOG_S)
    failed, done = threading.Event(), []

    def work(item: int) -> None:
        if item < 2:
            together.wait()
        if item == 0:
            failed.set()
            raise RuntimeError("broken")
        assert failed.wait(WATCHDOG_S)
        done.append(item)

    with pytest.raises(RuntimeError, match="broken"):
        crew.share(work, range(1000))
    assert 1 in done
    assert len(done) < 999
    crew.close()


@pytest.mark.parametrize("error", [ValueError("no such setting"), SystemExit(0)])
def test_a_helper_that_cannot_prepare_is_no_silent_one(error: BaseException) -> None:
    """What ``prepare`` raises on a helper comes out of ``share``, which waits for nobody dead."""

    def prepare() -> None:
        raise error

    crew = Crew("crew", 3, prepare)
    with pytest.raises(type(error)) as caught:
        crew.share(lambda _: None, range(10))
    assert caught.value is error
    crew.close()
