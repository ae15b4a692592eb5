"""The serving layer: command line, HTTP, the demo."""
