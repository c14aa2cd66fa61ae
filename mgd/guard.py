"""What ends or endangers a run while it trains: signals, and losses that are no number."""

import contextlib
import json
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

from mgd.checkpoint import plain, state_tensors
from mgd.errors import Stopped, UserError
from mgd.files import write_aside
from mgd.methods.base import StepOutput

MAX_SKIPPED_IN_A_ROW = 20


class StopSignals:
    """Notes SIGTERM and Ctrl-C, so that the loop can finish its step and write a resume point.

    A second signal, and one that comes while `at_once` holds, ends the run where it is.
    """

    def __init__(self) -> None:
        self.received = 0
        self._immediate = ""

    def __enter__(self) -> "StopSignals":
        """Take over both signals; only a process's main thread can."""
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        """Give them back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def at_once(self, message: str) -> Iterator[None]:
        """Let a signal end the run immediately, with this message: nothing would be lost."""
        if self.received:
            raise Stopped(self.received, message)
        self._immediate = message
        try:
            yield
        finally:
            self._immediate = ""

    def _note(self, number: int, _: FrameType | None) -> None:
        if self._immediate:
            raise Stopped(number, self._immediate)
        if self.received:
            raise Stopped(number)
        self.received = number


class Guard:
    """Looks at every step's loss before the optimiser does, and at the signals; all processes agree.

    Args:
        action: "raise", or "skip" the step of a loss that is not finite.
        folder: run folder; the batch and the weights of such a step are written to `nonfinite/`.
        modules: networks by name.
        accelerator: device and processes.
        skipped: steps skipped in earlier sittings.
    """

    def __init__(
        self, action: str, folder: Path, modules: Mapping[str, nn.Module], accelerator: Accelerator, skipped: int = 0
    ) -> None:
        self.action, self.folder, self.accelerator = action, folder / "nonfinite", accelerator
        self.modules, self.skipped, self._in_a_row = modules, skipped, 0
        # Batch statistics of a bad batch must not stay when its step is skipped.
        self._buffers = [buffer for module in modules.values() for buffer in module.buffers()]
        self._kept: list[Tensor] = []

    def before(self) -> None:
        """Remember what a skipped step must not change."""
        if self.action == "skip":
            self._kept = [buffer.clone() for buffer in self._buffers]

    def look(self, step: int, out: StepOutput, batch: Mapping[str, Any], signal_number: int) -> tuple[bool, int]:
        """Exchange what the processes have seen of this step.

        Args:
            step: number of the step, from 0.
            out: its loss and named terms.
            batch: this process's part of the batch.
            signal_number: signal that this process has received, or 0.

        Returns:
            Whether the optimiser may use the gradients, and a signal that any process has received.

        Raises:
            UserError: the loss is not finite, and the recipe does not say to skip it.
        """
        terms = {"loss": out.loss, **out.log}
        finite = torch.isfinite(torch.stack([term.detach().float() for term in terms.values()]))
        signals = torch.tensor(signal_number, device=finite.device)
        mine = torch.stack([(~finite).sum(), (~torch.isfinite(self._gradient_norm())).long(), signals])
        bad_terms, bad_gradient, received = self.accelerator.gather(mine[None]).amax(dim=0).tolist()
        if not bad_terms and not bad_gradient:
            self._in_a_row = 0
            return True, received
        names = [name for name, good in zip(terms, finite.tolist(), strict=True) if not good]
        if bad_gradient and (names or not bad_terms):  # all share it: it says nothing of a process whose terms are good
            names.append("gradient")
        if names:
            self._write(step, names, batch)
        self._skip_or_raise(step, names, batch, say=print if bad_terms else self.accelerator.print)
        return False, received

    def stop_if_asked(self, signal_number: int, message: str) -> None:
        """End the run if any process has received a signal; called on all processes.

        Raises:
            Stopped: with this message.
        """
        mine = torch.tensor([signal_number], device=self.accelerator.device)
        if received := int(self.accelerator.gather(mine).max()):
            raise Stopped(received, message)

    def _gradient_norm(self) -> Tensor:
        # A finite loss can have a gradient that is not; it would ruin the weights a step before it shows.
        parameters = (parameter for module in self.modules.values() for parameter in module.parameters())
        return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

    def _skip_or_raise(self, step: int, names: list[str], batch: Mapping[str, Any], say: Callable[..., None]) -> None:
        self.skipped += 1
        self._in_a_row += 1
        which = f"{', '.join(names)} is" if names else "the loss of another process is"
        what = f"{self.folder.parent}: {which} not finite at step {step + 1}"
        ids = sorted({str(name) for key in ("id", "unlabeled_id", "mix_id") for name in batch.get(key, ())})
        if self.action == "skip" and self._in_a_row <= MAX_SKIPPED_IN_A_ROW:
            for buffer, kept in zip(self._buffers, self._kept, strict=True):
                buffer.copy_(kept)
            if names:
                say(f"note: {what}; the step is skipped, {self.skipped} so far", flush=True)
            return
        resumable = (self.folder.parent / "checkpoint").exists()
        kept = "; the last resume point is kept (--restart: anew)" if resumable else ""
        again = f", {self._in_a_row} times in a row" if self.action == "skip" else ""
        mine = f"; images {', '.join(ids)}" if names else ""
        skip = "" if self.action == "skip" else ', or set [optim] nonfinite = "skip"'
        raise UserError(
            f"{what}{again}{mine}; batch and weights are in {self.folder}; lower [optim] lr or the weight of that "
            f"term{skip}{kept}"
        )

    def _write(self, step: int, names: list[str], batch: Mapping[str, Any]) -> None:
        """Write what reproduces the step: the batch as the method saw it, and the weights before it.

        Running statistics, if there are any, have seen the batch.
        """
        tensors = plain({key: value for key, value in batch.items() if isinstance(value, Tensor)})
        ids = {key: [str(name) for name in value] for key, value in batch.items() if not isinstance(value, Tensor)}
        header = {"step": str(step), "terms": json.dumps(names), "ids": json.dumps(ids)}
        rank = self.accelerator.process_index
        write_aside(self.folder / f"batch_{rank}.safetensors", lambda path: save_file(tensors, path, metadata=header))
        weights = state_tensors(self.modules)
        write_aside(self.folder / f"weights_{rank}.safetensors", lambda path: save_file(weights, path))
