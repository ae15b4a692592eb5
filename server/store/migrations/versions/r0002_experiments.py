"""Experiments: what they are, what was measured and decided."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """Make the new tables."""
    op.create_table(
        "experiments",
        sa.Column("model", sa.String(64), nullable=False),
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("definition", sa.JSON, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("started", sa.Float),
        sa.Column("ended", sa.Float),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("history", sa.JSON, nullable=False),
        sa.Column("last_action", sa.Float),
        sa.Column("mismatch_p", sa.Float, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("request_key", sa.String(255)),
        sa.Column("owner", sa.String(255)),
        sa.Column("lease_until", sa.Float),
        sa.PrimaryKeyConstraint("model", "name"),
    )
    op.create_table(
        "measurements",
        sa.Column("model", sa.String(64), nullable=False),
        sa.Column("experiment", sa.String(63), nullable=False),
        sa.Column("replica", sa.String(255), nullable=False),
        sa.Column("content", sa.JSON, nullable=False),
        sa.Column("updated", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("model", "experiment", "replica"),
    )
    op.create_table(
        "decisions",
        sa.Column("id", _NUMBER, primary_key=True, autoincrement=True),
        sa.Column("model", sa.String(64), nullable=False),
        sa.Column("experiment", sa.String(63), nullable=False),
        sa.Column("time", sa.Float, nullable=False),
        sa.Column("record", sa.JSON, nullable=False),
        sa.Column("decision", sa.JSON, nullable=False),
        sa.Column("kept", sa.Boolean, nullable=False),
    )
    op.create_index("decisions_by_experiment", "decisions", ["model", "experiment", "id"])
    op.create_table(
        "answers",
        sa.Column("model", sa.String(64), nullable=False),
        sa.Column("response_id", sa.String(255), nullable=False),
        sa.Column("experiment", sa.String(63), nullable=False),
        sa.Column("arm", sa.String(63), nullable=False),
        sa.Column("phase", sa.Integer, nullable=False),
        sa.Column("unit", sa.String(16), nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("model", "response_id"),
    )
    op.create_index("answers_by_time", "answers", ["model", "created"])
    op.create_table(
        "promotions",
        sa.Column("model", sa.String(64), nullable=False),
        sa.Column("experiment", sa.String(63), nullable=False),
        sa.Column("replica", sa.String(255), nullable=False),
        sa.Column("variant", sa.String(255), nullable=False),
        sa.Column("asked", sa.Float, nullable=False),
        sa.Column("done", sa.Float),
        sa.Column("error", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("model", "experiment", "replica"),
    )
    op.create_table(
        "secrets",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("value", sa.LargeBinary, nullable=False),
    )
