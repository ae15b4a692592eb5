"""Random bytes that all replicas of a database share, and nobody else sees."""

from __future__ import annotations

import secrets

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from liveprune.server.store import schema
from liveprune.server.store.database import exclusive, transaction

SALT = "experiments"
BYTES = 32
_TABLE = schema.secrets


def shared_secret(engine: Engine, name: str = SALT) -> bytes:
    """The secret of this name: 32 bytes, drawn by whoever asks first.

    Raises:
        StoreError: the database failed.
    """
    query = sa.select(_TABLE.c.value).where(_TABLE.c.name == name)
    with transaction(engine) as connection:
        exclusive(connection, f"secret {name}")
        found = connection.scalar(query)
        if found is None:
            found = secrets.token_bytes(BYTES)
            connection.execute(_TABLE.insert().values(name=name, value=found))
        return bytes(found)
