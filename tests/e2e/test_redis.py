"""Redis is quick to tell and never needed: what it forgets is in the database."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from skipline.schemas import EndEvent, MetricEvent
from tests.e2e.conftest import Service, bring_in, tiny_spec, wait_for
from tests.soak.servers import Redis

EPOCHS = 8
"""48 steps."""


@pytest.mark.parametrize("stack", ["postgresql+redis"], indirect=True)
def test_metrics_are_complete_though_redis_restarts_empty_during_training(
    service: Service, own_redis: Redis, stripes: Path
) -> None:
    service.stop()
    service.environment["SKIPLINE_BROKER_URL"] = own_redis.url
    service.start()
    with service.client() as client:
        bring_in(client, stripes)
        job = client.submit(tiny_spec(epochs=EPOCHS))
        seen: list[MetricEvent] = []
        ends: list[EndEvent] = []

        def listen() -> None:
            with service.client() as own:
                for event in own.stream_metrics(job.id):
                    assert isinstance(event, MetricEvent | EndEvent), "nothing was interrupted"
                    (seen if isinstance(event, MetricEvent) else ends).append(event)  # type: ignore[arg-type]

        listener = threading.Thread(target=listen)
        listener.start()
        wait_for(lambda: len(seen) >= 4, "first points")
        own_redis.kill()
        num_seen = len(seen)
        wait_for(lambda: len(seen) > num_seen, "points without Redis")
        own_redis.start()
        ended = client.wait(job.id)
        listener.join(30)
        assert not listener.is_alive()
        assert (ended.status, ended.attempt) == ("succeeded", 1), ended.error
        assert [end.status for end in ends] == ["succeeded"]
        steps = [event.step for event in seen if event.name == "train_loss"]
        assert steps == list(range(2, 6 * EPOCHS + 1, 2))
        stored = client.metrics(job.id).series
        assert {(event.name, event.step): event.value for event in seen} == {
            (name, point.step): point.value for name, points in stored.items() for point in points
        }
