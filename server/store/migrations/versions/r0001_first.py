"""The first tables."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """Make all tables."""
    op.create_table(
        "servers",
        sa.Column("model", sa.String(64), nullable=False),
        sa.Column("replica", sa.String(255), nullable=False),
        sa.Column("state", sa.JSON, nullable=False),
        sa.Column("updated", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("model", "replica"),
    )
    op.create_table(
        "variants",
        sa.Column("model", sa.String(64), nullable=False),
        sa.Column("tag", sa.String(255), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("lineage", sa.JSON, nullable=False),
        sa.Column("job", sa.String(32)),
        sa.Column("created", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("model", "tag"),
    )
    op.create_table(
        "plans",
        sa.Column("model", sa.String(64), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("model", "digest"),
    )
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("model", sa.String(64), nullable=False),
        sa.Column("request", sa.JSON, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("started", sa.Float),
        sa.Column("finished", sa.Float),
        sa.Column("owner", sa.String(255)),
        sa.Column("lease_until", sa.Float),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("cancel_asked", sa.Boolean, nullable=False),
        sa.Column("progress", sa.JSON, nullable=False),
        sa.Column("best", sa.JSON),
        sa.Column("cost", sa.JSON, nullable=False),
        sa.Column("error", sa.Text, nullable=False),
        sa.Column("result", sa.JSON),
    )
    op.create_index("jobs_by_state", "jobs", ["model", "state", "created"])
    op.create_table(
        "evaluations",
        sa.Column("id", _NUMBER, primary_key=True, autoincrement=True),
        sa.Column("model", sa.String(64), nullable=False),
        sa.Column("job", sa.String(32)),
        sa.Column("digest", sa.String(64)),
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("scores", sa.JSON, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
    )
    op.create_index("evaluations_by_plan", "evaluations", ["model", "digest"])
    op.create_index("evaluations_by_job", "evaluations", ["job"])
    op.create_table(
        "swaps",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("model", sa.String(64), nullable=False),
        sa.Column("replica", sa.String(255), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("variant", sa.String(512), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("error", sa.Text, nullable=False),
        sa.Column("details", sa.JSON, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("finished", sa.Float, nullable=False),
    )
    op.create_index("swaps_by_time", "swaps", ["model", "created"])
    op.create_table(
        "audit",
        sa.Column("id", _NUMBER, primary_key=True, autoincrement=True),
        sa.Column("model", sa.String(64), nullable=False),
        sa.Column("replica", sa.String(255), nullable=False),
        sa.Column("change", sa.String(64), nullable=False),
        sa.Column("event", sa.String(16), nullable=False),
        sa.Column("time", sa.Float, nullable=False),
        sa.Column("content", sa.JSON, nullable=False),
    )
    op.create_index("audit_by_time", "audit", ["model", "time"])
    op.create_table(
        "settings",
        sa.Column("model", sa.String(64), nullable=False),
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("value", sa.JSON, nullable=False),
        sa.Column("updated", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("model", "key"),
    )
