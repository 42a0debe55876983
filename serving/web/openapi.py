"""The description of the routes in OpenAPI 3.1, made of the route table and the messages' descriptors."""

from typing import cast

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message

from serving.web.forms import MULTIPART, PICTURE, PICTURES, enum_names, parameters_of
from serving.web.incoming import BYTES, JSON
from serving.web.json_messages import Json
from serving.web.problems import PROBLEM
from serving.web.routes import ROUTES, Answer, Body, Route
from serving.web.tensors import DTYPES

Schema = dict[str, Json]

_TIMEOUT_HEADER: Schema = {
    "name": "x-request-timeout",
    "in": "header",
    "description": "Seconds after which the client needs no answer.",
    "schema": {"type": "number", "exclusiveMinimum": 0, "maximum": 1e8},
}
_BINARY: Schema = {"type": "string", "contentMediaType": BYTES}
_INTEGERS = {
    FieldDescriptor.TYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_SINT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_UINT64: (0, 2**64 - 1),
}
_PLACES = {"name": "The model.", "version": "The version of the model."}


def describe(version: str) -> Schema:
    """Return the description of this server. version: the server's own."""
    schemas = _Schemas()
    paths: dict[str, Json] = {}
    for route in ROUTES:
        item = paths.setdefault(route.path, {})
        assert isinstance(item, dict)
        item[route.verb.lower()] = _operation(route, schemas)
    for path, member in (("/v2/health/live", "live"), ("/v2/health/ready", "ready")):
        answer = _json(_object({member: {"type": "boolean"}}, [member]))
        paths[path] = {
            "get": {
                "operationId": f"get{path.replace('/', '_')}",
                "summary": f"Tell if the server is {member}",
                "security": [],
                "responses": {
                    "200": {"description": f"{member}", "content": answer},
                    "503": {"description": f"not {member}, or the server stops", "content": {**answer, **_problem()}},
                    "default": {"description": "The request is refused.", "content": _problem()},
                },
            }
        }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "capsnet-serving",
            "version": version,
            "summary": "Classification by capsule networks, with a look inside, and the Open Inference Protocol",
        },
        "paths": paths,
        "components": {
            "schemas": {**schemas.found, **_fixed_schemas()},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"token": []}],
    }


class _Schemas:
    """The schemas of messages, by name, which refer to each other."""

    def __init__(self) -> None:
        self.found: Schema = {}

    def of(self, kind: Descriptor, complete: bool) -> Schema:
        """Return a reference to a message's schema. complete: every field without presence is there, as in answers."""
        name = kind.full_name.removeprefix(f"{kind.file.package}.")
        if name not in self.found:
            self.found[name] = {}  # a message may refer to itself
            properties: Schema = {field.name: self._field(field, complete) for field in kind.fields}
            required = [one.name for one in kind.fields if complete and (one.is_repeated or not one.has_presence)]
            self.found[name] = _object(properties, required)
        return _reference(name)

    def _field(self, field: FieldDescriptor, complete: bool) -> Json:
        if not field.is_repeated:
            return self._one(field, complete)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            entry = field.message_type.fields_by_name["value"]
            return {"type": "object", "additionalProperties": self._one(entry, complete)}
        return {"type": "array", "items": self._one(field, complete)}

    def _one(self, field: FieldDescriptor, complete: bool) -> Json:
        if field.message_type is not None:
            return self.of(field.message_type, complete)
        return _scalar(field)


def _scalar(field: FieldDescriptor) -> Schema:
    if field.enum_type is not None:
        return {"type": "string", "enum": list(field.enum_type.values_by_name)}
    if field.type in _INTEGERS:
        low, high = _INTEGERS[field.type]
        return {"type": "integer", "minimum": low, "maximum": high}
    match field.type:
        case FieldDescriptor.TYPE_BOOL:
            return {"type": "boolean"}
        case FieldDescriptor.TYPE_BYTES:
            return {"type": "string", "contentEncoding": "base64"}
        case FieldDescriptor.TYPE_STRING:
            return {"type": "string"}
        case FieldDescriptor.TYPE_FLOAT | FieldDescriptor.TYPE_DOUBLE:
            return {"type": "number"}
    raise TypeError(f"{field.full_name} has a type that no schema here describes")


def _operation(route: Route, schemas: _Schemas) -> Schema:
    parameters: list[Json] = [
        {"name": name, "in": "path", "required": True, "description": _PLACES[name], "schema": {"type": "string"}}
        for name in route.places
    ]
    if route.body in (Body.NONE, Body.PICTURES):
        fields = parameters_of(_kind(route.request))
        parameters += [_query(field) for field in fields if field.name not in route.places]
    parameters.append(_TIMEOUT_HEADER)
    operation: Schema = {
        "operationId": f"{route.verb.lower()}{route.path.translate(str.maketrans('/', '_', '{}'))}",
        "summary": route.summary,
        "parameters": parameters,
        "responses": _responses(route, schemas),
    }
    if route.body is not Body.NONE:
        content = _body(route, schemas)
        operation["requestBody"] = {"required": route.body is not Body.MESSAGE, "content": content}
    return operation


