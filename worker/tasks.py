"""The one task: the bell rang."""

from __future__ import annotations

from celery import Celery

from shared.dispatch import WORK
from worker.slots import Slots


def register(app: Celery, slots: Slots) -> None:
    """Makes `app` work when the bell rings."""

    @app.task(name=WORK)  # type: ignore[untyped-decorator]
    def work() -> None:
        slots.ring()
