"""Quality against bytes and speed: a grid of methods and budgets, measured side by side."""
