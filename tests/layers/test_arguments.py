import pytest

from research.layers.arguments import one_of, per_block


def test_a_number_is_repeated_and_a_tuple_kept():
    assert per_block(8, 3, "width") == (8, 8, 8)
    assert per_block((8, 4, 2), 3, "width") == (8, 4, 2)


@pytest.mark.parametrize("value", [(8, 4), 0, (8, 0, 8)])
def test_sizes_that_do_not_fit_are_refused_by_name(value):
    with pytest.raises(ValueError, match="width="):
        per_block(value, 3, "width")


def test_the_least_size_can_be_zero():
    assert per_block((8, 0, 8), 3, "hidden", least=0) == (8, 0, 8)
    with pytest.raises(ValueError, match="hidden=-1 must be at least 0"):
        per_block(-1, 3, "hidden", least=0)


def test_a_choice_is_kept_and_a_typo_names_the_nearest():
    assert one_of("same", ("same", "valid"), "padding") == "same"
    with pytest.raises(ValueError, match="padding='smae' is unknown; did you mean 'same'"):
        one_of("smae", ("same", "valid"), "padding")
