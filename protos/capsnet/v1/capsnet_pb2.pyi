from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Preprocess(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PREPROCESS_UNSPECIFIED: _ClassVar[Preprocess]
    PREPROCESS_NONE: _ClassVar[Preprocess]
    PREPROCESS_AUTO: _ClassVar[Preprocess]

class Verdict(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    VERDICT_UNSPECIFIED: _ClassVar[Verdict]
    VERDICT_OK: _ClassVar[Verdict]
    VERDICT_SEVERAL: _ClassVar[Verdict]
    VERDICT_NONE_OF_THESE: _ClassVar[Verdict]
    VERDICT_SUSPICIOUS: _ClassVar[Verdict]
    VERDICT_BLANK: _ClassVar[Verdict]

class Polarity(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    POLARITY_UNSPECIFIED: _ClassVar[Polarity]
    POLARITY_BRIGHT_ON_DARK: _ClassVar[Polarity]
    POLARITY_DARK_ON_BRIGHT: _ClassVar[Polarity]

class ExplanationPart(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EXPLANATION_PART_UNSPECIFIED: _ClassVar[ExplanationPart]
    EXPLANATION_PART_ROUTING: _ClassVar[ExplanationPart]
    EXPLANATION_PART_CONTRIBUTIONS: _ClassVar[ExplanationPart]
    EXPLANATION_PART_RELEVANCE: _ClassVar[ExplanationPart]

class Format(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FORMAT_UNSPECIFIED: _ClassVar[Format]
    FORMAT_PIXELS: _ClassVar[Format]
    FORMAT_PNG: _ClassVar[Format]
PREPROCESS_UNSPECIFIED: Preprocess
PREPROCESS_NONE: Preprocess
PREPROCESS_AUTO: Preprocess
VERDICT_UNSPECIFIED: Verdict
VERDICT_OK: Verdict
VERDICT_SEVERAL: Verdict
VERDICT_NONE_OF_THESE: Verdict
VERDICT_SUSPICIOUS: Verdict
VERDICT_BLANK: Verdict
POLARITY_UNSPECIFIED: Polarity
POLARITY_BRIGHT_ON_DARK: Polarity
POLARITY_DARK_ON_BRIGHT: Polarity
EXPLANATION_PART_UNSPECIFIED: ExplanationPart
EXPLANATION_PART_ROUTING: ExplanationPart
EXPLANATION_PART_CONTRIBUTIONS: ExplanationPart
EXPLANATION_PART_RELEVANCE: ExplanationPart
FORMAT_UNSPECIFIED: Format
FORMAT_PIXELS: Format
FORMAT_PNG: Format

class Image(_message.Message):
    __slots__ = ("pixels", "encoded", "preprocess")
    PIXELS_FIELD_NUMBER: _ClassVar[int]
    ENCODED_FIELD_NUMBER: _ClassVar[int]
    PREPROCESS_FIELD_NUMBER: _ClassVar[int]
    pixels: bytes
    encoded: bytes
    preprocess: Preprocess
    def __init__(self, pixels: _Optional[bytes] = ..., encoded: _Optional[bytes] = ..., preprocess: _Optional[_Union[Preprocess, str]] = ...) -> None: ...

class ClassifyRequest(_message.Message):
    __slots__ = ("model_name", "model_version", "images", "reconstruction_error")
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    RECONSTRUCTION_ERROR_FIELD_NUMBER: _ClassVar[int]
    model_name: str
    model_version: str
    images: _containers.RepeatedCompositeFieldContainer[Image]
    reconstruction_error: bool
    def __init__(self, model_name: _Optional[str] = ..., model_version: _Optional[str] = ..., images: _Optional[_Iterable[_Union[Image, _Mapping]]] = ..., reconstruction_error: _Optional[bool] = ...) -> None: ...

class ClassifyResponse(_message.Message):
    __slots__ = ("model_name", "model_version", "results")
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    model_name: str
    model_version: str
    results: _containers.RepeatedCompositeFieldContainer[Classification]
    def __init__(self, model_name: _Optional[str] = ..., model_version: _Optional[str] = ..., results: _Optional[_Iterable[_Union[Classification, _Mapping]]] = ...) -> None: ...

class Classification(_message.Message):
    __slots__ = ("label", "class_index", "capsules", "confidence", "present", "verdict", "reconstruction_error")
    LABEL_FIELD_NUMBER: _ClassVar[int]
    CLASS_INDEX_FIELD_NUMBER: _ClassVar[int]
    CAPSULES_FIELD_NUMBER: _ClassVar[int]
    CONFIDENCE_FIELD_NUMBER: _ClassVar[int]
    PRESENT_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    RECONSTRUCTION_ERROR_FIELD_NUMBER: _ClassVar[int]
    label: str
    class_index: int
    capsules: _containers.RepeatedCompositeFieldContainer[ClassCapsule]
    confidence: float
    present: _containers.RepeatedScalarFieldContainer[str]
    verdict: Verdict
    reconstruction_error: float
    def __init__(self, label: _Optional[str] = ..., class_index: _Optional[int] = ..., capsules: _Optional[_Iterable[_Union[ClassCapsule, _Mapping]]] = ..., confidence: _Optional[float] = ..., present: _Optional[_Iterable[str]] = ..., verdict: _Optional[_Union[Verdict, str]] = ..., reconstruction_error: _Optional[float] = ...) -> None: ...

class ClassCapsule(_message.Message):
    __slots__ = ("label", "probability", "pose", "confidence")
    LABEL_FIELD_NUMBER: _ClassVar[int]
    PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    POSE_FIELD_NUMBER: _ClassVar[int]
    CONFIDENCE_FIELD_NUMBER: _ClassVar[int]
    label: str
    probability: float
    pose: _containers.RepeatedScalarFieldContainer[float]
    confidence: float
    def __init__(self, label: _Optional[str] = ..., probability: _Optional[float] = ..., pose: _Optional[_Iterable[float]] = ..., confidence: _Optional[float] = ...) -> None: ...

class ClassifyStreamRequest(_message.Message):
    __slots__ = ("id", "request")
    ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    id: str
    request: ClassifyRequest
    def __init__(self, id: _Optional[str] = ..., request: _Optional[_Union[ClassifyRequest, _Mapping]] = ...) -> None: ...

class ClassifyStreamResponse(_message.Message):
    __slots__ = ("id", "response", "error")
    ID_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    id: str
    response: ClassifyResponse
    error: Error
    def __init__(self, id: _Optional[str] = ..., response: _Optional[_Union[ClassifyResponse, _Mapping]] = ..., error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("code", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ("model_name", "model_version")
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    model_name: str
    model_version: str
    def __init__(self, model_name: _Optional[str] = ..., model_version: _Optional[str] = ...) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("model_name", "model_version", "labels", "image_channels", "image_height", "image_width", "pose_size", "max_images_per_request", "max_request_bytes", "execution_provider", "sha256", "dataset", "test_errors", "test_images", "precision", "tuning", "preparation", "calibration", "primary_capsules", "reconstructs")
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    IMAGE_CHANNELS_FIELD_NUMBER: _ClassVar[int]
    IMAGE_HEIGHT_FIELD_NUMBER: _ClassVar[int]
    IMAGE_WIDTH_FIELD_NUMBER: _ClassVar[int]
    POSE_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_IMAGES_PER_REQUEST_FIELD_NUMBER: _ClassVar[int]
    MAX_REQUEST_BYTES_FIELD_NUMBER: _ClassVar[int]
    EXECUTION_PROVIDER_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    DATASET_FIELD_NUMBER: _ClassVar[int]
    TEST_ERRORS_FIELD_NUMBER: _ClassVar[int]
    TEST_IMAGES_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    TUNING_FIELD_NUMBER: _ClassVar[int]
    PREPARATION_FIELD_NUMBER: _ClassVar[int]
    CALIBRATION_FIELD_NUMBER: _ClassVar[int]
    PRIMARY_CAPSULES_FIELD_NUMBER: _ClassVar[int]
    RECONSTRUCTS_FIELD_NUMBER: _ClassVar[int]
    model_name: str
    model_version: str
    labels: _containers.RepeatedScalarFieldContainer[str]
    image_channels: int
    image_height: int
    image_width: int
    pose_size: int
    max_images_per_request: int
    max_request_bytes: int
    execution_provider: str
    sha256: str
    dataset: str
    test_errors: int
    test_images: int
    precision: str
    tuning: Tuning
    preparation: Preparation
    calibration: Calibration
    primary_capsules: PrimaryCapsules
    reconstructs: bool
    def __init__(self, model_name: _Optional[str] = ..., model_version: _Optional[str] = ..., labels: _Optional[_Iterable[str]] = ..., image_channels: _Optional[int] = ..., image_height: _Optional[int] = ..., image_width: _Optional[int] = ..., pose_size: _Optional[int] = ..., max_images_per_request: _Optional[int] = ..., max_request_bytes: _Optional[int] = ..., execution_provider: _Optional[str] = ..., sha256: _Optional[str] = ..., dataset: _Optional[str] = ..., test_errors: _Optional[int] = ..., test_images: _Optional[int] = ..., precision: _Optional[str] = ..., tuning: _Optional[_Union[Tuning, _Mapping]] = ..., preparation: _Optional[_Union[Preparation, _Mapping]] = ..., calibration: _Optional[_Union[Calibration, _Mapping]] = ..., primary_capsules: _Optional[_Union[PrimaryCapsules, _Mapping]] = ..., reconstructs: _Optional[bool] = ...) -> None: ...

class Preparation(_message.Message):
    __slots__ = ("polarity", "object_size", "centred_by_mass")
    POLARITY_FIELD_NUMBER: _ClassVar[int]
    OBJECT_SIZE_FIELD_NUMBER: _ClassVar[int]
    CENTRED_BY_MASS_FIELD_NUMBER: _ClassVar[int]
    polarity: Polarity
    object_size: int
    centred_by_mass: bool
    def __init__(self, polarity: _Optional[_Union[Polarity, str]] = ..., object_size: _Optional[int] = ..., centred_by_mass: _Optional[bool] = ...) -> None: ...

class Calibration(_message.Message):
    __slots__ = ("temperature", "presence", "margin", "reconstruction_error", "false_alarms", "objects", "arctanh")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_FIELD_NUMBER: _ClassVar[int]
    MARGIN_FIELD_NUMBER: _ClassVar[int]
    RECONSTRUCTION_ERROR_FIELD_NUMBER: _ClassVar[int]
    FALSE_ALARMS_FIELD_NUMBER: _ClassVar[int]
    OBJECTS_FIELD_NUMBER: _ClassVar[int]
    ARCTANH_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    presence: _containers.RepeatedScalarFieldContainer[float]
    margin: float
    reconstruction_error: float
    false_alarms: float
    objects: int
    arctanh: bool
    def __init__(self, temperature: _Optional[float] = ..., presence: _Optional[_Iterable[float]] = ..., margin: _Optional[float] = ..., reconstruction_error: _Optional[float] = ..., false_alarms: _Optional[float] = ..., objects: _Optional[int] = ..., arctanh: _Optional[bool] = ...) -> None: ...

class PrimaryCapsules(_message.Message):
    __slots__ = ("types", "rows", "columns", "offset", "stride", "size")
    TYPES_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    STRIDE_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    types: int
    rows: int
    columns: int
    offset: int
    stride: int
    size: int
    def __init__(self, types: _Optional[int] = ..., rows: _Optional[int] = ..., columns: _Optional[int] = ..., offset: _Optional[int] = ..., stride: _Optional[int] = ..., size: _Optional[int] = ...) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("model_name", "model_version", "images", "classes", "parts")
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    model_name: str
    model_version: str
    images: _containers.RepeatedCompositeFieldContainer[Image]
    classes: _containers.RepeatedScalarFieldContainer[int]
    parts: _containers.RepeatedScalarFieldContainer[ExplanationPart]
    def __init__(self, model_name: _Optional[str] = ..., model_version: _Optional[str] = ..., images: _Optional[_Iterable[_Union[Image, _Mapping]]] = ..., classes: _Optional[_Iterable[int]] = ..., parts: _Optional[_Iterable[_Union[ExplanationPart, str]]] = ...) -> None: ...

class ExplainResponse(_message.Message):
    __slots__ = ("model_name", "model_version", "results", "primary_capsules")
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    PRIMARY_CAPSULES_FIELD_NUMBER: _ClassVar[int]
    model_name: str
    model_version: str
    results: _containers.RepeatedCompositeFieldContainer[Explanation]
    primary_capsules: PrimaryCapsules
    def __init__(self, model_name: _Optional[str] = ..., model_version: _Optional[str] = ..., results: _Optional[_Iterable[_Union[Explanation, _Mapping]]] = ..., primary_capsules: _Optional[_Union[PrimaryCapsules, _Mapping]] = ...) -> None: ...

class Explanation(_message.Message):
    __slots__ = ("classification", "primary_lengths", "entropies", "classes", "pixels")
    CLASSIFICATION_FIELD_NUMBER: _ClassVar[int]
    PRIMARY_LENGTHS_FIELD_NUMBER: _ClassVar[int]
    ENTROPIES_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    PIXELS_FIELD_NUMBER: _ClassVar[int]
    classification: Classification
    primary_lengths: _containers.RepeatedScalarFieldContainer[float]
    entropies: _containers.RepeatedScalarFieldContainer[float]
    classes: _containers.RepeatedCompositeFieldContainer[ClassExplanation]
    pixels: bytes
    def __init__(self, classification: _Optional[_Union[Classification, _Mapping]] = ..., primary_lengths: _Optional[_Iterable[float]] = ..., entropies: _Optional[_Iterable[float]] = ..., classes: _Optional[_Iterable[_Union[ClassExplanation, _Mapping]]] = ..., pixels: _Optional[bytes] = ...) -> None: ...

class ClassExplanation(_message.Message):
    __slots__ = ("label", "class_index", "iterations", "contributions", "relevance")
    LABEL_FIELD_NUMBER: _ClassVar[int]
    CLASS_INDEX_FIELD_NUMBER: _ClassVar[int]
    ITERATIONS_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTIONS_FIELD_NUMBER: _ClassVar[int]
    RELEVANCE_FIELD_NUMBER: _ClassVar[int]
    label: str
    class_index: int
    iterations: _containers.RepeatedCompositeFieldContainer[RoutingIteration]
    contributions: _containers.RepeatedScalarFieldContainer[float]
    relevance: Map
    def __init__(self, label: _Optional[str] = ..., class_index: _Optional[int] = ..., iterations: _Optional[_Iterable[_Union[RoutingIteration, _Mapping]]] = ..., contributions: _Optional[_Iterable[float]] = ..., relevance: _Optional[_Union[Map, _Mapping]] = ...) -> None: ...

class RoutingIteration(_message.Message):
    __slots__ = ("couplings", "agreements")
    COUPLINGS_FIELD_NUMBER: _ClassVar[int]
    AGREEMENTS_FIELD_NUMBER: _ClassVar[int]
    couplings: _containers.RepeatedScalarFieldContainer[float]
    agreements: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, couplings: _Optional[_Iterable[float]] = ..., agreements: _Optional[_Iterable[float]] = ...) -> None: ...

class Map(_message.Message):
    __slots__ = ("height", "width", "values")
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    height: int
    width: int
    values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, height: _Optional[int] = ..., width: _Optional[int] = ..., values: _Optional[_Iterable[float]] = ...) -> None: ...

class ReconstructRequest(_message.Message):
    __slots__ = ("model_name", "model_version", "image", "poses", "classes", "changes", "sweep", "format")
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    POSES_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    SWEEP_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    model_name: str
    model_version: str
    image: Image
    poses: Poses
    classes: _containers.RepeatedScalarFieldContainer[int]
    changes: _containers.RepeatedCompositeFieldContainer[Change]
    sweep: Sweep
    format: Format
    def __init__(self, model_name: _Optional[str] = ..., model_version: _Optional[str] = ..., image: _Optional[_Union[Image, _Mapping]] = ..., poses: _Optional[_Union[Poses, _Mapping]] = ..., classes: _Optional[_Iterable[int]] = ..., changes: _Optional[_Iterable[_Union[Change, _Mapping]]] = ..., sweep: _Optional[_Union[Sweep, _Mapping]] = ..., format: _Optional[_Union[Format, str]] = ...) -> None: ...

class Poses(_message.Message):
    __slots__ = ("poses",)
    POSES_FIELD_NUMBER: _ClassVar[int]
    poses: _containers.RepeatedCompositeFieldContainer[ClassPose]
    def __init__(self, poses: _Optional[_Iterable[_Union[ClassPose, _Mapping]]] = ...) -> None: ...

class ClassPose(_message.Message):
    __slots__ = ("class_index", "pose")
    CLASS_INDEX_FIELD_NUMBER: _ClassVar[int]
    POSE_FIELD_NUMBER: _ClassVar[int]
    class_index: int
    pose: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, class_index: _Optional[int] = ..., pose: _Optional[_Iterable[float]] = ...) -> None: ...

class Change(_message.Message):
    __slots__ = ("dimension", "delta")
    DIMENSION_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    dimension: int
    delta: float
    def __init__(self, dimension: _Optional[int] = ..., delta: _Optional[float] = ...) -> None: ...

class Sweep(_message.Message):
    __slots__ = ("dimension", "first", "last", "steps")
    DIMENSION_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    dimension: int
    first: float
    last: float
    steps: int
    def __init__(self, dimension: _Optional[int] = ..., first: _Optional[float] = ..., last: _Optional[float] = ..., steps: _Optional[int] = ...) -> None: ...

class ReconstructResponse(_message.Message):
    __slots__ = ("model_name", "model_version", "results", "image_channels", "image_height", "image_width", "classification")
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    IMAGE_CHANNELS_FIELD_NUMBER: _ClassVar[int]
    IMAGE_HEIGHT_FIELD_NUMBER: _ClassVar[int]
    IMAGE_WIDTH_FIELD_NUMBER: _ClassVar[int]
    CLASSIFICATION_FIELD_NUMBER: _ClassVar[int]
    model_name: str
    model_version: str
    results: _containers.RepeatedCompositeFieldContainer[Reconstruction]
    image_channels: int
    image_height: int
    image_width: int
    classification: Classification
    def __init__(self, model_name: _Optional[str] = ..., model_version: _Optional[str] = ..., results: _Optional[_Iterable[_Union[Reconstruction, _Mapping]]] = ..., image_channels: _Optional[int] = ..., image_height: _Optional[int] = ..., image_width: _Optional[int] = ..., classification: _Optional[_Union[Classification, _Mapping]] = ...) -> None: ...

class Reconstruction(_message.Message):
    __slots__ = ("label", "class_index", "pose", "delta", "image", "layer")
    LABEL_FIELD_NUMBER: _ClassVar[int]
    CLASS_INDEX_FIELD_NUMBER: _ClassVar[int]
    POSE_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    label: str
    class_index: int
    pose: _containers.RepeatedScalarFieldContainer[float]
    delta: float
    image: bytes
    layer: bytes
    def __init__(self, label: _Optional[str] = ..., class_index: _Optional[int] = ..., pose: _Optional[_Iterable[float]] = ..., delta: _Optional[float] = ..., image: _Optional[bytes] = ..., layer: _Optional[bytes] = ...) -> None: ...

class Tuning(_message.Message):
    __slots__ = ("threads", "runtimes", "max_batch", "image_seconds", "batch_seconds", "compared")
    THREADS_FIELD_NUMBER: _ClassVar[int]
    RUNTIMES_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_FIELD_NUMBER: _ClassVar[int]
    IMAGE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    BATCH_SECONDS_FIELD_NUMBER: _ClassVar[int]
    COMPARED_FIELD_NUMBER: _ClassVar[int]
    threads: int
    runtimes: int
    max_batch: int
    image_seconds: float
    batch_seconds: float
    compared: _containers.RepeatedCompositeFieldContainer[Timing]
    def __init__(self, threads: _Optional[int] = ..., runtimes: _Optional[int] = ..., max_batch: _Optional[int] = ..., image_seconds: _Optional[float] = ..., batch_seconds: _Optional[float] = ..., compared: _Optional[_Iterable[_Union[Timing, _Mapping]]] = ...) -> None: ...

class Timing(_message.Message):
    __slots__ = ("threads", "runtimes", "batch", "seconds")
    THREADS_FIELD_NUMBER: _ClassVar[int]
    RUNTIMES_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    threads: int
    runtimes: int
    batch: int
    seconds: float
    def __init__(self, threads: _Optional[int] = ..., runtimes: _Optional[int] = ..., batch: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...
