"""Plans, checkpoints, methods and calibration; never imports vLLM or the server."""
