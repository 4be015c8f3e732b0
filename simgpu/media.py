"""Pictures and sound as a model's processor would make them, by its configuration alone."""

import math

import torch
from transformers import PreTrainedConfig
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from simgpu.rig import Rig

# Pixels on a side where the configuration gives none, as of models that take any size.
_SIDE = 672


def image_token(config: PreTrainedConfig) -> int:
    """The id that stands in a prompt for each position of an image.

    Raises:
        ValueError: the configuration has none.
    """
    for name in ("image_token_id", "image_token_index"):
        if isinstance(getattr(config, name, None), int):
            return getattr(config, name)
    raise _unknown(config)


def _unknown(config: PreTrainedConfig, why: str = "") -> ValueError:
    return ValueError(
        f"It is not known how a {config.model_type!r} takes images{why}. Use --images 0 for its"
        " text, or run your own program, which calls its processor: simgpu run."
    )


def _vision(config: PreTrainedConfig):
    return getattr(config, "vision_config", None) or config


def picture_size(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Channels, height and width of a picture that a model takes."""
    vision = _vision(config)
    side = getattr(vision, "image_size", None) or _SIDE
    height, width = side if isinstance(side, list | tuple) else (side, side)
    return getattr(vision, "num_channels", None) or 3, height, width


def sound(config: PreTrainedConfig, name: str, generator) -> torch.Tensor:
    """Thirty seconds of sound: features as Whisper takes them, or 16,000 samples a second."""
    if name == "input_features":
        bins, positions = config.num_mel_bins, getattr(config, "max_source_positions", 1500)
        return torch.rand(1, bins, 2 * positions, generator=generator)
    if name == "input_values":
        return torch.rand(1, 30 * 16_000, generator=generator)
    raise ValueError(
        f"It is not known how a {config.model_type!r} is asked: it takes {name}. Run your own"
        " program: simgpu run, or simgpu.estimate in Python."
    )


def image_inputs(
    config: PreTrainedConfig, takes: set[str], count: int, generator
) -> dict[str, torch.Tensor]:
    """What the processor makes of ``count`` pictures of the model's size, for one sample.

    ``takes`` are the names of what the model's forward takes.
    """
    channels, height, width = picture_size(config)
    if "image_grid_thw" in takes:  # patches of any number of pictures behind each other
        rows, columns, features = _grid(config)
        pixels = torch.rand(count * rows * columns, features, generator=generator)
        return {
            "pixel_values": pixels,
            "image_grid_thw": torch.tensor([[1, rows, columns]] * count),
        }
    pixels = torch.rand(count, channels, height, width, generator=generator)
    if "pixel_attention_mask" in takes:  # pictures of a sample in a dimension of their own
        return {"pixel_values": pixels[None]}
    inputs = {"pixel_values": pixels}
    if "image_sizes" in takes:
        inputs["image_sizes"] = torch.tensor([[height, width]] * count)
        if hasattr(config, "image_grid_pinpoints"):  # an overview, and tiles
            places = (config.image_grid_pinpoints, _vision(config).image_size)
            tiles = image_size_to_num_patches((height, width), *places)
            inputs["pixel_values"] = pixels[:, None].expand(count, tiles, -1, -1, -1)
    return inputs


def _grid(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Rows and columns of patches of a picture, and numbers in a patch."""
    vision = _vision(config)
    channels, height, width = picture_size(config)
    patch, merged = vision.patch_size, getattr(vision, "spatial_merge_size", 2)
    frames = getattr(vision, "temporal_patch_size", 1)
    rows, columns = (max(1, side // (patch * merged)) * merged for side in (height, width))
    return rows, columns, channels * frames * patch * patch


def image_positions(config: PreTrainedConfig, takes: set[str], model_class: type) -> int:
    """Positions of an image in a prompt, as the model's own tower makes them.

    Raises:
        ValueError: it is not known how the model takes images.
    """
    if "image_grid_thw" in takes:
        rows, columns, _ = _grid(config)
        return rows * columns // getattr(_vision(config), "spatial_merge_size", 2) ** 2
    image_token(config)
    try:
        with Rig.simulated("H200", capped=False, assume="count"), torch.no_grad():
            options = {"config": config, "device_map": {"": 0}, "dtype": torch.bfloat16}
            model = model_class.from_pretrained(None, **options)
            inputs = image_inputs(config, takes, 1, torch.Generator())
            pixels = inputs.pop("pixel_values").to("cuda", torch.bfloat16)
            features = model.get_image_features(pixel_values=pixels, **inputs)
    except (AttributeError, RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        raise _unknown(config, f" ({' '.join(str(error).split())[:100]})") from error
    features = getattr(features, "pooler_output", features)
    parts = features if isinstance(features, list | tuple) else [features]
    return sum(math.prod(part.shape[:-1]) for part in parts)
