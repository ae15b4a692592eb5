"""Calibration: rows of text, one observer pass over them, and the statistics it leaves."""
