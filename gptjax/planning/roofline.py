"""Predicts the time of a step by a roofline model, which the plan prints with its result.

    step = products + elsewhere + waited + max(0, hidden - products)

- products: FLOPs of matrix products, with rematerialization, at the chip's achievable rate
  (gptjax.planning.chips: 60 % of a data sheet's dense bf16 peak; here the measured rate of the MLP's product)
- elsewhere: with a data sheet, whose 60 % include norms and the like, the optimizer's memory traffic at the sheet's
  bandwidth; on this machine the memory traffic of all other instructions at the measured bandwidth
- waited: collectives over tensor, context or expert, whose results the next product needs, at the link's bandwidth
- hidden: collectives over data and fsdp only, which overlap with products; they cost time only if they take longer
- a collective across nodes has the network bandwidth of its devices within one node
"""

from collections.abc import Iterable
from typing import NamedTuple

from gptjax.planning import collectives
from gptjax.planning.chips import Chip
from gptjax.training.monitoring import metrics

OVERLAPPED = {"data", "fsdp"}


class Work(NamedTuple):
    """Work of a step."""

    flops: int  # of its matrix products over all devices
    model_flops: float  # per token, by metrics.MFU_CONVENTION
    tokens: int


class Transfer(NamedTuple):
    """Communication of a step."""

    axes: tuple[str, ...]
    group: tuple[int, ...]  # the first group of devices
    bytes: float  # sent by each device


class Forecast(NamedTuple):
    """Predicted seconds of a step, and the resulting speed."""

    products: float
    elsewhere: float
    waited: float
    hidden: float
    step: float
    tokens_per_second: float
    mfu: float | None  # None if the chip's peak is unknown


def optimizer_traffic(parameters: int, optimizer: int) -> int:
    """Returns the memory traffic of an update: the state is read and written, the gradient written and read.

    Args:
      parameters, optimizer: bytes on a device.
    """
    return 2 * (parameters + optimizer) + 2 * parameters


def forecast(work: Work, devices: int, traffic: float, transfers: Iterable[Transfer], chip: Chip) -> Forecast:
    """Predicts the time of a step by this module's roofline.

    Args:
      work: work of a step.
      devices: number of devices, which share it evenly.
      traffic: bytes of a device's memory traffic besides matrix products.
      transfers: communication between devices.
      chip: chip of each device.
    """
    products, elsewhere = work.flops / devices / chip.products, traffic / chip.bandwidth
    waited = hidden = 0.0
    for one in transfers:
        seconds = one.bytes / collectives.link(one.group, chip)[1]
        if set(one.axes) <= OVERLAPPED:
            hidden += seconds
        else:
            waited += seconds
    step = products + elsewhere + waited + max(0.0, hidden - products)
    rate = work.tokens / step
    mfu = metrics.mfu(rate, work.model_flops, chip.kind, devices)
    return Forecast(products, elsewhere, waited, hidden, step, rate, mfu)
