"""The end of a step, at which the processes of a run meet: does one of them have to stop?

Training that a signal asked to stop finishes its step, which is logged and saved.
"""

from __future__ import annotations

from collections.abc import Callable

from transformers import TrainerCallback

from groundkern.trainer.ranks import Ranks
from groundkern.trainer.stopping import StopSignals


class LastStep(TrainerCallback):
    """Ends training after the step in which the first signal came to any of the processes.

    Args:
        stop: the signals; a first one is left to this callback while training goes on.
        ranks: the processes.
        news: whether this process has something that the others should know now.
        exchange: tells them; called in all of them together.
    """

    def __init__(
        self,
        stop: StopSignals,
        ranks: Ranks,
        news: Callable[[], bool],
        exchange: Callable[[], None],
    ) -> None:
        self._stop, self._ranks, self._news, self._exchange = stop, ranks, news, exchange

    def on_train_begin(self, args, state, control, **kwargs):
        self._stop.training = True

    def on_step_end(self, args, state, control, **kwargs):
        number, news = self._ranks.highest([self._stop.number, int(self._news())])
        self._stop.agree(number)
        if number:
            control.should_log = control.should_save = control.should_training_stop = True
        last = state.global_step >= state.max_steps
        if news or last or control.should_log or control.should_save:
            self._exchange()
        return control

    def on_train_end(self, args, state, control, **kwargs):
        self._stop.training = False
