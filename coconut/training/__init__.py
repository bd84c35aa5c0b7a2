"""The training layer: stages, metrics, engine, checkpoint -> trainer."""

from coconut.training.stages import StageManager
from coconut.training.trainer import MultimodalCoTTrainer

__all__ = ["MultimodalCoTTrainer", "StageManager"]
