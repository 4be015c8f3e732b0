"""glm4v_nb: run GLM-4V-9B on several GPUs, real or simulated. Importing it registers the model with transformers."""

from glm4v_nb.model import register

__version__ = "0.1.0"

register()
