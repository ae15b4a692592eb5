"""Run by Alembic: migrate over the connection that ``database`` hands in, in its transaction."""

from __future__ import annotations

from alembic import context

from liveprune.server.store.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
