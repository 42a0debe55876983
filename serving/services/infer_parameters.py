"""The parameters of a ModelInferRequest and of its tensors."""

from collections.abc import Iterable, Mapping

from protos.inference import inference_pb2 as pb
from serving.errors import InvalidRequest

SHARED_MEMORY = "shared_memory_region"
SEQUENCE = ("sequence_id", "sequence_start", "sequence_end")
#: The parameter of a request that is false if the answer must have contents, and no raw_output_contents.
BINARY_OUTPUT = "binary_data_output"
#: The most characters of a client's text in an error: the error goes out as a header of limited size.
MAX_SHOWN_CHARACTERS = 64


def schedule(parameters: Mapping[str, pb.InferParameter]) -> tuple[float | None, bool]:
    """Return a request's timeout in seconds, or None, and True if it goes before others. Raises InvalidRequest."""
    if not parameters:
        return None, False
    # Each is read by name: a request may carry any number of unknown parameters.
    for name in SEQUENCE:
        if name in parameters and (value := value_of(parameters[name])):
            text = f"{str(value)[:MAX_SHOWN_CHARACTERS]!r}; expected none, since sequences are not supported"
            raise InvalidRequest(f'parameters["{name}"]', text)
    urgent = "priority" in parameters and whole_number(parameters["priority"], 'parameters["priority"]') == 1
    microseconds = "timeout" in parameters and whole_number(parameters["timeout"], 'parameters["timeout"]')
    return microseconds / 1e6 or None, urgent  # 0 means no timeout, as in Triton


def wants_contents(parameters: Mapping[str, pb.InferParameter]) -> bool:
    """Return True if the answer's values must be in contents. Raises InvalidRequest."""
    if BINARY_OUTPUT not in parameters:
        return False
    value = value_of(parameters[BINARY_OUTPUT])
    if not isinstance(value, bool):
        shown = str(value)[:MAX_SHOWN_CHARACTERS]
        raise InvalidRequest(f'parameters["{BINARY_OUTPUT}"]', f"{shown!r}; expected true or false, in bool_param")
    return not value


def alternatives(names: Iterable[str]) -> str:
    """Return names for an error: ``'a', 'b' or 'c'``."""
    *most, last = map(repr, names)
    return f"{', '.join(most)} or {last}" if most else last


def refuse_shared_memory(parameters: Mapping[str, pb.InferParameter], field: str) -> None:
    """Raise InvalidRequest if the parameters of a tensor name a region of shared memory."""
    if SHARED_MEMORY in parameters:
        raise InvalidRequest(
            f'{field}.parameters["{SHARED_MEMORY}"]', "shared memory is not supported; expected the data in the message"
        )


def whole_number(parameter: pb.InferParameter, field: str) -> int:
    """Return a whole number from 0, which clients send in different kinds of parameter. Raises InvalidRequest."""
    value = value_of(parameter)
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 20:
        value = int(value)
    if type(value) is not int or value < 0:
        kind = parameter.WhichOneof("parameter_choice")
        shown = f"{kind} {str(value)[:MAX_SHOWN_CHARACTERS]!r}" if kind else "no value"
        raise InvalidRequest(field, f"{shown}; expected a whole number from 0 up, in int64_param")
    return value


def value_of(parameter: pb.InferParameter) -> bool | int | str | float | None:
    """Return the value of a parameter of any kind, or None if it has none."""
    kind = parameter.WhichOneof("parameter_choice")
    value: bool | int | str | float | None = getattr(parameter, kind) if kind else None
    return value
