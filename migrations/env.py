"""Runs the migrations on the connection that `shared.schema` hands over."""

from __future__ import annotations

from alembic import context

from shared.tables import Base

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=Base.metadata,
    render_as_batch=True,
)
context.run_migrations()
