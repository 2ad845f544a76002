"""A run stops by itself before its memory is gone."""

from pipeline.stop import Stop
from pipeline.watch import Watch

GIB = 1 << 30


def watch_over(stop: Stop, left: list[int | None], said: list[str]) -> Watch:
    """A watch that sees these bytes left, one after the other; the first when it is made."""
    return Watch(stop, stall_timeout_s=60, memory=lambda: left.pop(0), say=said.append)


def test_low_memory_stops_the_run_at_once(monkeypatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr("pipeline.watch.time.monotonic", lambda: 1000.0 + next(clock))
    stop, said = Stop(), list[str]()
    watch = watch_over(stop, [64 * GIB, GIB, 255 << 20, 100 << 20], said)
    watch.beat()
    assert not stop.requested
    watch.beat()
    assert stop.requested and stop.overdue and stop.ended == "low_memory"
    watch.beat()
    assert len(said) == 1 and "255 MiB" in said[0]


def test_a_small_machine_has_a_small_reserve_and_an_unknown_one_none(monkeypatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr("pipeline.watch.time.monotonic", lambda: 1000.0 + next(clock))
    stop = Stop()
    small = watch_over(stop, [GIB, GIB // 40, GIB // 60], [])
    small.beat()
    assert not stop.requested
    small.beat()
    assert stop.requested
    unknown = Stop()
    watch_over(unknown, [None, None], []).beat()
    assert not unknown.requested
