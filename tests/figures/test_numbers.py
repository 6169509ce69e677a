import pytest

from research.figures.numbers import short


@pytest.mark.parametrize(("value", "text"), [(0.1234, "0.123"), (999.4, "999"), (999.9, "1 k"), (1234567, "1.23 M"), (2.5e9, "2.5 G"), (0, "0")])
def test_numbers_are_short(value, text):
    assert short(value) == text
