"""Experiments: what is split, who gets what, what was measured, and what follows from it.

Pure modules: no clock, no file, no vLLM. Routes, store and middleware call them.
"""
