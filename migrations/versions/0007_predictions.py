"""Predictions: the answers of a job of kind predict

Revision: 0007; after: 0006; made on 2026-11-27 16:40:00.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "predictions",
        sa.Column("job_id", sa.String(length=64), nullable=False),
        sa.Column("key", sa.String(length=255), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("fk_predictions_job_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_predictions")),
    )
    op.create_index(op.f("ix_predictions_key"), "predictions", ["key"])


def downgrade() -> None:
    op.drop_index(op.f("ix_predictions_key"), "predictions")
    op.drop_table("predictions")
