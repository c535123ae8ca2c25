"""Uploads, versions of a dataset's name, sizes of its images, datasets whose images were deleted

Revision: 0004; after: 0003; made on 2026-11-26 16:50:00.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("datasets", schema=None) as batch_op:
        batch_op.add_column(sa.Column("image_sizes", sa.JSON(none_as_null=True), nullable=True))
        batch_op.add_column(sa.Column("dropped_at", sa.BigInteger(), nullable=True))
    op.create_table(
        "dataset_versions",
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("dataset_id", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["dataset_id"],
            ["datasets.id"],
            name=op.f("fk_dataset_versions_dataset_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("name", "version", name=op.f("pk_dataset_versions")),
    )
    op.create_index(op.f("ix_dataset_versions_dataset_id"), "dataset_versions", ["dataset_id"])
    op.execute(
        sa.text(
            "INSERT INTO dataset_versions (name, version, dataset_id, created_at) "
            "SELECT name, row_number() OVER (PARTITION BY name ORDER BY created_at, id), "
            "id, created_at FROM datasets"
        )
    )
    op.create_table(
        "uploads",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("submitter", sa.String(length=64), nullable=False),
        sa.Column("file_name", sa.String(length=200), nullable=False),
        sa.Column("num_bytes", sa.BigInteger(), nullable=True),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("touched_at", sa.BigInteger(), nullable=False),
        sa.Column("job_id", sa.String(length=64), nullable=True),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("fk_uploads_job_id"), ondelete="SET NULL"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_uploads")),
    )
    op.create_index(op.f("ix_uploads_job_id"), "uploads", ["job_id"])
    op.create_index(op.f("ix_uploads_submitter"), "uploads", ["submitter"])


def downgrade() -> None:
    op.drop_table("uploads")
    op.drop_table("dataset_versions")
    for name in ("dropped_at", "image_sizes"):
        op.drop_column("datasets", name)
