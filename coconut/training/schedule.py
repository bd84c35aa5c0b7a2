"""When a stage is validated and when it ends: after epochs, after steps, at a target, or on a plateau.

Functions of TrainState and settings alone, so that a run stopped in the middle of its patience goes on with it.
"""

from __future__ import annotations

from coconut.training.stages import StageSettings
from coconut.training.state import TrainState


def is_at_bound(state: TrainState, settings: StageSettings, epoch_ended: bool) -> bool:
    """Whether the stage has had all the steps or epochs that it may take."""
    if settings.steps is not None:
        return state.stage_step >= settings.steps
    assert settings.epochs is not None
    return epoch_ended and state.stage_epoch >= settings.epochs


def is_validation_due(
    state: TrainState, settings: StageSettings, epoch_ended: bool, every_n_epochs: int, every_n_steps: int | None
) -> bool:
    """Whether the weights as they are have to be looked at; never twice at the same step."""
    if state.stage_step == 0 or state.validated_step == state.step:
        return False
    if every_n_steps is not None:
        due = state.stage_step % every_n_steps == 0
    else:
        due = epoch_ended and state.stage_epoch % every_n_epochs == 0
    return due or is_at_bound(state, settings, epoch_ended)


def reason_to_end(state: TrainState, settings: StageSettings) -> str | None:
    """Why the stage ends after the validation just made, before its bound; None where it goes on."""
    if settings.advance_at is not None and state.validation["full_match"] >= settings.advance_at:
        return f"{state.validation['full_match']:.1%} of the texts match"
    if settings.patience is not None and state.validations_without_gain >= settings.patience:
        return f"no gain in {settings.patience} validations" if state.stage_step >= settings.min_steps else None
    return None
