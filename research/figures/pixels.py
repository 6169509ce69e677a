"""Arrays as the colours of pictures; nothing here draws, so nothing here loads matplotlib."""

import numpy as np
from jaxtyping import Float, Num, UInt8


def pixels(images: Num[np.ndarray, "b y x c"]) -> Float[np.ndarray, "b y x 3"]:
    """The images as colours in [0, 1]; a value that is not finite is drawn grey."""
    images = np.asarray(images[..., :3] if images.shape[-1] >= 3 else images[..., :1], np.float64)
    finite = np.isfinite(images)
    low, high = (images[finite].min(), images[finite].max()) if finite.any() else (0.0, 1.0)
    scaled = (images - low) / (high - low) if high > low else np.clip(images, 0.0, 1.0)
    return np.broadcast_to(np.where(finite, scaled, 0.5), (*images.shape[:-1], 3))  # [b, y, x, 1 or 3] -> [b, y, x, 3]


def sheet(images: Num[np.ndarray, "b y x c"]) -> UInt8[np.ndarray, "rows columns 3"]:
    """The images side by side as one picture of bytes, for an event log; the last row is filled up with black."""
    shown = np.rint(pixels(images) * 255).astype(np.uint8)
    side = max(int(np.ceil(np.sqrt(len(shown)))), 1)
    shown = np.concatenate([shown, np.zeros((side * -(-len(shown) // side) - len(shown), *shown.shape[1:]), np.uint8)])
    rows, (y, x) = len(shown) // side, shown.shape[1:3]
    return shown.reshape(rows, side, y, x, 3).swapaxes(1, 2).reshape(rows * y, side * x, 3)  # r s y x 3 -> r y s x 3 -> ry sx 3
