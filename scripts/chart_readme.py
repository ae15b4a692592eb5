"""Write the table of values in the chart's README from the comments in its values.yaml.

A comment line ``# -- TEXT`` documents the value on the next line. With ``--check`` nothing is
written, and a README that is out of date is an error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parent.parent / "helm" / "liveprune"
BEGIN = "<!-- values: written by scripts/chart_readme.py -->\n"
END = "<!-- end of values -->\n"


def rows(
    node: yaml.MappingNode, values: dict[str, Any], lines: list[str], prefix: str = ""
) -> Iterator[str]:
    """Yield one table row per documented value of NODE, a mapping of the file LINES.

    A mapping without a comment of its own is entered; any other value without one is an error.
    """
    for key, value in node.value:
        path, default = f"{prefix}{key.value}", values[key.value]
        above = lines[key.start_mark.line - 1].strip()
        if above.startswith("# -- "):
            yield f"| `{path}` | `{json.dumps(default)}` | {above[5:]} |\n"
        elif isinstance(value, yaml.MappingNode) and value.value:
            yield from rows(value, default, lines, f"{path}.")
        else:
            sys.exit(f"values.yaml: {path} has no '# -- TEXT' comment on the line above it")


def readme(old: str, values_yaml: str) -> str:
    """Return the README text OLD with its table rebuilt from the text of values.yaml."""
    before, _, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        sys.exit(f"README.md: expected the lines {BEGIN!r} and {END!r}, in this order")
    root = yaml.compose(values_yaml)
    if not isinstance(root, yaml.MappingNode):
        sys.exit("values.yaml: expected a mapping")
    table = "".join(rows(root, yaml.safe_load(values_yaml), values_yaml.splitlines()))
    return f"{before}{BEGIN}\n| value | default | meaning |\n|---|---|---|\n{table}\n{END}{after}"


def main() -> None:
    path = CHART / "README.md"
    old = path.read_text()
    new = readme(old, (CHART / "values.yaml").read_text())
    if "--check" not in sys.argv[1:]:
        path.write_text(new)
    elif new != old:
        sys.exit(f"{path} is out of date: run python scripts/chart_readme.py")


if __name__ == "__main__":
    main()
