"""How long a step should take: a roofline, stated here and printed beside what it gives.

    step = products + elsewhere + waited + max(0, hidden - products)

- products: FLOPs of the matrix products, those computed again included, at the rate that the chip's products reach
  (gptjax.planning.chips: 60 % of a data sheet's dense bf16 peak; on this machine what the MLP's product reaches)
- elsewhere: of a data sheet's chip, whose 60 % include norms and the like, what the optimizer moves through memory at
  the sheet's bandwidth; on this machine all that XLA's other instructions write and read, at a measured bandwidth
- waited: collectives over tensor, context or expert, whose results the next product needs, at the link's bandwidth
- hidden: those over data and fsdp alone, which can run while products do; only what is longer than these costs time
- a collective that leaves a node goes as fast as the network's share of those of its devices that are in one node
"""

from collections.abc import Iterable
from typing import NamedTuple

from gptjax.planning import collectives
from gptjax.planning.chips import Chip
from gptjax.training.monitoring import metrics

HIDING = {"data", "fsdp"}


class Work(NamedTuple):
    """What a step has to do."""

    flops: int  # of its matrix products, all devices together
    model_flops: float  # per token, by metrics.MFU_CONVENTION
    tokens: int


class Sent(NamedTuple):
    """Bytes that each device sends in a step."""

    axes: tuple[str, ...]
    group: tuple[int, ...]  # of devices, to the first of which it is sent
    bytes: float


class Forecast(NamedTuple):
    """Seconds of a step, and what they mean."""

    products: float
    elsewhere: float
    waited: float
    hidden: float
    step: float
    tokens_per_second: float
    mfu: float | None  # None where the chip's peak is not known


def optimizer_traffic(parameters: int, optimizer: int) -> int:
    """Bytes that an update moves: the state read and written, the gradient written and read.

    Args:
      parameters, optimizer: bytes on a device.
    """
    return 2 * (parameters + optimizer) + 2 * parameters


def forecast(work: Work, devices: int, moved: float, sent: Iterable[Sent], chip: Chip) -> Forecast:
    """How long a step should take, by this file's roofline.

    Args:
      work: of a step.
      devices: that share it evenly.
      moved: bytes through a device's memory that count by themselves.
      sent: between devices.
      chip: what each device is.
    """
    products, elsewhere = work.flops / devices / chip.products, moved / chip.bandwidth
    waited = hidden = 0.0
    for one in sent:
        seconds = one.bytes / collectives.link(one.group, chip)[1]
        if set(one.axes) <= HIDING:
            hidden += seconds
        else:
            waited += seconds
    step = products + elsewhere + waited + max(0.0, hidden - products)
    rate = work.tokens / step
    mfu = metrics.mfu(rate, work.model_flops, chip.kind, devices)
    return Forecast(products, elsewhere, waited, hidden, step, rate, mfu)
