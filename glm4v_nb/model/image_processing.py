"""From image files and PIL images to the pixel values the image tower takes, with Pillow only.

The steps are the original's: RGB, bicubic resize to a square (the aspect ratio is lost), 0..1,
normalise.
"""

import base64
import io
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel
from transformers import BatchFeature, PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor

from glm4v_nb.model.checkpoint_files import Number, Positive, check_values

# CLIP's constants; source: the original's transforms.Normalize.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGE_TYPES = (Image.Image, str, Path, np.ndarray, bytes, memoryview)
MOST_ENCODED_BYTES = 32 * 2**20  # of an image given as base64
_MOST_PIXELS = 16384  # of one side; more takes gigabytes a picture
_LONGEST_PATH = 4096  # bytes on Linux (PATH_MAX); longer text is no path
# A picture of so many takes half a gigabyte to decode, as WebP a whole one, whatever the size of
# its file; and so many in all passes over a JPEG, of which a file can have thousands, some seconds.
MOST_PIXELS, MOST_SCANNED_PIXELS = 64_000_000, 1_000_000_000
# What Pillow reads by itself; for others, such as EPS, it starts programs of the machine.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
IMAGE_FORMS = (
    "a PIL image, the path of a local file, its bytes, or an array [height, width, 3] of uint8."
)


def load_image(image) -> Image.Image:
    """Open and decode one image.

    Args:
        image: PIL image, path of a local file, the file's bytes, their base64 (a data: URL too), or
            array of uint8 [height, width], [height, width, 3] or [height, width, 4].

    Returns:
        RGB image. Transparency is dropped, orientation tags are not applied, an animation gives its
        first frame: all as in the original.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a URL to download, no base64, no image or a damaged one, too many pixels, more
            than 8 bits a channel.
        TypeError: something else.
    """
    if isinstance(image, Image.Image):
        return _decode("The image", image)
    if isinstance(image, np.ndarray):
        return _decode("The array", _from_array(image))
    if isinstance(image, (bytes, memoryview)):
        return _decode("The image file", io.BytesIO(image))
    if not isinstance(image, (str, Path)):
        kind = type(image).__name__
        raise TypeError(
            f"The image is a {kind}. Expected {IMAGE_FORMS} Convert it to one of these."
        )
    if str(image).startswith(("http://", "https://")):
        raise ValueError(
            f"{str(image)[:200]} is a URL. Expected a local file: nothing is downloaded on its own."
            " Download it first and give its path."
        )
    encoded = _base64_of(str(image))
    if encoded is not None:
        return _decode("The base64 image", io.BytesIO(encoded))
    if not Path(image).is_file():
        expected = "Expected the path of an image. Check the path."
        raise FileNotFoundError(f"{image} is not a file. {expected}")
    with open(image, "rb") as file:
        return _decode(str(image), file)


class _Colours(BaseModel):
    """Numbers for red, green and blue."""

    image_mean: tuple[Number, Number, Number]
    image_std: tuple[Positive, Positive, Positive]


class GLM4VImageProcessor(BaseImageProcessor):
    """Makes the ``pixel_values`` of GLM-4V.

    Args:
        size: side of the square in pixels, or ``{"height": side, "width": side}``.
        image_mean, image_std: per channel, red, green, blue; of values 0..1.

    Raises:
        ValueError: the size is not a square of at least one pixel.
    """

    model_input_names = ["pixel_values"]

    def __init__(self, size=1120, image_mean=IMAGE_MEAN, image_std=IMAGE_STD, **kwargs):
        super().__init__(**kwargs)
        is_square = isinstance(size, dict) and size.get("height") == size.get("width")
        side = size.get("height") if is_square else size
        if type(side) is not int or not 1 <= side <= _MOST_PIXELS:
            raise ValueError(
                f"The image size is {size!r:.60}. Expected one whole number of pixels, at most"
                f" {_MOST_PIXELS:,}, the same for height and width. Use vision_config.image_size of"
                " config.json."
            )
        colours = {"image_mean": image_mean, "image_std": image_std}
        check_values("preprocessor_config.json", _Colours, colours)
        self.size = {"height": side, "width": side}
        self.image_mean, self.image_std = list(image_mean), list(image_std)

    @property
    def image_size(self) -> int:
        """Side of the square, in pixels."""
        return self.size["height"]

    def resize(self, image: Image.Image) -> Image.Image:
        """RGB image of any size → of ``image_size`` × ``image_size``, Pillow's bicubic filter."""
        return image.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)

    def preprocess(self, images, return_tensors="pt") -> BatchFeature:
        """Load, resize and normalise one image or a list of images, as ``load_image`` takes them,
        to ``pixel_values``, float32 [number of images, 3, image_size, image_size].

        Raises:
            ValueError, TypeError, FileNotFoundError: as ``load_image``; an empty list.
        """
        images = list(images) if isinstance(images, (list, tuple)) else [images]
        if not images:
            expected = "Expected at least one. For text alone leave images out."
            raise ValueError(f"There are no images. {expected}")
        mean, std = np.array((self.image_mean, self.image_std), np.float32).reshape(2, 3, 1, 1)
        pixel_values = np.empty((len(images), 3, self.image_size, self.image_size), np.float32)
        for row, image in zip(pixel_values, images, strict=True):
            # Divide, subtract, divide in float32: the original's steps, to the last bit.
            row[:] = np.moveaxis(np.asarray(self.resize(load_image(image))), -1, 0)
            row /= 255
            row -= mean
            row /= std
        rows = pixel_values if return_tensors else list(pixel_values)
        return BatchFeature({"pixel_values": rows}, tensor_type=return_tensors)

    @classmethod
    def get_image_processor_dict(cls, pretrained_model_name_or_path, **kwargs):
        """Read the saved settings; the official files have none, only the size in config.json."""
        try:
            return super().get_image_processor_dict(pretrained_model_name_or_path, **kwargs)
        except OSError:
            size = checkpoint_image_size(pretrained_model_name_or_path, **kwargs)
            if size is None:
                raise
            return {"size": size}, kwargs


