"""Where a training computes: device, precision, and how batches get there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from distill.data.batch import Batch
from distill.data.loader import read_ahead
from distill.teacher_score import torch_device

Precision = Literal["auto", "bf16", "fp16", "fp32"]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_PREFETCHED = 2  # batches of each process


@dataclass(frozen=True, slots=True)
class Compute:
    """A device, the type its convolutions compute in, and who prepares its batches."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.bfloat16
    num_workers: int = 0
    """Processes that cut views; 0 is one thread of this process."""

    def autocast(self) -> torch.autocast:
        """What forward passes run under."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32)

    def scaler(self) -> torch.amp.GradScaler:
        """Keeps small gradients of float16 from vanishing; does nothing to other types."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)

    def upload(self, batch: Batch[Tensor]) -> Batch[Tensor]:
        """The batch on this device; from pinned memory the copy waits for nothing."""
        if self.device.type == "cpu":
            return batch
        return batch.mapped(lambda tensor: tensor.to(self.device, non_blocking=True))

    def batches(
        self, make: Callable[[int], Batch[NDArray[Any]]], first: int, end: int
    ) -> Iterator[Batch[Tensor]]:
        """Batches ``first`` to ``end - 1`` in order, prepared while the caller computes.

        The same for any number of processes. What making one raises, this raises.
        """
        pin = self.device.type == "cuda"
        if self.num_workers == 0:
            for made in read_ahead(make, first, end):
                batch = made.mapped(torch.from_numpy)
                yield batch.pin_memory() if pin else batch
            return
        loader = DataLoader(
            _Numbered(make, first, end),
            batch_size=None,
            shuffle=False,
            num_workers=self.num_workers,
            prefetch_factor=_PREFETCHED,
            multiprocessing_context="spawn",  # decoders and torch have threads: a fork could hang
            pin_memory=pin,
            generator=torch.Generator(),  # the global one belongs to the training
            worker_init_fn=_one_thread,
        )
        for made in loader:
            if isinstance(made, BaseException):
                raise made
            yield made


class _Numbered(Dataset[Any]):
    """Batches as torch's DataLoader asks for them."""

    def __init__(self, make: Callable[[int], Batch[NDArray[Any]]], first: int, end: int) -> None:
        self.make, self.first, self.end = make, first, end

    def __len__(self) -> int:
        return self.end - self.first

    def __getitem__(self, index: int) -> Batch[Tensor] | BaseException:
        """A batch, or what went wrong: an error raised here would come out with its traceback."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            return self.make(self.first + index).mapped(torch.from_numpy)
        except Exception as exc:  # noqa: BLE001  (told to the training, which raises it)
            return exc


def _one_thread(_worker: int) -> None:
    import cv2

    cv2.setNumThreads(1)
    torch.set_num_threads(1)


def make_compute(
    device: str = "cpu", precision: Precision = "auto", *, num_workers: int = 0
) -> Compute:
    """By the words of the command line; raises as :func:`torch_device` does."""
    chosen = torch_device(device)
    if precision == "auto":
        can = chosen.type == "cpu" or torch.cuda.is_bf16_supported()
        precision = "bf16" if can else "fp16"
    return Compute(chosen, _DTYPES[precision], num_workers)
