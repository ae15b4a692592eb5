"""Start vLLM's own OpenAI server in this process."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def run_vllm_server(arguments: Sequence[str]) -> None:
    """Run ``vllm serve`` with ``arguments``; returns when the server has stopped.

    Raises:
        SystemExit: as vLLM does, e.g. on bad flags.
    """
    from vllm.entrypoints.cli.main import main

    # vLLM parses sys.argv itself, and looks at it in several places.
    sys.argv = ["vllm", "serve", *arguments]
    main()
