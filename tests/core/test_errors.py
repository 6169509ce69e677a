import pytest

from research.core import errors


def test_exit_codes_are_the_documented_ones():
    codes = {cls.__name__: cls.exit_code for cls in [errors.ResearchError, *errors.ResearchError.__subclasses__()]}
    assert codes == {
        "ResearchError": 1,
        "DataError": 1,
        "ConfigError": 2,
        "DivergedError": 3,
        "CheckpointError": 4,
        "FolderInUseError": 5,
        "Interrupted": 75,
    }


@pytest.mark.parametrize(
    ("word", "choices", "hint"),
    [
        ("adm", ["adam", "sgd"], "; did you mean 'adam'?"),
        ("xyz", ["b", "a"], "; choose from: a, b"),
        ("xyz", [], ""),
        (7, [70, 5], "; did you mean '70'?"),
        ("xyz", [f"c{i:02}" for i in range(20)], "; choose from: " + ", ".join(f"c{i:02}" for i in range(12)) + ", …"),
    ],
)
def test_nearest(word, choices, hint):
    assert errors.nearest(word, choices) == hint
