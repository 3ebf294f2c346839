"""torch's SGD, Adam and AdamW with Gradient Centralization inside the step."""

from gradcentral.optim.adam import Adam, AdamW
from gradcentral.optim.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW"]
