"""Objects that a service prepares once for each served version of a model, such as its codec."""

from collections.abc import Callable
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

from serving.repository.served_model import ServedModel

Prepared = TypeVar("Prepared")


class PerModel(Generic[Prepared]):
    """A cache of objects by served model. Each is made at its first use, and forgotten with the model."""

    def __init__(self, make: Callable[[ServedModel], Prepared]) -> None:
        self._make: Callable[[ServedModel], Prepared] = make
        self._made: WeakKeyDictionary[ServedModel, Prepared] = WeakKeyDictionary()

    def __call__(self, model: ServedModel) -> Prepared:
        """Return the object of a model."""
        try:
            return self._made[model]
        except KeyError:
            made = self._made[model] = self._make(model)
            return made
