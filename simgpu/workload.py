"""What is run: the sizes of an inference, or of a training step."""

from dataclasses import dataclass

TRAINED = ("everything", "decoder", "lora")
OPTIMIZERS = ("", "adamw")
# Beyond any card: of so many samples the logits of one position alone take 300 GB.
MOST_SAMPLES = 2**20


@dataclass(frozen=True)
class Workload:
    """Sizes of a run; ValueError for one that cannot be run.

    ``text_tokens`` counts prompt tokens per sample without the images' positions; ``images`` is per
    sample. Of a model with an encoder the prompt is the encoder's. With ``train`` it is one
    training step: ``trained`` names the weights it changes ("everything", "decoder" for all but the
    image tower, "lora" for small matrices added to the decoder's attention), ``optimizer`` the one
    whose first update follows the backward pass ("" for none, "adamw").
    """

    batch_size: int = 1
    images: int = 0
    text_tokens: int = 32
    new_tokens: int = 0
    train: bool = False
    gradient_checkpointing: bool = False
    trained: str = "everything"
    optimizer: str = ""

    def __post_init__(self):
        smallest = {"batch_size": 1, "text_tokens": 1, "new_tokens": 0, "images": 0}
        for name, least in smallest.items():
            size, expected = getattr(self, name), f"expected a whole number of at least {least}."
            if not isinstance(size, int) or isinstance(size, bool) or size < least:
                raise ValueError(f"{name} is {size!r}; {expected}")
        if self.batch_size > MOST_SAMPLES:
            raise ValueError(
                f"batch_size is {self.batch_size}; expected at most {MOST_SAMPLES}, which is more"
                " than any card holds. Lower it; fit --limits finds the largest that fits."
            )
        if self.gradient_checkpointing and not self.train:
            raise ValueError(
                "gradient_checkpointing saves memory of the backward pass and does nothing in"
                " inference. Set train as well, or leave it out."
            )
        for name, expected in (("trained", TRAINED), ("optimizer", OPTIMIZERS)):
            choice = getattr(self, name)
            if choice not in expected:
                choices = ", ".join(map(repr, expected))
                raise ValueError(f"{name} is {choice!r}; expected one of {choices}.")
            if choice != expected[0] and not self.train:
                advice = "Set train as well, or leave it out."
                raise ValueError(f"{name} is {choice!r}, which is for training. {advice}")
