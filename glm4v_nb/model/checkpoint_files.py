"""What a stranger's checkpoint may be: plain files with known contents, and never code."""

from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from huggingface_hub import snapshot_download
from pydantic import BaseModel, Field, ValidationError, create_model

from simgpu.checkpoints import INDEX, file_in, read_json

SMALL_FILES = ("config.json", "generation_config.json", "tokenizer_config.json")
SMALL_FILES += ("preprocessor_config.json", "processor_config.json", INDEX, "tokenizer.model")
LFS_POINTER = b"version https://git-lfs"
# Code that the official files name; the classes here stand for it.
_OFFICIAL_CODE = {"configuration_chatglm", "modeling_chatglm", "tokenization_chatglm"}

# Far above every released checkpoint, and small enough that no product of two overflows.
Size = Annotated[int, Field(strict=True, ge=1, le=2**24)]
LayerCount = Annotated[int, Field(strict=True, ge=1, le=4096)]
TokenId = Annotated[int, Field(strict=True, ge=0, le=2**24)]
Positive = Annotated[float, Field(strict=True, gt=0, le=2**40)]
Flag = Annotated[bool, Field(strict=True)]
_TokenIds = TokenId | list[TokenId] | None
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class _GenerationFile(BaseModel, extra="allow"):
    """generation_config.json: numbers and switches; what else transformers knows needs objects that
    are no part of a checkpoint, or code from the hub."""

    bos_token_id: _TokenIds = None
    eos_token_id: _TokenIds = None
    pad_token_id: TokenId | None = None
    suppress_tokens: _TokenIds = None
    max_new_tokens: Size | None = None
    num_beams: Annotated[int, Field(strict=True, ge=1, le=256)] | None = None
    num_return_sequences: Literal[1] | None = None
    do_sample: Flag | None = None
    repetition_penalty: Positive | None = None
    cache_implementation: Literal["static", "dynamic"] | None = None
    transformers_version: str | None = None
    # These need more than numbers: a second model, a tokenizer, the image once more.
    assistant_early_exit: None = None
    is_assistant: Literal[False] | None = None
    prefill_chunk_size: None = None
    cache_config: None = None
    compile_config: None = None
    watermarking_config: None = None
    stop_strings: None = None
    token_healing: Literal[False] | None = None
    __pydantic_extra__: dict[str, Flag | Number | None]


class _Named(BaseModel, extra="forbid"):
    """An enumeration's value or a granularity, as torchao writes them."""

    kind: Literal["Int4PackingFormat", "Int4ChooseQParamsAlgorithm", "PerRow"] = Field(
        alias="_type"
    )
    data: str | dict[str, int] = Field(alias="_data")
    version: int = Field(1, alias="_version")


class _WeightOnly(BaseModel, extra="forbid"):
    # torchao looks this name up among all that some modules of its own hold, and calls it.
    kind: Literal["Int8WeightOnlyConfig", "Int4WeightOnlyConfig"] = Field(alias="_type")
    data: dict[str, _Named | Flag | Size | None] = Field(alias="_data")
    version: int = Field(1, alias="_version")


class _Default(BaseModel, extra="forbid"):
    default: _WeightOnly


class _TorchAo(BaseModel):
    quant_method: Literal["torchao"]
    quant_type: _Default
    include_input_output_embeddings: Flag = False
    untie_embedding_weights: Flag = False


class _BitsAndBytes(BaseModel):
    quant_method: Literal["bitsandbytes"]
    load_in_4bit: Flag = False
    load_in_8bit: Flag = False


# Quantisers whose weights are plain safetensors, and that fetch no code from the hub.
Quantiser = Annotated[_BitsAndBytes | _TorchAo, Field(discriminator="quant_method")]


def schema_of(config_class: type) -> type[BaseModel]:
    """The annotated fields of a class, all required, as what ``check_values`` compares with."""
    fields = {name: (kind, ...) for name, kind in config_class.__annotations__.items()}
    return create_model(config_class.__name__, **fields)


def check_values(where: str, schema: type[BaseModel], values: dict):
    """Raise ValueError that names the first of these values which is not as the schema says."""
    try:
        schema.model_validate(values)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        # Behind the first name pydantic also says which of several types it tried.
        name, *inner = fault["loc"]
        if isinstance(values.get(name), dict):
            name = ".".join([name, *(key for key in inner if key in values[name])])
        raise ValueError(
            f"{where}: {name} is {fault['input']!r:.60}; {fault['msg']}. Correct it, or download"
            " the file again."
        ) from error


