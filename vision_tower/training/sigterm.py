"""SIGTERM, as schedulers send it before they take a machine away: finish the step, save, end with code 0.

The code says that nothing failed; the last line says that the run is not done, and the same command goes on. Launchers
that are signalled themselves pass the signal on, wait 30 seconds for the ranks, and end with codes of their own.
"""

from __future__ import annotations

import signal
import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

if TYPE_CHECKING:
    pass


class StopOnSigterm(TrainerCallback):
    """SIGTERM to any rank makes all of them save after the same step and leave the loop."""

    def __init__(self) -> None:
        self.asked = False
        self.stopped_at: int | None = None
        self._before: Any = None
        self._group: Any = None
        self._vote: tuple[torch.Tensor, Any] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the signal over."""
        self._before = signal.signal(signal.SIGTERM, self._ask)
        if args.world_size > 1:
            self._group = dist.new_group(backend="gloo")  # of its own, on the CPU: no step waits for a device

    def _ask(self, *_: Any) -> None:
        self.asked = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save and stop where it was asked for."""
        if self._agreed(args.world_size) and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
            self.stopped_at = state.global_step

    def _agreed(self, world: int) -> bool:
        """Whether some rank was asked. Over several ranks it is the answer of the last step, which nobody waits for."""
        if world == 1:
            return self.asked
        answer = False
        if self._vote is not None:
            flag, work = self._vote
            work.wait()
            answer = bool(flag)
        flag = torch.tensor(int(self.asked))
        self._vote = flag, dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return answer

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Give the signal back."""
        if self._vote is not None:
            self._vote[1].wait()
        signal.signal(signal.SIGTERM, self._before)


def leave_signals_to_the_trainer(_: int) -> None:
    """For loader processes, whom a terminal or a scheduler signals along with the trainer.

    Ctrl-C is the trainer's to tell of; after SIGTERM it still needs them to reach a checkpoint. A second SIGTERM, which
    the loader sends to a process that does not end by itself, ends it.
    """

    def forgive(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, forgive)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = _unless_hung_up


def _unless_hung_up(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The thread that hands tensors over complains of a trainer that hung up, which Ctrl-C makes it do."""
    if not issubclass(kind, (EOFError, ConnectionError)):
        sys.__excepthook__(kind, error, trace)
