"""The fifteen corruptions of corruptions.py as functions of whole batches.

Each is called with images, the numbers of one severity, and a random generator for each image.

Shapes: B images, C channels, S px of side. Pixels are float64 in [0, 255]; values outside are clipped by the caller.
"""

import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from numpy.random import Generator
from PIL import Image
from scipy import ndimage

LUMA = (0.299, 0.587, 0.114)  # OpenCV's grey
ICE = (0.85, 0.93, 1.0)  # colour of the procedural frost

Pixels = Float[np.ndarray, "B C S S"]


def gaussian_noise(x: Pixels, std: float, draws: Sequence[Generator]) -> Pixels:
    """Normal noise of standard deviation `std` (of pixels in [0, 1]) on each value."""
    return x + 255 * std * np.stack([draw.normal(size=x.shape[1:]) for draw in draws])


def shot_noise(x: Pixels, photons: float, draws: Sequence[Generator]) -> Pixels:
    """Poisson noise: white is so many photons on average."""
    return np.stack([draw.poisson(image * (photons / 255)) for image, draw in zip(x, draws, strict=True)]) * (
        255 / photons
    )


def impulse_noise(x: Pixels, amount: float, draws: Sequence[Generator]) -> Pixels:
    """Salt and pepper: this share of the values becomes 0 or 255."""
    hit, salt = np.stack([draw.random((2, *x.shape[1:])) for draw in draws], axis=1)
    return np.where(hit <= amount, 255.0 * (salt <= 0.5), x)


def defocus_blur(x: Pixels, lens: tuple[float, float], draws: Sequence[Generator]) -> Pixels:
    """A disc of a radius in px, itself blurred by a Gaussian of a standard deviation in px."""
    return ndimage.correlate(x, _disc(*lens)[None, None], mode="mirror")


def _disc(radius: float, alias: float) -> Float[np.ndarray, "K K"]:
    half, taps = (8, 1) if radius <= 8 else (int(radius), 2)
    offset = np.arange(-half, half + 1)
    disc = (offset**2 + offset[:, None] ** 2 <= radius**2).astype(float)
    gauss = np.exp(-(np.arange(-taps, taps + 1) ** 2) / (2 * alias**2))
    gauss /= gauss.sum()
    return ndimage.correlate(disc / disc.sum(), np.outer(gauss, gauss), mode="mirror")


def _gaussian(x: Pixels, sigma: float) -> Pixels:
    return ndimage.gaussian_filter(x, (0, 0, sigma, sigma), mode="nearest", truncate=4)


def glass_blur(x: Pixels, glass: tuple[float, int, int], draws: Sequence[Generator]) -> Pixels:
    """Blurred, each px replaced by one nearby (reach in px), so many times, and blurred again.

    The authors swap two views of one numpy array, by which the second px keeps its value: it is copied, not swapped.
    """
    sigma, reach, times = glass
    x = np.floor(_gaussian(x, sigma))
    side, every = x.shape[-1], np.arange(len(x))
    places = range(side - reach, reach, -1)
    shift = np.stack([draw.integers(-reach, reach, (times, len(places), len(places), 2)) for draw in draws], axis=-1)
    for again in range(times):
        for i, row in enumerate(places):
            for j, column in enumerate(places):
                dx, dy = shift[again, i, j]
                x[:, :, row, column] = x[every, :, row + dy, column + dx]
    return _gaussian(x, sigma)


def motion_blur(x: Pixels, streak: tuple[int, float], draws: Sequence[Generator]) -> Pixels:
    """ImageMagick's motion blur at an angle within 45 degrees of the horizontal."""
    return np.stack([_streak(image, *streak, draw.uniform(-45, 45)) for image, draw in zip(x, draws, strict=True)])


def _streak(x: Float[np.ndarray, "*C S S"], radius: int, sigma: float, angle: float) -> Float[np.ndarray, "*C S S"]:
    """One half of a Gaussian along a line of 2 radius + 1 px in whole px, the edges repeated; whole numbers."""
    step, place = np.arange(2 * radius + 1), np.arange(x.shape[-1])
    weights = np.exp(-(step**2) / (2 * sigma**2))
    weights /= weights.sum()
    turn, y = np.deg2rad(angle), np.zeros_like(x)
    for weight, dy, dx in zip(
        weights, np.ceil(step * np.sin(turn) - 0.5), np.ceil(step * np.cos(turn) - 0.5), strict=True
    ):
        rows, columns = (np.clip(place + int(by), 0, len(place) - 1) for by in (dy, dx))
        y += weight * x[..., rows[:, None], columns]
    return np.rint(y)


