"""Jobs by checkpoint: what was said of a model is found among all jobs

Revision: 0008; after: 0007; made on 2026-12-01 01:10:00.
"""

from __future__ import annotations

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index(op.f("ix_jobs_checkpoint_id"), "jobs", ["checkpoint_id"])


def downgrade() -> None:
    op.drop_index(op.f("ix_jobs_checkpoint_id"), "jobs")
