"""Images to pixel values, against Pillow itself."""

import base64
import io
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from glm4v_nb.model.image_processing import IMAGE_MEAN, IMAGE_STD, GLM4VImageProcessor, load_image

SIDE = 56


@pytest.fixture
def processor():
    return GLM4VImageProcessor(SIDE)


def noise(width, height, mode="RGB"):
    channels = {"L": 1, "RGB": 3, "RGBA": 4, "CMYK": 4}.get(mode)
    if channels is None:  # P, 1, LA and others have rules of their own for making values
        return noise(width, height, "RGBA" if "A" in mode else "RGB").convert(mode)
    values = np.random.default_rng(width * 1000 + height).integers(
        0, 256, (height, width, channels), np.uint8
    )
    return Image.fromarray(values.squeeze(-1) if channels == 1 else values, mode)


def encoded(image, file_format):
    buffer = io.BytesIO()
    image.save(buffer, file_format)
    return buffer.getvalue()


def bytes_before_normalisation(pixel_values):
    """Undo normalisation: uint8 [side, side, 3]. Rounding is exact: float32 is far finer than a
    byte."""
    values = pixel_values.double() * torch.tensor(IMAGE_STD).view(3, 1, 1) + torch.tensor(
        IMAGE_MEAN
    ).view(3, 1, 1)
    return (values * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "CMYK", "LA", "YCbCr"])
@pytest.mark.parametrize("size", [(56, 56), (1, 1), (200, 30), (31, 173), (3, 3), (640, 480)])
def test_resized_bytes_equal_pillows_bicubic_bit_for_bit(processor, mode, size):
    image = noise(*size, mode)
    expected = np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    assert np.array_equal(np.asarray(processor.resize(load_image(image))), expected)
    assert np.array_equal(bytes_before_normalisation(processor(image).pixel_values[0]), expected)


def test_full_size_bytes_equal_pillows_bicubic_bit_for_bit():
    image = noise(640, 480)
    expected = np.asarray(image.resize((1120, 1120), Image.Resampling.BICUBIC))
    pixel_values = GLM4VImageProcessor()(image).pixel_values
    assert pixel_values.shape == (1, 3, 1120, 1120)
    assert np.array_equal(bytes_before_normalisation(pixel_values[0]), expected)


def test_values_are_normalised_in_float32_as_the_original_does(processor):
    image = noise(SIDE, SIDE)
    expected = torch.from_numpy(np.array(image)).permute(2, 0, 1).to(torch.float32).div(255)
    expected = expected.sub(torch.tensor(IMAGE_MEAN).view(3, 1, 1)).div(
        torch.tensor(IMAGE_STD).view(3, 1, 1)
    )
    pixel_values = processor(image).pixel_values
    assert pixel_values.dtype == torch.float32
    assert torch.equal(pixel_values[0], expected)


def test_every_form_of_the_same_image_gives_the_same_values(processor, tmp_path):
    image = noise(40, 20)
    path = tmp_path / "picture.png"
    image.save(path)
    expected = processor(image).pixel_values
    for form in (
        str(path),
        path,
        path.read_bytes(),
        memoryview(path.read_bytes()),
        np.asarray(image),
        [image],
    ):
        assert torch.equal(processor(form).pixel_values, expected)


def test_a_list_gives_one_row_each_in_order(processor):
    images = [noise(10, 20), noise(20, 10), noise(30, 30)]
    rows = processor(images).pixel_values
    assert rows.shape == (3, 3, SIDE, SIDE)
    for row, image in zip(rows, images, strict=True):
        assert torch.equal(row, processor(image).pixel_values[0])


def test_transparency_is_dropped_and_orientation_ignored_as_in_the_original(tmp_path):
    transparent = Image.new("RGBA", (2, 2), (200, 10, 20, 0))
    assert load_image(transparent).getpixel((0, 0)) == (200, 10, 20)
    turned = noise(4, 2)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    turned.save(tmp_path / "turned.png", exif=exif)
    assert load_image(tmp_path / "turned.png").size == (4, 2)


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "moving.gif").getpixel((0, 0)) == (255, 0, 0)


def test_a_palette_with_transparency_says_nothing_on_stderr(recwarn):
    image = noise(8, 8, "P")
    image.info["transparency"] = bytes([0, 128] * 8)
    load_image(image)
    assert not recwarn.list


def test_tensors_arrays_and_lists_are_returned_on_request(processor):
    image = noise(8, 8)
    expected = processor(image).pixel_values
    assert np.array_equal(processor(image, return_tensors="np").pixel_values, expected.numpy())
    listed = processor(image, return_tensors=None).pixel_values
    assert isinstance(listed, list) and np.array_equal(listed[0], expected[0].numpy())


