"""Training a head on stored features: configuration, loss, loop, and resuming to the bit."""

from sam3cache.training.config import TrainConfig
from sam3cache.training.loop import Progress, TrainResult, train
from sam3cache.training.loss import dice_bce_loss

__all__ = ["Progress", "TrainConfig", "TrainResult", "dice_bce_loss", "train"]
