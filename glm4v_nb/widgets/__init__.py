"""ipywidgets on top of inference: ``PromptPanel``."""

from glm4v_nb.widgets.panel import PromptPanel

__all__ = ["PromptPanel"]
