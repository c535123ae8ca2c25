"""The bell. A message says "there is work" and nothing else: which work, and whose turn it is, is
in the database, so a message that is lost, late or doubled changes nothing."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import structlog
from celery import Celery

from shared.settings import Settings

log = structlog.get_logger(__name__)

QUEUE = "skipline"
WORK = "skipline.work"
MAX_WAITING_MESSAGES = 64
"""Enough to wake every slot; more would only pile up while no worker runs."""


def make_celery(settings: Settings) -> Celery:
    """The Celery app that the API publishes with and the worker runs on."""
    app = Celery("skipline", broker=settings.broker)
    app.conf.update(
        task_default_queue=QUEUE,
        task_ignore_result=True,
        task_acks_late=False,
        task_serializer="json",
        accept_content=["json"],
        worker_prefetch_multiplier=1,
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options=_transport_options(settings),
        enable_utc=True,
    )
    return app


def _transport_options(settings: Settings) -> dict[str, Any]:
    if settings.broker_url is None:
        folder = settings.home_path / "broker"
        for name in ("messages", "control"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        return {
            "data_folder_in": str(folder / "messages"),
            "data_folder_out": str(folder / "messages"),
            "control_folder": str(folder / "control"),
            "polling_interval": 0.1,
        }
    return {"socket_timeout": 5, "socket_connect_timeout": 2, "socket_keepalive": True}


class Bell:
    """Rings for workers. Never raises: an idle worker looks by itself every other second.

    One thread rings at a time, over a connection that stays open; who asks meanwhile leaves it to
    that one to ring once more, so that a broker that hangs holds up a single thread.
    """

    def __init__(self, settings: Settings) -> None:
        self._app = make_celery(settings)
        self._ringing = threading.Lock()
        self._is_wanted = False
        self._connection: Any = None

    def ring(self) -> None:
        """Publishes one message, unless enough of them wait already."""
        self._is_wanted = True
        if not self._ringing.acquire(blocking=False):
            return
        try:
            while self._is_wanted:
                self._is_wanted = False
                self._ring()
        finally:
            self._ringing.release()

    def _ring(self) -> None:
        was_open = self._connection is not None
        try:
            self._publish()
        except Exception as error:
            self._hang_up()
            if was_open:  # It may have died since it was last used.
                self._is_wanted = True
            else:  # Whatever it is, the job is stored and will be found.
                log.warning("the bell could not be rung", error=type(error).__name__)

    def _publish(self) -> None:
        if self._connection is None:
            self._connection = self._app.connection_for_write()
            self._connection.ensure_connection(max_retries=1, timeout=2)
        if _num_waiting(self._app, self._connection) < MAX_WAITING_MESSAGES:
            self._app.send_task(WORK, connection=self._connection, retry=False)

    def _hang_up(self) -> None:
        connection, self._connection = self._connection, None
        with contextlib.suppress(Exception):
            connection.release()

    def check(self) -> None:
        """Raises `OSError` or kombu's `OperationalError` when the broker does not answer."""
        with self._app.connection_for_write() as connection:
            connection.ensure_connection(max_retries=1, timeout=2)

    def close(self) -> None:
        """Lets the connection go."""
        if self._connection is not None:
            self._hang_up()


def _num_waiting(app: Celery, connection: Any) -> int:
    queue = app.amqp.queues[QUEUE](connection.default_channel)
    return int(queue.queue_declare().message_count)