def _kind(message: type[Message]) -> Descriptor:
    return cast(Descriptor, message.DESCRIPTOR)


def _query(field: FieldDescriptor) -> Schema:
    return {"name": field.name, "in": "query", "description": _about(field), "schema": _parameter(field)}


def _parameter(field: FieldDescriptor) -> Schema:
    """Return the schema of a field as a parameter."""
    if field.is_repeated or field.message_type is not None:
        return {"type": "string"}
    if field.enum_type is not None:
        return {"type": "string", "enum": _names(field.enum_type)}
    return _scalar(field)


def _names(kind: EnumDescriptor) -> list[Json]:
    return list(enum_names(kind))


def _about(field: FieldDescriptor) -> str:
    """Return the description of a parameter."""
    text = ".".join(field.full_name.split(".")[-2:])
    if field.message_type is not None:
        text += " as " + ":".join(one.name for one in field.message_type.fields)
    elif field.enum_type is not None and field.is_repeated:
        text += " of " + ", ".join(enum_names(field.enum_type))
    return text + (", several with commas" if field.is_repeated else "")


def _body(route: Route, schemas: _Schemas) -> Schema:
    if route.body is Body.TENSORS:
        return {**_json(_reference("InferRequest")), BYTES: {"schema": _BINARY}}
    found = _json(schemas.of(_kind(route.request), complete=False))
    if route.body is Body.PICTURES:
        several = "images" in _kind(route.request).fields_by_name
        picture: Json = {"type": "array", "items": _BINARY} if several else _BINARY
        fields: Schema = {one.name: _parameter(one) for one in parameters_of(_kind(route.request))}
        found[MULTIPART] = {"schema": _object({PICTURE: picture, **fields}, [PICTURE])}
        for media in (*PICTURES, BYTES):
            found[media] = {"schema": _BINARY}
    return found


def _responses(route: Route, schemas: _Schemas) -> Schema:
    problem: Schema = {"description": "The request is refused or has failed.", "content": _problem()}
    response = schemas.of(_kind(route.response), complete=True)
    match route.answer:
        case Answer.MESSAGE:
            content = _json(response)
        case Answer.PICTURE:
            content = {**_json(response), PICTURES[0]: {"schema": _BINARY}}
        case Answer.TENSORS:
            content = {**_json(_reference("InferResponse")), BYTES: {"schema": _BINARY}}
        case Answer.INDEX:
            content = _json({"type": "array", "items": _reference("RepositoryIndexResponse.ModelIndex")})
        case Answer.CONFIGURATION:
            content = _json(_reference("ModelConfig"))
        case Answer.READINESS:
            content = _json(_object({"name": {"type": "string"}, "ready": {"type": "boolean"}}, ["name", "ready"]))
            answers: Schema = {"200": {"description": "It takes requests.", "content": content}}
            answers["503"] = {"description": "It takes none.", "content": {**content, **_problem()}}
            return {**answers, "default": problem}
    return {"200": {"description": "The answer.", "content": content}, "default": problem}


def _object(properties: Schema, required: list[str]) -> Schema:
    found: Schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**found, "required": list(required)} if required else found


def _reference(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(schema: Schema) -> Schema:
    return {JSON: {"schema": schema}}


def _problem() -> Schema:
    return {PROBLEM: {"schema": _reference("Problem")}}


def _fixed_schemas() -> Schema:
    """Return the schemas of what is no message: problems, and the protocol's tensors in JSON."""
    text: Schema = {"type": "string"}
    value: Schema = {"type": ["boolean", "number", "string"]}
    parameters: Schema = {"type": "object", "additionalProperties": value}
    shape: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}}
    data: Schema = {"type": "array"}
    datatypes: list[Json] = [*DTYPES, "BYTES", "BF16"]
    tensor: Schema = {"name": text, "shape": shape, "datatype": {"type": "string", "enum": datatypes}}
    names = ["name", "shape", "datatype"]
    whole: Schema = {**tensor, "parameters": parameters, "data": data}
    chosen = _object({"name": text, "parameters": parameters}, ["name"])
    violation = _object({"field": text, "description": text}, ["field", "description"])
    return {
        "InferRequest": _object(
            {
                "id": text, "parameters": parameters,
                "inputs": {"type": "array", "items": _object(whole, names)},
                "outputs": {"type": "array", "items": chosen},
            },
            ["inputs"],
        ),
        "InferResponse": _object(
            {
                "model_name": text, "model_version": text, "id": text, "parameters": parameters,
                "outputs": {"type": "array", "items": _object(whole, names)},
            },
            ["model_name", "model_version", "outputs"],
        ),
        "Problem": _object(
            {
                "type": text, "title": text, "status": {"type": "integer"}, "detail": text, "code": text, "error": text,
                "field_violations": {"type": "array", "items": violation},
            },
            ["type", "title", "status", "detail", "code"],
        ),
    }  # fmt: skip