def check_auto_map(where: str, auto_map):
    """Raise ValueError for an ``auto_map`` that names code other than the official one's."""
    named = auto_map if isinstance(auto_map, dict) else {"auto_map": auto_map or []}
    for references in named.values():
        for reference in references if isinstance(references, list) else [references]:
            module = str(reference).rpartition("--")[2].partition(".")[0]
            if reference is not None and module not in _OFFICIAL_CODE:
                raise ValueError(
                    f"{where}: auto_map names {str(reference)!r:.100}, code that comes with the"
                    " checkpoint and is never run here. Expected files of GLM-4V-9B, whose code the"
                    " classes of glm4v_nb stand for. Load zai-org/glm-4v-9b or a fine-tune of it."
                )


def check_files(directory: Path):
    """Look at every small file of a checkpoint's directory before a library reads one.

    Raises:
        ValueError: a file leads elsewhere, cannot be read, holds no JSON object or values of wrong
            types, or names code; an adapter, which names another checkpoint.
    """
    if (directory / "adapter_config.json").is_file():
        refuse_adapter(directory)
    for name in (*SMALL_FILES, "model.safetensors"):
        path = file_in(directory, name)
        if path.is_file() and path.suffix == ".json" and name != INDEX:
            content = read_json(path)
            check_auto_map(str(path), content.get("auto_map"))
            if name == "generation_config.json":
                check_values(str(path), _GenerationFile, content)


def guarded(*files: str):
    """A wrapper for ``from_pretrained`` of an Auto class, which reads these files.

    In a directory of this model, and no other, nobody is asked whether code may run, and errors of
    the libraries become one sentence.
    """

    def from_pretrained(wrapped, _, args, kwargs):
        source = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        directory = Path(str(source), kwargs.get("subfolder") or "")
        if not _is_of_this_model(directory / "config.json"):
            return wrapped(*args, **kwargs)
        paths = [directory / name for name in files if (directory / name).is_file()]
        for path in [] if kwargs.get("trust_remote_code") else paths:
            if path.suffix == ".json":
                check_auto_map(str(path), read_json(path).get("auto_map"))
        with reading(f"{directory}: {' or '.join(files)}"):
            return wrapped(*args, **kwargs)

    return from_pretrained


def _is_of_this_model(config_file: Path) -> bool:
    try:
        content = read_json(config_file)
    except (OSError, ValueError):
        return False
    return content.get("model_type") == "chatglm" and content.get("vision_config") is not None


def refuse_adapter(directory):
    """Raise the ValueError for an adapter in place of a checkpoint."""
    raise ValueError(
        f"{directory} holds a LoRA adapter (adapter_config.json), which names another checkpoint,"
        " and none is loaded unasked. Load the checkpoint it was trained on, then"
        " PeftModel.from_pretrained(model, directory)."
    )


def local_directory(checkpoint: str | Path, files: tuple[str, ...], **options) -> str | Path:
    """The directory of a checkpoint: itself, or these files of the hub's, downloaded. ``options``
    are those of ``from_pretrained``. FileNotFoundError if the hub does not give them."""
    if Path(checkpoint).is_dir():
        return checkpoint
    if options.get("subfolder"):
        files = tuple(f"{options['subfolder']}/{file}" for file in files)
    known = ("revision", "token", "cache_dir", "local_files_only", "force_download")
    options = {name: options[name] for name in known if name in options}
    try:
        return snapshot_download(str(checkpoint), allow_patterns=list(files), **options)
    except OSError as error:
        raise FileNotFoundError(
            f"{checkpoint} is no directory, and the hub does not give it: {_in_one_line(error)}"
            " Check name, revision and connection, or give the directory of a download."
        ) from error


@contextmanager
def reading(file: Path | str):
    """Errors of the libraries that read this file become one sentence; our own pass."""
    try:
        yield
    except Exception as error:
        trace = error.__traceback__
        while trace.tb_next:
            trace = trace.tb_next
        if trace.tb_frame.f_globals.get("__name__", "").startswith(("glm4v_nb.", "simgpu.")):
            raise
        raise ValueError(
            f"{file} cannot be used ({type(error).__name__}: {_in_one_line(error)}). Expected the"
            " official file of GLM-4V-9B. Download it again."
        ) from error


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