def checkpoint_image_size(pretrained_model_name_or_path, **kwargs) -> int | None:
    """``vision_config.image_size`` of a checkpoint's config.json in pixels, None without one.

    Raises:
        ValueError: config.json has no vision_config.
    """
    config = {}
    with suppress(OSError):
        config, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **kwargs)
    if "model_type" not in config:
        return None
    size = (config.get("vision_config") or {}).get("image_size")
    if size is None:
        raise ValueError(
            f"config.json of {pretrained_model_name_or_path} has no vision_config.image_size: this"
            " is not a GLM-4V checkpoint (a text-only ChatGLM one, perhaps). Load"
            " zai-org/glm-4v-9b."
        )
    return size


def _decode(name, source) -> Image.Image:
    """RGB copy of an opened PIL image, or of what ``Image.open`` takes."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        # Transparency is dropped, as in the original.
        warnings.filterwarnings("ignore", "Palette images with Transparency")
        try:
            is_open = isinstance(source, Image.Image)
            image = source if is_open else Image.open(source, formats=FORMATS)
            fault = _fault(image)
            rgb = None if fault else image.convert("RGB")
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise ValueError(
                f"{name} has too many pixels: more than {Image.MAX_IMAGE_PIXELS:,}, where a small"
                " file can fill the memory. Expected a photograph or a screenshot. Scale it down"
                " first, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it."
            ) from error
        except MemoryError:
            raise
        except UnidentifiedImageError:  # whose message names an object in memory
            raise ValueError(
                f"{name} cannot be read as an image (no format that is read here). Expected a"
                f" complete {', '.join(FORMATS)}. Save or download it again."
            ) from None
        except Exception as error:  # decoders meet damaged files with errors of many types
            raise ValueError(
                f"{name} cannot be read as an image ({error}). Expected a complete PNG, JPEG, GIF,"
                " WebP or other file that Pillow opens. Save or download it again."
            ) from error
    if fault:
        raise ValueError(f"{name} {fault}")
    return rgb


def _base64_of(text: str) -> bytes | None:
    """The bytes of a data: URL, or of text that is base64 and too long for a path; else None."""
    is_url = text.startswith("data:")
    if not is_url and len(text) < _LONGEST_PATH:
        return None
    header, comma, payload = text.partition(",") if is_url else ("", ",", text)
    try:
        if not comma or (is_url and not header.endswith(";base64")):
            raise ValueError("no ;base64, in it")
        if len(payload) * 3 // 4 > MOST_ENCODED_BYTES:
            raise ValueError(f"more than {MOST_ENCODED_BYTES:,} bytes")
        return base64.b64decode("".join(payload.split()), validate=True)
    except ValueError as error:
        raise ValueError(
            f"The image is text that begins with {text[:40]!r} and is no base64 ({error}). Expected"
            " a path, data:image/png;base64,… or the base64 of an image file of at most"
            f" {MOST_ENCODED_BYTES:,} bytes. Pass the file's bytes instead."
        ) from None


def _fault(image: Image.Image) -> str | None:
    """What makes an image unusable, and what to do."""
    if image.mode.startswith(("I", "F")):
        return (
            f"has pixels of mode {image.mode}, more than 8 bits. Expected 8 bits a channel: Pillow"
            " would turn all above 255 white. Scale the values to 0..255 and convert to L or RGB."
        )
    if 0 in image.size:
        return f"is {image.width}×{image.height} pixels. Expected at least one. Use another."
    return _cost(image)


def _cost(image: Image.Image) -> str | None:
    """What the header of a file says of a picture that takes gigabytes or minutes to decode."""
    file, passes, pixels = getattr(image, "fp", None), 1, image.width * image.height
    if file is None:  # decoded already
        return None
    if image.format in ("JPEG", "MPO"):
        file.seek(0)
        passes = file.read(MOST_ENCODED_BYTES).count(b"\xff\xda")
    if pixels <= MOST_PIXELS and passes * pixels <= MOST_SCANNED_PIXELS:
        return None
    return (
        f"has too many pixels: {image.width} × {image.height} in {passes} passes. Expected at most"
        f" {MOST_PIXELS:,}, and {MOST_SCANNED_PIXELS:,} in all passes of a progressive JPEG. Scale"
        " it down, or save it anew without passes."
    )


def _from_array(array: np.ndarray) -> Image.Image:
    channels = array.shape[2:] or (3,)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in ((3,), (4,)):
        raise ValueError(
            f"The array is {array.dtype} of shape {array.shape}. Expected uint8 of shape [height,"
            " width, 3]. Convert it: channels last, values 0..255."
        )
    return Image.fromarray(array)
