"""Background pruning: requests, the worker process, and what supervises it (docs/jobs.md)."""
