"""Checkpoints: carrying plans out on them, checking and inspecting them."""
