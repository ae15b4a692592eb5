"""What reports have in common: markup by construction, numbers as people read them, axes, pages."""
