import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.cost import cost
from research.layers import conv
from research.layers.conv import Conv, convolve, max_pool


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("shape", [(2, 6, 6, 3), (2, 7, 11, 3)])
def test_max_pool_equals_reduce_window(size, shape):
    x = jnp.asarray(np.random.RandomState(0).randn(*shape), jnp.float32)

    def window(x):
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, size, size, 1), (1, size, size, 1), "VALID")

    @jax.jit
    def outputs_and_gradients(x):
        return [jax.value_and_grad(lambda x, f=f: jnp.square(f(x)).sum())(x) for f in (lambda x: max_pool(x, size), window)]

    got, want = outputs_and_gradients(x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, want)


@pytest.mark.parametrize(("window", "winner"), [([[1, 1], [1, 1]], [[1, 0], [0, 0]]), ([[0, 1], [1, 1]], [[0, 1], [0, 0]])])
def test_the_first_of_equal_maxima_takes_the_gradient(window, winner):
    x, want = (jnp.asarray(values, jnp.float32).reshape(1, 2, 2, 1) for values in (window, winner))
    np.testing.assert_array_equal(jax.jit(jax.grad(lambda x: max_pool(x, 2).sum()))(x), want)
    np.testing.assert_array_equal(jax.jit(jax.jacfwd(lambda x: max_pool(x, 2).sum()))(x), want)


@pytest.mark.parametrize("outer", [jax.jacfwd, jax.jacrev])
def test_the_gradient_of_a_gradient_goes_there_too(outer):
    square = jax.grad(lambda x: jnp.square(max_pool(x, 2)).sum())
    curvature = jax.jit(outer(square))(jnp.ones((1, 2, 2, 1))).reshape(4, 4)
    np.testing.assert_array_equal(curvature, np.diag([2.0, 0, 0, 0]))


def test_the_largest_of_a_window_with_nan_is_nan():
    windows = jnp.asarray([[1, jnp.nan, 2, 3], [jnp.nan, 1, 2, 3], [1, 2, 3, jnp.nan]], jnp.float32).reshape(3, 2, 2, 1)
    assert np.isnan(max_pool(windows, 2)).all()
    slopes = jax.jit(jax.grad(lambda x: max_pool(x, 2).sum()))(windows)
    np.testing.assert_array_equal(slopes, np.isnan(windows))


@pytest.mark.parametrize(("padding", "side"), [("VALID", 4), ("SAME", 6)])
def test_conv_shape_and_glorot_start(padding, side):
    y, variables = Conv(32, 3, padding).init_with_output(jax.random.key(0), jnp.ones((2, 6, 6, 16)))
    assert y.shape == (2, side, side, 32)
    kernel = np.asarray(variables["params"]["kernel"])
    limit = (6 / (9 * 16 + 9 * 32)) ** 0.5
    assert kernel.shape == (3, 3, 16, 32)
    assert 0.98 * limit < abs(kernel).max() <= limit
    assert not np.any(variables["params"]["bias"])


def test_conv_is_a_sum_over_its_window():
    module, x = Conv(2, 3), jnp.asarray(np.random.RandomState(0).randn(1, 5, 5, 3), jnp.float32)
    y, variables = jax.jit(module.init_with_output)(jax.random.key(1), x)
    np.testing.assert_allclose(y[0, 1, 2], np.einsum("yxc,yxcd->d", x[0, 1:4, 2:5], variables["params"]["kernel"]), atol=1e-5)


AROUND = {"VALID": ((0, 0), (0, 0)), "SAME": ((1, 1), (1, 1)), "uneven": ((0, 1), (2, 1))}


@pytest.mark.parametrize("columns", [conv.COLUMNS, 1], ids=["batch at once", "image by image"])
@pytest.mark.parametrize("padding", AROUND)
@pytest.mark.parametrize(("sides", "strides", "channels"), [((3, 3), (1, 1), 2), ((3, 3), (2, 2), 2), ((1, 1), (2, 2), 2), ((4, 3), (1, 2), 1)])
def test_convolve_has_the_values_and_gradients_of_xla(sides, strides, channels, padding, columns, monkeypatch):
    monkeypatch.setattr(conv, "COLUMNS", columns)
    random = np.random.RandomState(0)
    x, kernel = (jnp.asarray(random.randn(*shape), jnp.float32) for shape in ((4, 7, 9, channels), (*sides, channels, 5)))

    def plain(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, strides, AROUND[padding], dimension_numbers=("NHWC", "HWIO", "NHWC"))

    slope = jnp.asarray(random.randn(*jax.eval_shape(plain, x, kernel).shape), jnp.float32)

    @jax.jit
    def value_and_gradients(x, kernel):
        values_and_backs = [jax.vjp(form, x, kernel) for form in (lambda x, kernel: convolve(x, kernel, strides, AROUND[padding]), plain)]
        return [(value, back(slope)) for value, back in values_and_backs]

    got, want = value_and_gradients(x, kernel)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


