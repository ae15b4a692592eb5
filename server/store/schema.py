"""The tables. A change here needs a revision in ``migrations/versions``.

Times are seconds since 1970. Everything belongs to one base model, named by its fingerprint, so
that several models, and several replicas of one, share a database.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
)

metadata = MetaData()
_NUMBER = BigInteger().with_variant(Integer, "sqlite")  # SQLite counts up INTEGER keys only

servers = Table(
    "servers",
    metadata,
    Column("model", String(64), nullable=False),
    Column("replica", String(255), nullable=False),
    Column("state", JSON, nullable=False),
    Column("updated", Float, nullable=False),
    PrimaryKeyConstraint("model", "replica"),
)
"""What each replica serves, to come back to after a restart."""

variants = Table(
    "variants",
    metadata,
    Column("model", String(64), nullable=False),
    Column("tag", String(255), nullable=False),
    Column("digest", String(64), nullable=False),
    Column("lineage", JSON, nullable=False),
    Column("job", String(32)),
    Column("created", Float, nullable=False),
    PrimaryKeyConstraint("model", "tag"),
)
"""Known to all replicas; the plan is a file named after its digest."""

plans = Table(
    "plans",
    metadata,
    Column("model", String(64), nullable=False),
    Column("digest", String(64), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("created", Float, nullable=False),
    PrimaryKeyConstraint("model", "digest"),
)
"""Files that are complete."""

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("model", String(64), nullable=False),
    Column("request", JSON, nullable=False),
    Column("state", String(16), nullable=False),
    Column("created", Float, nullable=False),
    Column("started", Float),
    Column("finished", Float),
    Column("owner", String(255)),
    Column("lease_until", Float),
    Column("attempt", Integer, nullable=False, default=0),
    Column("cancel_asked", Boolean, nullable=False, default=False),
    Column("progress", JSON, nullable=False),
    Column("best", JSON),
    Column("cost", JSON, nullable=False),
    Column("error", Text, nullable=False, default=""),
    Column("result", JSON),
    Index("jobs_by_state", "model", "state", "created"),
)
"""Background pruning runs; whoever holds the lease works on one."""

evaluations = Table(
    "evaluations",
    metadata,
    Column("id", _NUMBER, primary_key=True, autoincrement=True),
    Column("model", String(64), nullable=False),
    Column("job", String(32)),
    Column("digest", String(64)),
    Column("name", String(255), nullable=False),
    Column("scores", JSON, nullable=False),
    Column("created", Float, nullable=False),
    Index("evaluations_by_plan", "model", "digest"),
    Index("evaluations_by_job", "job"),
)
"""What plans scored; without a digest it was the full model."""

swaps = Table(
    "swaps",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("model", String(64), nullable=False),
    Column("replica", String(255), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("variant", String(512), nullable=False),
    Column("state", String(16), nullable=False),
    Column("error", Text, nullable=False),
    Column("details", JSON, nullable=False),
    Column("created", Float, nullable=False),
    Column("finished", Float, nullable=False),
    Index("swaps_by_time", "model", "created"),
)
"""Operations on variants that have ended."""

audit = Table(
    "audit",
    metadata,
    Column("id", _NUMBER, primary_key=True, autoincrement=True),
    Column("model", String(64), nullable=False),
    Column("replica", String(255), nullable=False),
    Column("change", String(64), nullable=False),
    Column("event", String(16), nullable=False),
    Column("time", Float, nullable=False),
    Column("content", JSON, nullable=False),
    Index("audit_by_time", "model", "time"),
)
"""Two rows for each change that was asked for over the admin API: ``asked``, then ``answered``."""

settings = Table(
    "settings",
    metadata,
    Column("model", String(64), nullable=False),
    Column("key", String(64), nullable=False),
    Column("value", JSON, nullable=False),
    Column("updated", Float, nullable=False),
    PrimaryKeyConstraint("model", "key"),
)
"""Switches that all replicas heed."""