def zoom_blur(x: Pixels, zooms: tuple[float, float], draws: Sequence[Generator]) -> Pixels:
    """The mean of the image and of its enlargements by 1, 1 + step, … to below a largest factor."""
    stop, step = zooms
    factors = np.arange(1, stop, step)
    return (x + sum(_zoomed(x, factor) for factor in factors)) / (len(factors) + 1)


def _zoomed(x: Float[np.ndarray, "*C S S"], factor: float) -> Float[np.ndarray, "*C S S"]:
    """The centre, enlarged; bilinear, corners on corners."""
    side = x.shape[-1]
    crop = int(np.ceil(side / factor))
    start, size = (side - crop) // 2, round(crop * factor)
    position = np.arange(size) * ((crop - 1) / (size - 1))
    low = np.minimum(position.astype(int), crop - 2)
    share, low = position - low, low + start
    x = x[..., low, :] * (1 - share)[:, None] + x[..., low + 1, :] * share[:, None]
    x = x[..., low] * (1 - share) + x[..., low + 1] * share
    trim = (size - side) // 2
    return x[..., trim : trim + side, trim : trim + side]


def snow(x: Pixels, flakes: tuple[float, ...], draws: Sequence[Generator]) -> Pixels:
    """Flakes (thresholded, enlarged noise) driven by the wind from two sides over a whitened image."""
    mean, std, zoom, threshold, radius, sigma, keep = flakes
    side = x.shape[-1]
    noise = _zoomed(np.stack([draw.normal(mean, std, (side, side)) for draw in draws]), zoom)
    noise = np.floor(255 * np.clip(np.where(noise < threshold, 0, noise), 0, 1))
    angles = [draw.uniform(-135, -45) for draw in draws]
    driven = np.stack([_streak(image, int(radius), sigma, angle) for image, angle in zip(noise, angles, strict=True)])
    weights = LUMA if x.shape[1] == 3 else (1 / x.shape[1],) * x.shape[1]
    grey = np.sum(x * np.array(weights)[:, None, None], axis=1, keepdims=True)
    whitened = np.maximum(x, 1.5 * grey + 127.5)
    return keep * x + (1 - keep) * whitened + (driven + driven[:, ::-1, ::-1])[:, None]


def frost(x: Pixels, mixture: tuple[float, float], draws: Sequence[Generator]) -> Pixels:
    """A weighted sum of the image and of ice; the ice is NOT the authors'.

    They lay crops of six photographs of frosted glass over the image, which are not part of this program. This is a
    substitute: bright veins where two fractal height maps cross their middle, bluish on RGB images. The weights are
    published, the picture is not, so that accuracies under frost do not compare with those on CIFAR-10-C.
    """
    keep, ice = mixture
    veins = [1 - np.abs(2 * plasma(x.shape[-1], 1.75, draws) - 1) for _ in range(2)]
    layer = 255 * (0.25 + 0.75 * np.maximum(*veins) ** 4)
    colour = np.array(ICE if x.shape[1] == 3 else (np.mean(ICE),) * x.shape[1])
    return keep * x + ice * layer[:, None] * colour[:, None, None]


def fog(x: Pixels, cloud: tuple[float, float], draws: Sequence[Generator]) -> Pixels:
    """A fractal cloud, lighter than the image and as much darkened as to keep its brightest value."""
    thickness, decay = cloud
    brightest = x.max(axis=(1, 2, 3), keepdims=True) / 255
    fogged = x + 255 * thickness * plasma(x.shape[-1], decay, draws)[:, None]
    return fogged * (brightest / (brightest + thickness))


