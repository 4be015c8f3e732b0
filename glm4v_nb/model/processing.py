"""The processor: messages and images in, everything the model's forward takes out."""

from pathlib import Path

from transformers import AutoProcessor, AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.models.auto import image_processing_auto
from wrapt import wrap_function_wrapper

from glm4v_nb.model.chat import is_batch, parse_conversation, refuse_rendered
from glm4v_nb.model.checkpoint_files import check_files, guarded, reading
from glm4v_nb.model.configuration import GLM4VVisionConfig
from glm4v_nb.model.image_processing import GLM4VImageProcessor, checkpoint_image_size
from glm4v_nb.model.tokenization import ChatGLM4Tokenizer

_SAME_SIZE = (
    "Both must be the side the image tower was built for. Take all files from the same checkpoint."
)


class GLM4VProcessor(ProcessorMixin):
    """Tokenizer and image processor of GLM-4V behind one call.

    Usually ``processor.apply_chat_template(messages, add_generation_prompt=True)``;
    ``processor(images, text)`` is short for a conversation of one question. ValueError if image
    processor and tokenizer state different image sizes.
    """

    def __init__(self, image_processor: GLM4VImageProcessor, tokenizer: ChatGLM4Tokenizer):
        super().__init__(image_processor, tokenizer)
        stated = getattr(tokenizer, "image_size", None)
        if stated is not None and stated != image_processor.image_size:
            raise ValueError(
                f"tokenizer_config.json has image_size {stated}, but config.json or the image"
                f" processor has {image_processor.image_size}. {_SAME_SIZE}"
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Load from the official files or from saved ones.

        No remote code runs, whatever the files name. The image size is that of the saved processor
        or else of config.json, or else of tokenizer_config.json.

        Raises:
            ValueError: the files disagree about the image size, or the checkpoint is text-only.
        """
        for not_ours in ("_from_auto", "trust_remote_code"):
            kwargs.pop(not_ours, None)
        source = pretrained_model_name_or_path
        if Path(source).is_dir():
            check_files(Path(source, kwargs.get("subfolder", "")))
        with reading(f"{source}: tokenizer_config.json or tokenizer.model"):
            tokenizer = ChatGLM4Tokenizer.from_pretrained(source, **kwargs)
        built_for = checkpoint_image_size(source, **kwargs)
        with reading(f"{source}: preprocessor_config.json or processor_config.json"):
            try:
                image_processor = GLM4VImageProcessor.from_pretrained(source, **kwargs)
            except OSError:
                if tokenizer.image_size is None:
                    raise
                image_processor = GLM4VImageProcessor(tokenizer.image_size)
        if built_for is not None and built_for != image_processor.image_size:
            raise ValueError(
                f"{source}: config.json has vision_config.image_size"
                f" {built_for}, but the saved processor has {image_processor.image_size}."
                f" {_SAME_SIZE}"
            )
        return cls(image_processor, tokenizer)

    def apply_chat_template(
        self,
        conversation,
        *,
        tokenize=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
        processor_kwargs=None,
        **options,
    ):
        """Turn one conversation, or a list of conversations, into the model's inputs.

        ``tokenize`` is on by default, since the rendered text is only for reading.

        Args:
            processor_kwargs: padding, max_length, pad_to_multiple_of or return_tensors, as
                transformers' pipelines pass them.
            options: with the other arguments those of ``ChatGLM4Tokenizer.apply_chat_template``.

        Returns:
            ``BatchFeature`` with ``input_ids`` and ``attention_mask`` [n, L], padded on the left,
            and ``pixel_values`` float32 [images, 3, size, size], in the order of the rows that have
            an image, if any has. The model derives position ids from the mask.

        Raises:
            ValueError, TypeError, FileNotFoundError: as the tokenizer's method and
                ``image_processing.load_image``; an image placeholder without an image.
        """
        options |= {"padding": padding, "return_tensors": return_tensors} | (processor_kwargs or {})
        if options["return_tensors"] == "auto":
            options["return_tensors"] = "pt"
        conversations = conversation if is_batch(conversation) else [conversation]
        images = [image for one in conversations for image in _images(one)]
        encoded = self.tokenizer.apply_chat_template(conversation, tokenize=tokenize, **options)
        if not tokenize:
            return encoded
        if not return_dict:
            return encoded["input_ids"]
        inputs = dict(encoded)
        if images:
            inputs.update(self.image_processor(images, return_tensors=options["return_tensors"]))
        return BatchFeature(inputs)

    def __call__(self, images=None, text=None, **options):
        """One question, or a list of questions, each with at most one image.

        Each text becomes a conversation of one user message, ready for the answer. Images alone
        give only ``pixel_values``. Options and result are those of ``apply_chat_template``.

        Args:
            images: None, an image for the one text, or a list with an image or None for each text.
            text: str or list of str.

        Raises:
            ValueError: other than one image or None for each text; a rendered prompt as text.
            TypeError: text is neither str nor a list of str.
        """
        if text is None:
            return self.image_processor(images, return_tensors=options.get("return_tensors", "pt"))
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, (list, tuple)) or not all(isinstance(one, str) for one in texts):
            raise TypeError(
                "The text is neither str nor a list of str. Expected one question or a list of"
                " questions. For messages call apply_chat_template."
            )
        for one in texts:
            refuse_rendered(one)
        if not isinstance(images, (list, tuple)):
            images = [None] * len(texts) if images is None else [images]
        images = [_only_image(image) for image in images]
        if len(images) != len(texts):
            raise ValueError(
                f"There are {len(images)} images for {len(texts)} texts. Expected one image or None"
                " for each text. Put None where a question has no image."
            )
        conversations = [
            [{"role": "user", "content": one, "image": image}]
            for one, image in zip(texts, images, strict=True)
        ]
        return self.apply_chat_template(conversations, **{"add_generation_prompt": True, **options})


def register_processing(config_class):
    """Make the Auto classes know those here, for checkpoints of this configuration class."""
    # Registered for the tower's configuration: transformers prefers a repository's own tokenizer
    # code, where the caller allows remote code, over a class registered for the checkpoint's
    # configuration itself. It finds this class by the name in tokenizer_config.json.
    AutoTokenizer.register(GLM4VVisionConfig, ChatGLM4Tokenizer, exist_ok=True)
    AutoProcessor.register(config_class, GLM4VProcessor, exist_ok=True)
    of_tokenizer = ("tokenizer_config.json", "tokenizer.model")
    of_processor = ("processor_config.json", "preprocessor_config.json", *of_tokenizer)
    for reader, files in ((AutoTokenizer, of_tokenizer), (AutoProcessor, of_processor)):
        wrap_function_wrapper(reader, "from_pretrained", guarded(*files))
    # The mapping behind AutoImageProcessor, because transformers 5.17 exports that class only
    # beside torchvision.
    mapping = image_processing_auto.IMAGE_PROCESSOR_MAPPING
    mapping.register(config_class, {"pil": GLM4VImageProcessor}, exist_ok=True)


def _only_image(image):
    """Undo the nesting of transformers' callers, who also pass a list of images for each text."""
    is_nested = isinstance(image, (list, tuple)) and len(image) < 2
    return next(iter(image), None) if is_nested else image


def _images(conversation) -> list:
    found = (message.image for message in parse_conversation(conversation))
    images = [image for image in found if image is not None]
    if any(image is True for image in images):
        raise ValueError(
            "A message has an image placeholder but no image. Expected the image itself beside it."
            ' Pass as "image" of the message or of its part of type image.'
        )
    return images
