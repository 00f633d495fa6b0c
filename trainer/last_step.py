"""Training that a signal asked to stop finishes its step, which is logged and saved."""

from __future__ import annotations

from transformers import TrainerCallback

from trainer.stopping import StopSignals


class LastStep(TrainerCallback):
    """Ends training after the step in which the first signal came.

    Args:
        stop: the signals; a first one is left to this callback while training goes on.
    """

    def __init__(self, stop: StopSignals) -> None:
        self._stop = stop

    def on_train_begin(self, args, state, control, **kwargs):
        self._stop.training = True

    def on_step_end(self, args, state, control, **kwargs):
        if self._stop.number:
            control.should_log = control.should_save = control.should_training_stop = True
        return control

    def on_train_end(self, args, state, control, **kwargs):
        self._stop.training = False