def plasma(side: int, decay: float, draws: Sequence[Generator]) -> Float[np.ndarray, "B {side} {side}"]:
    """Height maps in [0, 1] by the diamond-square algorithm on a torus whose side is a power of two.

    Each halving of the step fills the centres of the squares, then those of the diamonds between them: the mean of the
    four neighbours plus noise of an amplitude that is divided by the square of `decay` each time.
    """
    size = 1 << (side - 1).bit_length()
    noise = np.stack([draw.uniform(-1, 1, (size, size)) for draw in draws])
    height, step, amplitude = np.zeros_like(noise), size, 100.0**2
    while step >= 2:
        half = step // 2
        corners, centres = (height[:, start::step, start::step] for start in (0, half))
        below = corners + np.roll(corners, -1, axis=1)
        right = corners + np.roll(corners, -1, axis=2)
        centres[:] = (below + np.roll(below, -1, axis=2)) / 4 + amplitude * noise[:, half::step, half::step]
        top = (right + centres + np.roll(centres, 1, axis=1)) / 4
        left = (below + centres + np.roll(centres, 1, axis=2)) / 4
        height[:, ::step, half::step] = top + amplitude * noise[:, ::step, half::step]
        height[:, half::step, ::step] = left + amplitude * noise[:, half::step, ::step]
        step, amplitude = half, amplitude / decay**2
    height -= height.min(axis=(1, 2), keepdims=True)
    return (height / height.max(axis=(1, 2), keepdims=True))[:, :side, :side]


def brightness(x: Pixels, more: float, draws: Sequence[Generator]) -> Pixels:
    """The HSV value (the largest channel) raised by a share of white, hue and saturation kept; black becomes grey."""
    value = x.max(axis=1, keepdims=True)
    raised = np.minimum(value + 255 * more, 255)
    return np.where(value > 0, x * (raised / np.maximum(value, 1)), raised)


def contrast(x: Pixels, factor: float, draws: Sequence[Generator]) -> Pixels:
    """Moved towards the mean of each channel."""
    mean = x.mean(axis=(2, 3), keepdims=True)
    return (x - mean) * factor + mean


def elastic_transform(x: Pixels, stretch: tuple[float, float, float], draws: Sequence[Generator]) -> Pixels:
    """A random affine map, then a smooth random displacement; both bilinear.

    `stretch`, as shares of the side: the displacement's amplitude before smoothing, the standard deviation of that
    smoothing, and how far each of three points moves at most in the affine map.
    """
    side = x.shape[-1]
    amplitude, sigma, reach = (share * side for share in stretch)
    rows, columns = np.mgrid[:side, :side].astype(float)
    middle, arm = side // 2, side // 3
    corners = middle + arm * np.array([(1, 1), (1, -1), (-1, -1)])  # x, y
    warped = []
    for image, draw in zip(x, draws, strict=True):
        moved = corners + draw.uniform(-reach, reach, (3, 2))
        back = np.linalg.solve(np.c_[moved, np.ones(3)], corners)  # from the place in the result to that in the image
        source = [columns * back[0, axis] + rows * back[1, axis] + back[2, axis] for axis in (1, 0)]
        dx, dy = (
            amplitude * ndimage.gaussian_filter(draw.uniform(-1, 1, (side, side)), sigma, mode="reflect", truncate=3)
            for _ in range(2)
        )
        for channel in image:
            affine = ndimage.map_coordinates(channel, source, order=1, mode="mirror")
            warped.append(ndimage.map_coordinates(affine, (rows + dy, columns + dx), order=1, mode="reflect"))
    return np.stack(warped).reshape(x.shape)


def pixelate(x: Pixels, share: float, draws: Sequence[Generator]) -> Pixels:
    """Reduced to a share of the side and enlarged again, by PIL's box filter."""
    side = x.shape[-1]
    small = int(side * share)
    planes = [
        Image.fromarray(plane).resize((small, small), Image.Resampling.BOX).resize((side, side), Image.Resampling.BOX)
        for plane in x.astype(np.uint8).reshape(-1, side, side)
    ]
    return np.stack([np.asarray(plane, float) for plane in planes]).reshape(x.shape)


def jpeg_compression(x: Pixels, quality: int, draws: Sequence[Generator]) -> Pixels:
    """Through a JPEG file of that quality; grey or RGB."""
    images = []
    for image in x.astype(np.uint8):
        file = io.BytesIO()
        Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(file, "JPEG", quality=quality)
        with Image.open(file) as picture:
            images.append(np.atleast_3d(np.asarray(picture, float)).transpose(2, 0, 1))
    return np.stack(images)
