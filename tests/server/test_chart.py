from __future__ import annotations

from pathlib import Path

from PIL import Image

from liveprune.server.chart import save_chart


def test_the_chart_is_a_png_of_a_readable_size(tmp_path: Path) -> None:
    models = {"full": (4.7, {"a": 1.0, "b": 0.9}), "small": (2.4, {"a": 1.0, "b": 0.1})}
    save_chart(tmp_path / "c.png", models, highlight="a")
    with Image.open(tmp_path / "c.png") as image:
        assert image.format == "PNG"
        assert image.width > 600
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 20
