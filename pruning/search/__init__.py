"""EEP: an evolutionary search for prunings and merges, scored by an engine (docs/methods.md)."""
