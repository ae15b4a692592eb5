"""Ask a running server for its health and its models: the `helm test` of the chart.

Usage: check_server.py HOST PORT MODEL. The API key, where there is one, is in VLLM_API_KEY.
"""
# ruff: noqa: INP001, T201

from __future__ import annotations

import http.client
import json
import os
import sys


def get(host: str, port: int, path: str) -> bytes:
    """Return the body of an answer with status 200; any other one ends the script."""
    key = os.environ.get("VLLM_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    # Not urllib: that would ask a proxy which the environment names.
    connection = http.client.HTTPConnection(host, port, timeout=30)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    body = answer.read()
    if answer.status != http.client.OK:
        sys.exit(f"{path}: found status {answer.status} {body[:500]!r}, expected 200")
    return body


def main() -> None:
    """Exit with an error message unless HOST is healthy and lists MODEL."""
    host, port, model = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    get(host, port, "/health")
    names = [card["id"] for card in json.loads(get(host, port, "/v1/models"))["data"]]
    if model not in names:
        sys.exit(f"/v1/models: found {names}, expected {model!r} among them")
    print(f"{host}:{port} is healthy and serves {', '.join(names)}")


if __name__ == "__main__":
    main()
