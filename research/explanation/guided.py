"""Explanations of images by class activation maps, and by gradients that pass an activation only where they are positive."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from research.core.errors import ConfigError
from research.explanation.gradient import Gradient, vanishing
from research.explanation.model import INPUT, Examples, Model
from research.explanation.result import Attribution


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuidedBackpropagation(Gradient):
    """The gradient where negative slopes are stopped at every activation.

    It draws edges well, but it can look alike whatever the weights: judge it (Adebayo et al. 2018).

    Source:  Springenberg et al. 2015, for ReLU; here the slope is cut at zero before any activation's own derivative.
    """

    def fits(self, model: Model) -> str | None:
        """Whether the input is no text."""
        return vanishing(model, self.at, "use saliency or input_x_gradient")

    def __call__(self, model: Model, examples: Examples, key: jax.Array) -> Attribution:
        """The guided gradient of each entry."""
        output, _, slope = self.slope(model, examples, self.at, guided=True)
        return self.attribution(model, examples, slope, output)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradCAM(Gradient):
    """relu(sum over the channels of map x mean gradient of the map), stretched to the image.

    Args:    at: the tap of maps, b y x c; None: the last one.
    Source:  Selvaraju et al. 2017.
    """

    at: str | None = None  # type: ignore[assignment]  # narrower in the other methods

    def fits(self, model: Model) -> str | None:
        """Whether there are images and maps of them."""
        return _misfit(model)

    def __call__(self, model: Model, examples: Examples, key: jax.Array) -> Attribution:
        """One number for each pixel, b y x; the map before it is stretched is kept as `map`."""
        output, coarse = _map(self, model, examples, self.at)
        values = stretched(coarse, np.shape(examples.batch[model.field])[1:3])
        return Attribution(values, None, None, output, examples.target, kept={"map": coarse})


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuidedGradCAM(Gradient):
    """Guided backpropagation at each pixel x Grad-CAM there.

    Args:    at: the tap of maps, as of Grad-CAM.
    Source:  Selvaraju et al. 2017, section 3.2.
    """

    at: str | None = None  # type: ignore[assignment]  # narrower in the other methods

    def fits(self, model: Model) -> str | None:
        """Whether there are images and maps of them."""
        return _misfit(model)

    def __call__(self, model: Model, examples: Examples, key: jax.Array) -> Attribution:
        """One number for each entry of the image; the map before it is stretched is kept as `map`."""
        _, coarse = _map(self, model, examples, self.at)
        output, _, slope = self.slope(model, examples, INPUT, guided=True)
        values = slope * stretched(coarse, slope.shape[1:3])[..., None]
        return Attribution(values, None, None, output, examples.target, kept={"map": coarse})


def stretched(maps: Float[np.ndarray, "b m n"], size: tuple[int, int]) -> Float[np.ndarray, "b y x"]:
    """The maps at another size, each place between the nearest four, as torch's interpolate does it (align_corners=False)."""
    return np.asarray(jax.image.resize(jnp.asarray(maps), (len(maps), *size), "bilinear", antialias=False))


def maps(model: Model) -> list[str]:
    """The taps that hold maps of an image, b y x c, in their order."""
    return [name for name, tap in model.taps.items() if len(tap.shape) == 4 and name != INPUT]


def _misfit(model: Model) -> str | None:
    if model.field != "image":
        return f"it explains images, and this model reads {model.field}"
    return None if maps(model) else "it has no tap of maps, y x c"


def _map(method: Gradient, model: Model, examples: Examples, at: str | None) -> tuple[np.ndarray, np.ndarray]:
    """(explained number, b; the class activation map, b m n)."""
    known = maps(model)
    at = known[-1] if at is None else at
    model.require(at)
    if at not in known:
        raise ConfigError(f"at={at} holds no maps, y x c; these taps do: {', '.join(known)}")
    output, value, slope = method.slope(model, examples, at)
    return output, np.maximum((value * slope.mean((1, 2), keepdims=True)).sum(-1), 0.0)
