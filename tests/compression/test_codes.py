"""Numbers of a few bits against numpy: the codes, the bound on the error, and what the formats stand for."""

import ml_dtypes
import numpy as np
import pytest

from research.compression.codes import FORMATS, INTEGERS, NORMAL_FLOAT, decode, encode, number_format, scales
from research.core.errors import ConfigError

WEIGHTS = np.random.RandomState(0).randn(96, 40).astype(np.float32) * np.exp(np.random.RandomState(1).randn(1, 40)).astype(np.float32)


def coded(name, grid="symmetric", group=None, weights=WEIGHTS):
    """(codes, scale spread over the inputs, what they stand for) as numpy arrays."""
    form = number_format(name, grid)
    scale = scales(weights, form, group)
    codes = encode(weights, scale, form)
    return np.asarray(codes), np.repeat(np.asarray(scale), len(weights) // len(scale), axis=0), np.asarray(decode(codes, scale, form))


def largest(group, weights=WEIGHTS):
    """The largest absolute value of each weight's group."""
    groups = np.abs(weights).reshape(-1, group or len(weights), weights.shape[1]).max(1)
    return np.repeat(groups, len(weights) // len(groups), axis=0)


@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("grid", ["symmetric", "full"])
@pytest.mark.parametrize("name", INTEGERS)
def test_integers_are_numpys_rounding_and_half_a_scale_off_at_most(name, grid, group):
    bits = INTEGERS[name]
    top = 2 ** (bits - 1) - 1 if grid == "symmetric" else (2**bits - 1) / 2
    scale = largest(group) * np.float32(1 / top)
    expected = np.clip(np.round(WEIGHTS * (1 / scale)), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    codes, found, decoded = coded(name, grid, group)
    np.testing.assert_array_equal(found, scale)
    np.testing.assert_array_equal(codes.astype(np.int32), expected)
    np.testing.assert_array_equal(decoded, expected.astype(np.float32) * scale)
    assert (np.abs(WEIGHTS - decoded) <= scale / 2 * (1 + 1e-4)).all()
    assert len(np.unique(codes.astype(np.int32))) == (2**bits if grid == "full" else 2**bits - 1) or bits == 8


def test_halves_are_rounded_to_even():
    weights = np.array([[127.0], [0.5], [1.5], [2.5], [-0.5], [-1.5]], np.float32)
    codes, _, _ = coded("int8", weights=weights)
    np.testing.assert_array_equal(codes[:, 0], [127, 0, 2, 2, 0, -2])


def test_eight_bit_floats_are_numpys_cast():
    scale = largest(32) * np.float32(1 / 448)
    codes, _, decoded = coded("fp8", group=32)
    expected = (WEIGHTS * (1 / scale)).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(codes.view(np.uint8), expected.view(np.uint8))
    np.testing.assert_array_equal(decoded, expected.astype(np.float32) * scale)


def test_normal_floats_are_the_nearest_of_sixteen_levels():
    units = WEIGHTS * (1 / largest(32))
    levels = np.array(NORMAL_FLOAT, np.float32)
    expected = levels[np.abs(units[..., None] - levels).argmin(-1)]
    codes, scale, decoded = coded("nf4", group=32)
    np.testing.assert_array_equal(decoded, expected * scale)
    assert len(np.unique(codes.astype(np.int32))) == 16
    assert (decoded[codes.astype(np.int32) == 0] == 0).all()


def test_the_levels_are_quantiles_of_the_normal_distribution():
    from scipy.stats import norm

    low, high = (np.sort(-sign * norm.ppf(np.linspace(0.9677083, 0.5, count)[:-1])) for sign, count in ((1, 8), (-1, 9)))
    levels = np.sort(np.concatenate([low, [0.0], high]))
    np.testing.assert_allclose(NORMAL_FLOAT, levels / levels.max(), atol=1e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_are_exact_and_a_group_of_zeros_does_no_harm(name):
    weights = WEIGHTS.copy()
    weights[:32], weights[50] = 0, 0
    codes, scale, decoded = coded(name, group=32, weights=weights)
    assert not decoded[:32].any()
    assert not decoded[50].any()
    assert not codes[:32].astype(np.float32).any()  # counted as zeros by whoever counts them
    assert np.isfinite(scale).all()
    assert decoded[33:50].any()


def test_the_error_falls_with_bits_and_with_smaller_groups():
    def error(name, **how):
        return float(np.linalg.norm(coded(name, **how)[2] - WEIGHTS))

    assert error("int8") < error("int4") / 8 < error("int3") / 8 < error("int2") / 8
    assert error("int4", group=16) < error("int4", group=48) < error("int4")
    assert error("nf4") < error("int4")  # these weights are normal
    assert error("int8") < error("fp8") < error("int4")


def test_unknown_formats_are_refused():
    with pytest.raises(ConfigError, match=r"method\.format='int5' is unknown; did you mean 'int"):
        number_format("int5")
    with pytest.raises(ConfigError, match=r"method\.grid=full: only integers have one; method\.format=nf4 needs grid=symmetric"):
        number_format("nf4", "full")
