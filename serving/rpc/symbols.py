"""The symbols for reflection: the default pool, members of services and messages, and reflection v1."""

from collections.abc import Callable
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_reflection.v1alpha import reflection, reflection_pb2

#: The current name of reflection. Its messages are those of v1alpha.
REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"

_V1ALPHA_PACKAGE = reflection.SERVICE_NAME.rpartition(".")[0]
_V1_PACKAGE = REFLECTION_V1.rpartition(".")[0]


class Symbols:
    """The part of a descriptor pool that reflection uses. Each method raises KeyError for an unknown name."""

    def __init__(self) -> None:
        own = descriptor_pool.DescriptorPool()
        own.AddSerializedFile(_v1_file())
        self._pools = (descriptor_pool.Default(), own)

    def FindFileByName(self, name: str) -> Any:
        """Return a file by its path."""
        return self._first(lambda pool: pool.FindFileByName(name))

    def FindFileContainingSymbol(self, symbol: str) -> Any:
        """Return the file of a symbol, or of a member (a method, a field, a value) of one."""
        try:
            return self._first(lambda pool: pool.FindFileContainingSymbol(symbol))
        except KeyError:
            container, _, member = symbol.rpartition(".")
            if not any(member in members for members in self._members(container)):
                raise
            return self._first(lambda pool: pool.FindFileContainingSymbol(container))

    def FindMessageTypeByName(self, name: str) -> Any:
        """Return a message by its name."""
        return self._first(lambda pool: pool.FindMessageTypeByName(name))

    def FindExtensionByNumber(self, message: Any, number: int) -> Any:
        """Return an extension of a message."""
        return self._first(lambda pool: pool.FindExtensionByNumber(message, number))

    def FindAllExtensions(self, message: Any) -> Any:
        """Return all extensions of a message."""
        return self._first(lambda pool: pool.FindAllExtensions(message))

    def _members(self, container: str) -> list[Any]:
        """Return the members of a service, a message or an enumeration, by their names."""
        found = []
        for find, names in (
            ("FindServiceByName", "methods_by_name"),
            ("FindMessageTypeByName", "fields_by_name"),
            ("FindMessageTypeByName", "oneofs_by_name"),
            ("FindEnumTypeByName", "values_by_name"),
        ):
            for pool in self._pools:
                try:
                    found.append(getattr(getattr(pool, find)(container), names))
                except KeyError:
                    continue
        return found

    def _first(self, find: Callable[[Any], Any]) -> Any:
        for pool in self._pools[:-1]:
            try:
                return find(pool)
            except KeyError:
                continue
        return find(self._pools[-1])


def _v1_file() -> bytes:
    """Return the file of reflection v1: that of v1alpha with another package."""
    file = descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(file)
    file.name = file.name.replace("v1alpha", "v1")
    file.package = _V1_PACKAGE
    old, new = f".{_V1ALPHA_PACKAGE}.", f".{_V1_PACKAGE}."
    for message in file.message_type:
        for field in message.field:
            if field.type_name:  # otherwise it would be set to an empty name
                field.type_name = field.type_name.replace(old, new)
    for service in file.service:
        for method in service.method:
            method.input_type = method.input_type.replace(old, new)
            method.output_type = method.output_type.replace(old, new)
    return file.SerializeToString()
