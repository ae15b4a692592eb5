"""What a server, its jobs and its replicas remember: one database, and plan files beside it."""
