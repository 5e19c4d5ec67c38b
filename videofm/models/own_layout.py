"""The adapter of a model that nobody has published: our layout is the public one."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from videofm.errors import CheckpointError
from videofm.models.auxiliary import PlainAdapter
from videofm.models.spec import list_keys


class OwnLayout(PlainAdapter):
    """Tensors keep their names and layouts; the public config is our own config, under a class name of ours.

    Args:
        public_class: the name that `config.json` has under `_class_name`.
        config: our config dataclass.
        modules: the modules, and tensors of its own, that the model consists of; a key of any other is an error both ways.
    """

    def __init__(self, public_class: str, config: type, modules: tuple[str, ...]) -> None:
        super().__init__([], public_class, config)
        self._modules = modules

    def to_public(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`state_dict` itself.

        Raises:
            CheckpointError: a key that this model does not have.
        """
        if unknown := [key for key in state_dict if key.partition(".")[0] not in self._modules]:
            raise CheckpointError(f"{list_keys(unknown)} is not a tensor of this model, which has {', '.join(self._modules)}.")
        return dict(state_dict)

    def from_public(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`state_dict` itself; raises as `to_public`."""
        return self.to_public(state_dict)
