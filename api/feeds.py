"""What can be followed live: a job's metrics and its events, as they go over the wire."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi.sse import format_sse_event
from sqlalchemy.orm import Session

from api.streams import Feed
from shared import repository
from shared.repository import Head
from shared.tables import Event, MetricPoint
from skipline.schemas import MetricEvent, RewindEvent


class _Metrics(Feed[MetricPoint]):
    def last(self, head: Head) -> int:
        return head.last_point

    def rows_after(
        self, session: Session, cursors: Mapping[str, int], limit: int
    ) -> list[MetricPoint]:
        return repository.points_after(session, cursors, limit)

    def render(self, row: MetricPoint) -> bytes:
        event: MetricEvent | RewindEvent
        if row.name == repository.REWIND:
            event, kind = RewindEvent(step=row.step, attempt=row.attempt), "rewind"
        else:
            assert row.value is not None
            event, kind = (
                MetricEvent(
                    name=row.name,
                    step=row.step,
                    epoch=row.epoch,
                    value=row.value,
                    time=row.time,
                    attempt=row.attempt,
                ),
                "metric",
            )
        return format_sse_event(event=kind, data_str=event.model_dump_json(), id=str(row.number))


class _Events(Feed[Event]):
    def last(self, head: Head) -> int:
        return head.last_event

    def rows_after(self, session: Session, cursors: Mapping[str, int], limit: int) -> list[Event]:
        return repository.events_after(session, cursors, limit)

    def render(self, row: Event) -> bytes:
        data = repository.event_document(row).model_dump_json()
        return format_sse_event(event="event", data_str=data, id=str(row.number))


METRICS = _Metrics()
EVENTS = _Events()
