"""Options of `config.mesh`."""

from dataclasses import dataclass

from gptjax.config.options import option


@dataclass(frozen=True)
class MeshOptions:
    """Devices along each axis; one of them may be -1: all that the other axes leave."""

    data: int = option(-1, "data parallelism: splits the rows of a batch", least=-1)
    fsdp: int = option(
        1, "fully sharded data parallelism: splits rows, parameters, gradients and optimizer state", least=-1
    )
    tensor: int = option(1, "tensor parallelism: splits attention heads, MLP columns and the vocabulary", least=-1)
    context: int = option(1, "context parallelism: splits the tokens of a sequence", least=-1)
    expert: int = option(1, "expert parallelism: splits rows and the experts of a mixture", least=-1)