@pytest.fixture
def always_tiles(monkeypatch):
    for name in ("SAVED", "CHANNELS", "PRODUCT", "ROWS"):
        monkeypatch.setattr(conv, name, 0)


def products(function, *args):
    """The shapes that matrices are multiplied to."""
    text = str(jax.make_jaxpr(function)(*args))
    return [line.split(" = ")[0].split(":")[1].strip() for line in text.splitlines() if "dot_general[" in line]


@pytest.mark.parametrize("at_once", [4, 1], ids=["batch at once", "image by image"])
@pytest.mark.parametrize("padding", AROUND)
@pytest.mark.parametrize("shape", [(7, 9), (8, 6), (3, 4)])
def test_tiles_have_the_values_and_derivatives_of_xla(shape, padding, at_once, always_tiles, monkeypatch):
    random = np.random.RandomState(0)
    values, tangents = ([jnp.asarray(random.randn(*shape), jnp.float32) for shape in ((4, *shape, 3), (3, 3, 3, 5))] for _ in range(2))

    def plain(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), AROUND[padding], dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def tiles(x, kernel):
        return convolve(x, kernel, (1, 1), AROUND[padding])

    outputs = jax.eval_shape(plain, *values).shape
    slope = jnp.asarray(random.randn(*outputs), jnp.float32)
    monkeypatch.setattr(conv, "TILES", at_once * 16 * 4 * 3 * -(-outputs[1] // 2) * -(-outputs[2] // 2))
    assert products(tiles, *values) == 16 * [f"f32[{at_once * -(-outputs[1] // 2) * -(-outputs[2] // 2)},5]"]

    @jax.jit
    def both():
        return [(*jax.jvp(form, values, tangents), jax.vjp(form, *values)[1](slope)) for form in (tiles, plain)]

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), *both())


@pytest.mark.parametrize(
    ("shape", "channels", "strides", "dtype", "pay"),
    [
        ((32, 32, 32, 64), 64, (1, 1), "float32", True),
        ((32, 4, 4, 512), 512, (1, 1), "float32", True),
        ((1, 32, 32, 64), 64, (1, 1), "float32", False),  # the products are small
        ((8, 4, 4, 512), 512, (1, 1), "float32", False),  # the transformed kernel is larger than what it is multiplied with
        ((256, 4, 4, 512), 512, (1, 1), "float32", True),
        ((257, 4, 4, 512), 512, (1, 1), "float32", False),  # no piece but a single image
        ((263, 8, 8, 256), 256, (1, 1), "float32", True),
        ((32, 5, 5, 512), 512, (1, 1), "float32", False),  # tiles of 6 x 6 for outputs of 5 x 5
        ((32, 32, 32, 16), 64, (1, 1), "float32", False),
        ((32, 32, 32, 64), 64, (2, 2), "float32", False),
        ((32, 32, 32, 64), 64, (1, 1), "bfloat16", False),
    ],
)
def test_tiles_are_taken_where_they_are_faster(shape, channels, strides, dtype, pay):
    x, kernel = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct((3, 3, shape[-1], channels), dtype)
    found = products(lambda x, kernel: convolve(x, kernel, strides, ((1, 1), (1, 1))), x, kernel)
    assert (len(found) == 16) == pay


def test_tiles_are_computed_again_for_the_gradient(always_tiles):
    x, kernel = jnp.ones((2, 6, 6, 2)), jnp.ones((3, 3, 2, 4))
    kept = jax.eval_shape(lambda x, kernel: jax.vjp(lambda *a: convolve(*a, (1, 1), ((1, 1), (1, 1))), x, kernel)[1], x, kernel)
    assert sum(leaf.size for leaf in jax.tree.leaves(kept)) <= x.size + 16 * 2 * 4 + 36  # and not the tiles, 16 x 9 x 2 numbers of each image


