"""``python -m liveprune.server`` is the ``liveprune`` command."""

from liveprune.server.cli import main

if __name__ == "__main__":
    main()
