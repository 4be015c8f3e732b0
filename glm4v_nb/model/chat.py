"""From a conversation to the ids of a prompt.

A prompt is ``[gMASK]<sop>``, then for each message ``<|role|>{metadata}\\n``, the image's three ids
if it has one, and its text; then ``<|assistant|>`` if the model is to answer. Nothing closes a
message: the next role token does.
"""

from dataclasses import dataclass
from typing import Any

from glm4v_nb.model.image_processing import IMAGE_FORMS, IMAGE_TYPES

PREFIX = ("[gMASK]", "<sop>")
# The middle token is where the model puts the image's features.
IMAGE_TOKENS = ("<|begin_of_image|>", "<|endoftext|>", "<|end_of_image|>")
MESSAGE_KEYS = ("role", "content", "image", "metadata", "tools", "tool_calls")
PART_KEYS = {
    "text": ("type", "text"),
    "image": ("type", "image", "path", "url"),
    "image_url": ("type", "image_url"),
}
ROLES = ("system", "user", "assistant", "observation")
_RENDERED = f"{''.join(PREFIX)}<|"  # how a rendered prompt begins
_PICTURE_WORDS = ("image", "img", "picture", "pixel", "photo", "video")
# Options of transformers' chat templates that this format does not have, and what to do instead.
_IMAGE_ADVICE = 'Put the image into its message: {"role": "user", "image": image, "content": …}.'
_OPTION_ADVICE = {
    **dict.fromkeys(("images", "image", "pixel_values"), _IMAGE_ADVICE),
    "videos": "Put one frame into its message as an image.",
    "tools": "Describe the tools in a message of role system.",
    "documents": "Put the documents' text into a message.",
    "chat_template": "Leave chat_template out.",
    "truncation": "Cutting ids could cut the image's placeholder: leave messages out instead.",
    "return_assistant_tokens_mask": "Encode the conversation up to each answer to find its start.",
}


@dataclass(frozen=True, eq=False)
class Message:
    """One message in one form. ``image`` is the image, True for a placeholder, or None."""

    role: str
    text: str
    metadata: str = ""
    image: Any = None


def is_batch(conversation) -> bool:
    """Whether this is a list of conversations; TypeError, ValueError if neither, or empty."""
    if hasattr(conversation, "messages"):  # a Chat of transformers' pipelines
        return False
    if not isinstance(conversation, (list, tuple)):
        expected = 'a list of messages such as [{"role": "user", "content": "Hello"}], or a list of'
        advice = " such lists. Put the message into a list."
        raise _wrong_type("The conversation", conversation, expected + advice)
    if not conversation:
        expected = "Expected at least one message. Add a message of role user."
        raise ValueError(f"The conversation is empty. {expected}")
    return isinstance(conversation[0], (list, tuple)) or hasattr(conversation[0], "messages")


def parse_conversation(messages) -> list[Message]:
    """Read messages in the original form or in transformers' form, also mixed.

    * Original: ``{"role": "user", "image": image, "content": "text"}``, with an optional "metadata"
      (the text after the role token, such as the name of a tool).
    * transformers: ``{"role": "user", "content": parts}``, a part being ``{"type": "text", "text":
      "text"}`` or ``{"type": "image", "image": image}``, the image under "image", "path" or "url",
      or ``{"type": "image_url", "image_url": {"url": "data:image/png;base64,…"}}``.

    An image is what ``image_processing.load_image`` takes; True, or a part without an image, makes
    only the placeholder. It stands before the text of its message, as in the model's training data.
    Text parts are joined as they are. A message with neither text nor image adds nothing.

    Raises:
        ValueError: no message with anything in it, an unknown role or part, or more than one image.
        TypeError: something is of another type.
    """
    messages = getattr(messages, "messages", messages)
    if not isinstance(messages, (list, tuple)):
        expected = "every one to be a list of messages. Do not mix messages and conversations."
        raise _wrong_type("A conversation of the batch", messages, expected)
    parsed = [_parse_message(number, message) for number, message in enumerate(messages, start=1)]
    parsed = [message for message in parsed if message.text or message.image is not None]
    if not parsed:
        raise ValueError(
            "The conversation is empty: no message has text or an image. Expected at least one that"
            " has. Give a message of role user some content."
        )
    _check_image_count(sum(message.image is not None for message in parsed))
    return parsed


def prompt_pieces(messages: list[Message], add_generation_prompt: bool) -> list[tuple[bool, str]]:
    """The prompt as (is a special token, text), each encoded by itself, so that no text can spell a
    special token."""
    pieces = [(True, token) for token in PREFIX]
    for message in messages:
        pieces += [(True, f"<|{message.role}|>"), (False, f"{message.metadata}\n")]
        if message.image is not None:
            pieces += [(True, token) for token in IMAGE_TOKENS]
        pieces.append((False, message.text))
    return pieces + [(True, "<|assistant|>")] * add_generation_prompt


