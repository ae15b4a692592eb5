"""The tables. A change here needs a revision in ``migrations/versions``.

Times are seconds since 1970. Everything belongs to one base model, named by its fingerprint, so
that several models, and several replicas of one, share a database. What is ``PRIVATE`` belongs to
the database itself, and leaves it in no export or backup.
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
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
)

metadata = MetaData()
PRIVATE = "private"
"""Mark, in a table's ``info``."""
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

experiments = Table(
    "experiments",
    metadata,
    Column("model", String(64), nullable=False),
    Column("name", String(63), nullable=False),
    Column("definition", JSON, nullable=False),
    Column("state", String(16), nullable=False),
    Column("created", Float, nullable=False),
    Column("started", Float),
    Column("ended", Float),
    Column("reason", Text, nullable=False),
    Column("history", JSON, nullable=False),
    Column("last_action", Float),
    Column("mismatch_p", Float, nullable=False),
    Column("version", Integer, nullable=False),
    Column("request_key", String(255)),
    Column("owner", String(255)),
    Column("lease_until", Float),
    PrimaryKeyConstraint("model", "name"),
)
"""Experiments of all times: a name is never used again. Whoever holds the lease decides."""

measurements = Table(
    "measurements",
    metadata,
    Column("model", String(64), nullable=False),
    Column("experiment", String(63), nullable=False),
    Column("replica", String(255), nullable=False),
    Column("content", JSON, nullable=False),
    Column("updated", Float, nullable=False),
    PrimaryKeyConstraint("model", "experiment", "replica"),
)
"""All that a replica has measured of an experiment, written whole each time."""

decisions = Table(
    "decisions",
    metadata,
    Column("id", _NUMBER, primary_key=True, autoincrement=True),
    Column("model", String(64), nullable=False),
    Column("experiment", String(63), nullable=False),
    Column("time", Float, nullable=False),
    Column("record", JSON, nullable=False),
    Column("decision", JSON, nullable=False),
    Column("kept", Boolean, nullable=False),
    Index("decisions_by_experiment", "model", "experiment", "id"),
)
"""What was decided, and the numbers it follows from; those that say nothing new are thinned out."""

answers = Table(
    "answers",
    metadata,
    Column("model", String(64), nullable=False),
    Column("response_id", String(255), nullable=False),
    Column("experiment", String(63), nullable=False),
    Column("arm", String(63), nullable=False),
    Column("phase", Integer, nullable=False),
    Column("unit", String(16), nullable=False),
    Column("created", Float, nullable=False),
    PrimaryKeyConstraint("model", "response_id"),
    Index("answers_by_time", "model", "created"),
)
"""Which arm gave an answer, for a client's score of it; gone once it is scored, or old."""

promotions = Table(
    "promotions",
    metadata,
    Column("model", String(64), nullable=False),
    Column("experiment", String(63), nullable=False),
    Column("replica", String(255), nullable=False),
    Column("variant", String(255), nullable=False),
    Column("asked", Float, nullable=False),
    Column("done", Float),
    Column("error", Text, nullable=False),
    PrimaryKeyConstraint("model", "experiment", "replica"),
)
"""Replicas that swap to the winner of an experiment, each once."""

secrets = Table(
    "secrets",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("value", LargeBinary, nullable=False),
    info={PRIVATE: True},
)
"""Random bytes that all replicas share."""
