"""SIGTERM, which schedulers send before they reclaim a machine: finish the step, save, exit with code 0.

Code 0 because nothing failed; the last line says that the run is incomplete and that the same command resumes it.
Launchers that get the signal themselves forward it, wait 30 seconds for the ranks, and exit with their own code.
"""

from __future__ import annotations

import signal
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback


class StopOnSigterm(TrainerCallback):
    """On SIGTERM to any rank, makes all ranks save after the same step and end training."""

    def __init__(self) -> None:
        self.requested = False  # this rank got the signal
        self.stopped_at: int | None = None  # step after which training ended early
        self._previous_handler: Any = None
        self._group: Any = None
        self._vote: tuple[torch.Tensor, Any] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Install the signal handler."""
        self._previous_handler = signal.signal(signal.SIGTERM, self._request)
        if args.world_size > 1:
            # A CPU group of its own: the vote does not make a step wait for the device.
            self._group = dist.new_group(backend="gloo")

    def _request(self, *_: Any) -> None:
        self.requested = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save and stop if any rank got the signal."""
        if self._any_rank_requested(args.world_size) and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
            self.stopped_at = state.global_step

    def _any_rank_requested(self, world: int) -> bool:
        """Return True if any rank got SIGTERM (all-reduced asynchronously, so one step late)."""
        if world == 1:
            return self.requested
        answer = False
        if self._vote is not None:
            flag, work = self._vote
            work.wait()
            answer = bool(flag)
        flag = torch.tensor(int(self.requested))
        self._vote = flag, dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return answer

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Restore the previous signal handler."""
        if self._vote is not None:
            self._vote[1].wait()
        signal.signal(signal.SIGTERM, self._previous_handler)
