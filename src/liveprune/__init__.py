"""Liveprune: serve a sparse mixture-of-experts model and prune it while it serves."""
