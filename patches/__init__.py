"""The vLLM plugin: the only place that touches vLLM internals."""
