"""Training a head on stored features: configuration, loss, loop, and going on after a stop."""

from sam3cache.training.config import TrainConfig
from sam3cache.training.experiments import (
    PlannedRun,
    plan_runs,
    read_experiments,
    run_experiments,
)
from sam3cache.training.loop import Progress, TrainResult, train
from sam3cache.training.loss import build_loss, default_loss, dice_bce_loss
from sam3cache.training.outlook import Outlook, look_ahead
from sam3cache.training.summary import RunOutcome
from sam3cache.training.together import train_together

__all__ = [
    "Outlook",
    "PlannedRun",
    "Progress",
    "RunOutcome",
    "TrainConfig",
    "TrainResult",
    "build_loss",
    "default_loss",
    "dice_bce_loss",
    "look_ahead",
    "plan_runs",
    "read_experiments",
    "run_experiments",
    "train",
    "train_together",
]