def test_a_convolution_counts_in_full_however_it_is_computed():
    x, kernel = jax.ShapeDtypeStruct((256, 8, 8, 64), "float32"), jax.ShapeDtypeStruct((3, 3, 64, 64), "float32")

    @jax.jit  # what it was traced to before, for another purpose, must not be counted
    def form(x, kernel):
        return convolve(x, kernel, (1, 1), ((1, 1), (1, 1)))

    assert len(products(form, x, kernel)) == 16
    formula = 2 * 256 * 8 * 8 * 64 * 9 * 64
    assert cost(form, x, kernel) == (formula, True)
    assert cost(form, x, kernel, as_written=True) == (formula * 16 // 36, True)
    assert len(products(form, x, kernel)) == 16


@pytest.mark.parametrize("channels", [1, 3])
def test_in_bfloat16_a_sum_is_rounded_once(channels):
    random = np.random.RandomState(0)
    x, kernel = (jnp.asarray(random.randn(*shape), jnp.bfloat16) for shape in ((2, 9, 9, channels), (5, 5, channels, 8)))
    form = jax.jit(lambda x, kernel: convolve(x, kernel, (1, 1), ((0, 0), (0, 0))))
    want = np.asarray(form(x.astype(jnp.float32), kernel.astype(jnp.float32)))
    np.testing.assert_allclose(np.asarray(form(x, kernel), np.float32), want, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 2])
def test_gradients_of_pieces_are_added_in_float32(channels, monkeypatch):
    monkeypatch.setattr(conv, "COLUMNS", 1)
    x, kernel = jnp.ones((4096, 3, 3, channels), jnp.bfloat16), jnp.zeros((3, 3, channels, 4), jnp.bfloat16)
    slope = jax.jit(jax.grad(lambda kernel: convolve(x, kernel, (1, 1), ((0, 0), (0, 0))).astype(jnp.float32).sum()))(kernel)
    np.testing.assert_array_equal(np.asarray(slope, np.float32), np.full(kernel.shape, 4096.0))  # four rows a piece, and in bfloat16 1024 + 4 is 1024


@pytest.mark.parametrize("columns", [conv.COLUMNS, 1], ids=["batch at once", "image by image"])
def test_convolve_of_several_channels_has_a_forward_derivative(columns, monkeypatch):
    monkeypatch.setattr(conv, "COLUMNS", columns)
    random = np.random.RandomState(0)
    values, tangents = ([jnp.asarray(random.randn(*shape), jnp.float32) for shape in ((4, 5, 5, 2), (3, 3, 2, 4))] for _ in range(2))

    def plain(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    forms = (lambda x, kernel: convolve(x, kernel, (1, 1), ((0, 0), (0, 0))), plain)
    got, want = jax.jit(lambda: [jax.jvp(form, values, tangents)[1] for form in forms])()
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_a_gradient_of_convolve_can_be_differentiated():
    random = np.random.RandomState(0)
    x, kernel = (jnp.asarray(random.randn(*shape), jnp.float32) for shape in ((2, 5, 5, 2), (3, 3, 2, 4)))

    def second(form):
        def slope(kernel):
            return jax.grad(lambda kernel: jnp.sum(jnp.tanh(form(x, kernel))))(kernel)

        return jax.jvp(slope, (kernel,), (jnp.ones_like(kernel),))[1], jax.grad(lambda kernel: slope(kernel).sum())(kernel)

    def plain(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    got, want = jax.jit(lambda: [second(form) for form in (lambda x, kernel: convolve(x, kernel, (1, 1), ((0, 0), (0, 0))), plain)])()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


@pytest.mark.parametrize(("rows", "at_once"), [(12, 4), (13, 1), (3, 3)])
def test_windows_of_a_large_batch_are_read_in_pieces(rows, at_once, monkeypatch):
    monkeypatch.setattr(conv, "COLUMNS", 5 * 6 * 6 * 9 * 2 * 4)  # bytes of the windows of five images of two channels
    x, module = jnp.ones((rows, 6, 6, 2)), Conv(4, 3, "SAME")
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    text = str(jax.make_jaxpr(jax.grad(lambda variables: jnp.sum(jnp.asarray(module.apply(variables, x)))))(variables))
    assert f"f32[{at_once * 36},18]" in text
    assert ("scan" in text) == (rows > at_once)


@pytest.mark.parametrize("tiles", [False, True])
def test_a_batch_on_several_devices_is_not_cut(tiles, request, monkeypatch):
    if tiles:
        request.getfixturevalue("always_tiles")
    monkeypatch.setattr(conv, "COLUMNS", 1)
    monkeypatch.setattr(conv, "TILES", 1)
    monkeypatch.setattr(conv, "layout", lambda: "any")
    x, kernel = jnp.ones((4, 6, 6, 2)), jnp.ones((3, 3, 2, 4))
    text = str(jax.make_jaxpr(jax.grad(lambda kernel: convolve(x, kernel, (1, 1), ((0, 0), (0, 0))).sum()))(kernel))
    assert "scan" not in text
    assert "remat" in text or "checkpoint" in text