def refuse_rendered(text: str):
    """Raise ValueError for a rendered prompt given as text: its special tokens would be letters."""
    if text.startswith(_RENDERED):
        raise ValueError(
            "The text is a rendered prompt. Expected a plain question: special tokens in text"
            " stay ordinary text here. Pass the messages to apply_chat_template(messages,"
            " add_generation_prompt=True)."
        )


def refuse_pictures(options: dict, advice: str):
    """Raise ValueError if one of these options, which nothing reads, is a picture by its name."""
    for name, given in options.items():
        if given is not None and any(word in name.lower() for word in _PICTURE_WORDS):
            raise ValueError(f"{name} is set, and the picture would be lost. {advice}")


def refuse_options(options: dict):
    """Take out of ``options`` what this format does not have; ValueError where it is set."""
    for name, advice in _OPTION_ADVICE.items():
        given = options.pop(name, None)
        if given is not None and (hasattr(given, "shape") or given):  # arrays have no truth
            why = "GLM-4V's conversation format is fixed and has no such option."
            raise ValueError(f"{name} is set, but {why} {advice}")


def _parse_message(number, message) -> Message:
    where = f"Message {number}"
    if not isinstance(message, dict):
        form = '{"role": "user", "content": …}'
        raise _wrong_type(where, message, f"a dictionary with role and content. Write {form}.")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(
            f"{where} has the role {role!r}. Expected one of {', '.join(ROLES)}. "
            "A tool's result has the role observation."
        )
    if message.get("tools") or message.get("tool_calls"):
        raise ValueError(
            f"{where} has tools or tool calls. Expected role, content, image and metadata"
            " only. Describe the tools in a system message; a call is an assistant message with"
            " the tool's name as metadata."
        )
    _refuse_unknown_keys(where, message, MESSAGE_KEYS)
    metadata = message.get("metadata") or ""
    if not isinstance(metadata, str):
        expected = "text, such as the name of a tool. Leave it out if there is none."
        raise _wrong_type(f"{where}: metadata", metadata, expected)
    if content is None or isinstance(content, str):
        content = [{"type": "text", "text": content or ""}]
    if not isinstance(content, (list, tuple)):
        expected = "text, or a list of parts of type text and image. Pass one of these."
        raise _wrong_type(f"{where}: content", content, expected)
    text, images = _parse_parts(where, content)
    if message.get("image") is not None and message["image"] is not False:
        images.insert(0, message["image"])
    _check_image_count(len(images))
    for image in images:
        if image is not True and not isinstance(image, IMAGE_TYPES):
            raise _wrong_type(f"{where}: the image", image, f"{IMAGE_FORMS} Pass one of these.")
    return Message(role=role, text=text, metadata=metadata, image=images[0] if images else None)


def _parse_parts(where, parts) -> tuple[str, list]:
    texts, images = [], []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in PART_KEYS:
            _refuse_unknown_keys(f"{where}, a part of type {kind}", part, PART_KEYS[kind])
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url" and part.get("image_url"):
            address = part["image_url"]  # as in requests to OpenAI's interface
            images.append(address.get("url") if isinstance(address, dict) else address)
        elif kind == "image":
            given = [part[key] for key in ("image", "path", "url") if part.get(key) is not None]
            images += given or [True]
        else:
            raise ValueError(
                f'{where}: a content part is {part!r:.80}. Expected {{"type": "text",'
                ' "text": "…"} or {"type": "image", "image": …}. Rewrite the part.'
            )
    return "".join(texts), images


def _refuse_unknown_keys(where: str, given: dict, known: tuple[str, ...]):
    """What is not read would be missing from the question without a word."""
    unknown = [key for key, value in given.items() if key not in known and value is not None]
    if unknown:
        raise ValueError(
            f"{where} has {', '.join(map(repr, unknown))}, which would not be read. Expected only"
            f' {", ".join(map(repr, known))}. An image stands under "image" of its message or of'
            ' a part of type image, text under "content" or in a part of type text.'
        )


def _wrong_type(what: str, value, expected_and_advice: str) -> TypeError:
    return TypeError(f"{what} is a {type(value).__name__}. Expected {expected_and_advice}")


def _check_image_count(count: int):
    if count > 1:
        raise ValueError(
            f"The conversation has {count} images. The model sees one image in a conversation,"
            " which stays in view in later turns. Keep one of them, or ask about each in a"
            " conversation of its own."
        )