def test_saved_settings_are_loaded_again(processor, tmp_path):
    GLM4VImageProcessor(84, image_mean=(0.1, 0.2, 0.3)).save_pretrained(tmp_path)
    loaded = GLM4VImageProcessor.from_pretrained(tmp_path)
    assert loaded.image_size == 84
    assert loaded.size == {"height": 84, "width": 84}
    assert loaded.image_mean == [0.1, 0.2, 0.3]
    assert loaded.image_std == list(IMAGE_STD)


@pytest.mark.parametrize("size", [0, -1, 1.5, {"height": 56, "width": 28}, {"shortest_edge": 56}])
def test_a_size_that_is_no_square_is_refused(size):
    with pytest.raises(ValueError, match="Expected one whole number of pixels"):
        GLM4VImageProcessor(size)


def bomb(side):
    """A PNG whose header promises side × side pixels and that holds none."""

    def chunk(kind, data):
        return (
            len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
        )

    header = side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"this is text", r"picture\.png cannot be read as an image"),
        (b"", r"picture\.png cannot be read as an image"),
        (
            encoded(noise(64, 64), "JPEG")[:-700],
            r"picture\.png cannot be read as an image .*truncated",
        ),
        (encoded(noise(64, 64), "PNG")[:900], r"picture\.png cannot be read as an image"),
        (bomb(30_000), r"picture\.png has too many pixels: more than 89,478,485"),
        (bomb(10_000), r"picture\.png has too many pixels"),
        (bomb(8_001), r"picture\.png has too many pixels: 8001 × 8001 in 1 passes"),
        (
            encoded(Image.fromarray(np.full((4, 4), 4096, np.uint16)), "PNG"),
            r"picture\.png has pixels of mode I",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_reason(processor, tmp_path, content, message):
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        processor(path)


def test_an_opened_but_truncated_image_is_refused_too(processor):
    image = Image.open(io.BytesIO(encoded(noise(64, 64), "JPEG")[:-700]))
    with pytest.raises(ValueError, match="The image cannot be read as an image"):
        processor(image)


@pytest.mark.parametrize("url", ["https://example.org/a.png", "http://example.org/a.png"])
def test_a_url_is_refused_and_nothing_is_downloaded(processor, url):
    with pytest.raises(ValueError, match="is a URL. Expected a local file.*Download it first"):
        processor(url)


@pytest.mark.parametrize("form", ["data:image/png;base64,{}", "{}", "data:;base64,{}"])
def test_base64_of_a_file_is_read_as_the_file(processor, form):
    content = encoded(noise(64, 64), "PNG")
    text = form.format(base64.encodebytes(content).decode())
    assert torch.equal(processor(text)["pixel_values"], processor(content)["pixel_values"])


@pytest.mark.parametrize(
    "text",
    ["data:image/png;base64,aa", "data:image/png,abc", "data:", "ab?" * 2000, "a" * 50_000_001],
)
def test_text_that_is_no_base64_or_too_much_is_refused_in_a_short_sentence(processor, text):
    with pytest.raises(ValueError, match="is no base64.*Pass the file's bytes") as raised:
        processor(text)
    assert len(str(raised.value)) < 400


def test_formats_that_start_programs_of_the_machine_are_not_opened(processor):
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    with pytest.raises(ValueError, match="cannot be read as an image"):
        processor(postscript)


def test_a_missing_file_is_named(processor, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.png is not a file"):
        processor(tmp_path / "nothing.png")


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((8, 8, 3), np.float32),
        np.zeros((3, 8, 8), np.uint8),
        np.zeros((2, 8, 8, 3), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
    ],
)
def test_an_array_of_another_layout_is_refused(processor, array):
    with pytest.raises(ValueError, match="Expected"):
        processor(array)


def test_something_else_and_no_image_at_all_are_refused(processor):
    with pytest.raises(TypeError, match="The image is a int"):
        processor(3)
    with pytest.raises(ValueError, match="There are no images"):
        processor([])


def test_a_jpeg_of_thousands_of_passes_is_refused_before_it_is_decoded():
    # Each refining pass takes a few bytes of the file and a walk over all pixels.
    plain = io.BytesIO()
    Image.new("RGB", (2400, 2400), "red").save(plain, "JPEG", progressive=True)
    content = plain.getvalue()
    assert load_image(content).size == (2400, 2400)
    last_pass = content[content.rindex(b"\xff\xda") : -2]
    many = content[:-2] + 1000 * last_pass + content[-2:]
    assert len(many) < 600_000
    begin = time.process_time()  # decoding it takes a minute of it
    with pytest.raises(ValueError, match="2400 × 2400 in 10.. passes.* save it anew"):
        load_image(many)
    assert time.process_time() - begin < 1


def test_a_picture_that_is_in_memory_already_may_be_as_large_as_it_is():
    assert load_image(Image.new("L", (9_000, 8_000))).size == (9_000, 8_000)
