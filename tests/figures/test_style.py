"""What every figure shares: text that cannot break it, and files that appear where they should."""

import pytest
from matplotlib.figure import Figure

from research.core.errors import ResearchError
from research.figures import style


def test_plain_text_is_one_line_without_formulas_and_fits():
    assert style.plain("a\n b\tc") == "a b c"
    assert style.plain("$x$") == r"\$x\$"
    assert style.plain("0123456789", 5) == "01…89"
    assert style.plain("0123456789", 4) == "01…9"
    assert style.plain("0123456789", 10) == "0123456789"
    assert style.plain(7) == "7"


def test_an_unbalanced_formula_and_a_missing_glyph_are_drawn(tmp_path, size_of):
    figure = style.new(4, 2, r"$\frac{1 and $ 猫")
    style.tidy(figure.subplots(), x="$", y=r"\undefined$$", note="\x00")
    style.save(figure, tmp_path / "a folder" / "żółw.png")
    assert size_of(tmp_path / "a folder" / "żółw.png") == (600, 300)


def test_a_path_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResearchError, match=r"cannot write .*file/figure\.png"):
        style.save(Figure(), tmp_path / "file" / "figure.png")
