"""What an optimizer does to the parameters of a module, by their names: also where these are cut over processes."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_graphon.dynamics import optimizer_preconditioner, read_optimizer_step
from lightning_graphon.pruning.sharding import full_tensor, is_sharded


class OptimizerView:
    """An optimizer and the names of what it trains.

    Args:
        optimizer: Trains parameters of the module.
        module: Names them.
        keep: Whether this process wants what is gathered; where it does not, it only takes part.
    """

    def __init__(self, optimizer: Optimizer, module: nn.Module, keep: bool = True) -> None:
        self.optimizer, self._module, self._keep = optimizer, module, keep
        self._names: dict[Tensor, str] = {}
        self._gathered: dict[str, Tensor] | ValueError | None = None

    @contextmanager
    def read(self) -> Iterator[None]:
        """Inside, `names` and `diagonal` can be asked for, and need no other process.

        To be entered by every process while the module's parameters are those that the optimizer knows, so before the
        weights are gathered.
        """
        self._names = {parameter: name for name, parameter in self._module.named_parameters()}
        try:
            if any(map(is_sharded, self._names)):
                self._gathered = self._gather()
            yield
        finally:
            self._names, self._gathered = {}, None

    def _gather(self) -> dict[str, Tensor] | ValueError:
        try:
            diagonal = optimizer_preconditioner(self.optimizer, self._module)
        except ValueError as error:  # on every process; raised where it is asked for
            return error
        whole = ((name, full_tensor(part)) for name, part in diagonal.items())
        return {name: tensor for name, tensor in whole if self._keep}

    def names(self, group: int) -> set[str]:
        """Names of the parameters in a parameter group."""
        parameters = self.optimizer.param_groups[group]["params"]
        return {self._names[p] for p in parameters if p in self._names}

    def diagonal(self) -> dict[str, Tensor]:
        """The preconditioner by names, whole; empty for SGD.

        Raises:
            ValueError: As `optimizer_preconditioner`.
        """
        if isinstance(self._gathered, ValueError):
            raise self._gathered
        return optimizer_preconditioner(self.optimizer, self._module) if self._gathered is None else self._gathered

    @property
    def adaptive(self) -> bool:
        """Whether there is a preconditioner."""
        return read_optimizer_step(self.optimizer).adaptive
