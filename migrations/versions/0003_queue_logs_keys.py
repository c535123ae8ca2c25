"""Priorities, jobs that wait for jobs, logs, idempotency keys, and what workers have

Revision: 0003; after: 0002; made on 2026-11-25 19:05:00.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.add_column(sa.Column("rank", sa.Integer(), server_default="0", nullable=False))
        batch_op.add_column(
            sa.Column("submitter", sa.String(length=64), server_default="", nullable=False)
        )
        batch_op.add_column(sa.Column("parent_id", sa.String(length=64), nullable=True))
        batch_op.add_column(sa.Column("waits_for", sa.String(length=64), nullable=True))
        batch_op.add_column(
            sa.Column("stop_requested", sa.Boolean(), server_default="0", nullable=False)
        )
        batch_op.add_column(sa.Column("worker_id", sa.String(length=64), nullable=True))
        batch_op.add_column(sa.Column("speed_key", sa.String(length=64), nullable=True))
        batch_op.add_column(sa.Column("num_images", sa.BigInteger(), nullable=True))
        batch_op.add_column(sa.Column("images_per_second", sa.Double(), nullable=True))
    op.execute(sa.text("UPDATE jobs SET device = 'any' WHERE kind = 'ingest'"))
    ready = sa.text("status = 'queued' AND waits_for IS NULL")
    op.create_index(
        "ix_jobs_ready",
        "jobs",
        ["rank", "created_at", "id", "speed_key", "num_images"],
        postgresql_where=ready,
        sqlite_where=ready,
    )
    op.create_index(op.f("ix_jobs_waits_for"), "jobs", ["waits_for"])
    op.create_index(op.f("ix_jobs_speed_key_finished_at"), "jobs", ["speed_key", "finished_at"])
    op.create_index(op.f("ix_checkpoints_key"), "checkpoints", ["key"])
    with op.batch_alter_table("attempts", schema=None) as batch_op:
        batch_op.add_column(sa.Column("gpus", sa.JSON(none_as_null=True), nullable=True))
    with op.batch_alter_table("workers", schema=None) as batch_op:
        batch_op.add_column(
            sa.Column("num_slots", sa.Integer(), server_default="1", nullable=False)
        )
        batch_op.add_column(sa.Column("devices", sa.JSON(none_as_null=True), nullable=True))
        batch_op.add_column(
            sa.Column("is_draining", sa.Boolean(), server_default="0", nullable=False)
        )
        batch_op.add_column(sa.Column("started_at", sa.BigInteger(), nullable=True))
    with op.batch_alter_table("metric_points", schema=None) as batch_op:
        batch_op.add_column(
            sa.Column("is_extreme", sa.Boolean(), server_default="0", nullable=False)
        )
    op.create_index(
        "ix_metric_points_extremes",
        "metric_points",
        ["job_id", "number"],
        postgresql_where=sa.text("is_extreme"),
        sqlite_where=sa.text("is_extreme = 1"),
    )
    op.create_table(
        "log_parts",
        sa.Column("job_id", sa.String(length=64), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id", "attempt"],
            ["attempts.job_id", "attempts.number"],
            name=op.f("fk_log_parts_job_id_attempt"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("job_id", "attempt", "number", name=op.f("pk_log_parts")),
    )
    op.create_table(
        "idempotency_keys",
        sa.Column("submitter", sa.String(length=64), nullable=False),
        sa.Column("key", sa.String(length=255), nullable=False),
        sa.Column("request_hash", sa.String(length=64), nullable=False),
        sa.Column("job_id", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("fk_idempotency_keys_job_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("submitter", "key", name=op.f("pk_idempotency_keys")),
    )
    op.create_index(op.f("ix_idempotency_keys_job_id"), "idempotency_keys", ["job_id"])


def downgrade() -> None:
    op.drop_table("idempotency_keys")
    op.drop_table("log_parts")
    op.drop_index("ix_metric_points_extremes", table_name="metric_points")
    op.drop_column("metric_points", "is_extreme")
    # SQLite's own statement: to copy the table, as a batch would, deletes what refers to it.
    for name in ("started_at", "is_draining", "devices", "num_slots"):
        op.drop_column("workers", name)
    op.drop_column("attempts", "gpus")
    op.drop_index(op.f("ix_checkpoints_key"), table_name="checkpoints")
    for name in (
        "ix_jobs_speed_key_finished_at",
        "ix_jobs_waits_for",
        "ix_jobs_ready",
    ):
        op.drop_index(name, table_name="jobs")
    op.execute(sa.text("UPDATE jobs SET device = 'auto' WHERE device = 'any'"))
    for name in (
        "images_per_second",
        "num_images",
        "speed_key",
        "worker_id",
        "stop_requested",
        "waits_for",
        "parent_id",
        "submitter",
        "rank",
    ):
        op.drop_column("jobs", name)
