"""Cost over context: what is measured and what the formula says are both there."""

from research.figures import style
from research.figures.scaling import over_context


def test_both_lines_are_drawn(tmp_path, pixels_of, size_of):
    names = ("ms_per_step", "formula_ms", "bytes_per_token", "kept_per_token")
    points = [{"context": context, **{name: float(context) * (i + 1) for i, name in enumerate(names)}} for context in (512, 1024, 2048)]
    over_context(points, tmp_path / "figure.png", title="8,192 tokens")
    assert size_of(tmp_path / "figure.png")[0] > 1000
    assert pixels_of(tmp_path / "figure.png", style.BLUE) > 500
    assert pixels_of(tmp_path / "figure.png", style.ORANGE) > 300
    over_context(points[:1], tmp_path / "one.png")
    assert pixels_of(tmp_path / "one.png", style.BLUE) > 50
