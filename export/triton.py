"""``config.pbtxt`` and ``labels.txt``, which make the export's output a model repository for Triton Inference Server.

The export writes ``<repository>/<name>/<version>/model.onnx``, as Triton requires. ``write`` adds the two files of the
model's own folder ``<repository>/<name>/``, and ``tritonserver --model-repository=<repository>`` finds the model.

The fields are those of Triton's ``model_config.proto`` (https://github.com/triton-inference-server/common), and the
accelerator's parameters those of its ONNX Runtime backend
(https://github.com/triton-inference-server/onnxruntime_backend). The tests parse the text with Triton's own messages;
no Triton server has loaded it yet.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from serving.artifact import MODEL
from serving.tensorrt_options import BatchProfile, shape_options

CONFIG = "config.pbtxt"
LABELS = "labels.txt"
PRECISIONS = ("FP32", "FP16", "BF16")

# The names in the exported graph. They are repeated here because export.graph needs PyTorch.
INPUT, PROBABILITIES, POSES = "images", "probabilities", "poses"


class TritonError(ValueError):
    """A model cannot be expressed in a Triton model repository. The text says why."""


@dataclass(frozen=True)
class Options:
    """Triton's settings for the model.

    model_file: the model's file in a version's folder.
    max_batch_size: the most images in one batch. usual_batch_size: the size for which TensorRT optimises.
    max_queue_delay_us: the longest wait of a request for others in its batch, in microseconds.
    tensorrt: compute with TensorRT on a GPU. On a CPU it has no effect.
    precision: one of PRECISIONS that TensorRT 10 may use besides float32. A float16 graph needs FP16. TensorRT 11 has
        no such option and uses the graph's precision.
    engine_cache: a folder on Triton's machine for TensorRT's engines; empty for none, so that each start builds them
        again. ONNX Runtime names a cached engine by file name, names in the graph and versions, not by the weights. So
        versions may share a folder only if their ONNX graphs have different names. Otherwise a new version would be
        served with the old one's weights.

    Raises TritonError for the first wrong value.
    """

    model_file: str = MODEL
    max_batch_size: int = 32
    usual_batch_size: int = 8
    max_queue_delay_us: int = 0
    tensorrt: bool = True
    precision: str = "FP32"
    engine_cache: str = ""

    def __post_init__(self) -> None:
        if self.max_batch_size < 1:
            raise TritonError(f"max_batch_size is {self.max_batch_size}; expected 1 or more")
        if self.usual_batch_size < 1:
            raise TritonError(f"usual_batch_size is {self.usual_batch_size}; expected 1 or more")
        if self.max_queue_delay_us < 0:
            raise TritonError(f"max_queue_delay_us is {self.max_queue_delay_us}; expected 0 or more")
        if self.precision not in PRECISIONS:
            raise TritonError(f"precision is {self.precision!r}; expected one of {', '.join(PRECISIONS)}")


_DEFAULTS = Options()


def config(
    name: str,
    labels: Sequence[str],
    image_shape: tuple[int, int, int],
    pose_size: int,
    options: Options = _DEFAULTS,
) -> str:
    """Return the model's configuration, the text of ``config.pbtxt``.

    name: the name of the model's folder. labels: J class names. image_shape: (C, H, W) of the uint8 input ``images``.
    pose_size: E of the output ``poses``, (J, E). Triton's shapes have no batch axis.

    Raises TritonError if the name cannot be a folder's name, or if there is no label.
    """
    if not name or Path(name).name != name:
        raise TritonError(f"{name!r} is not the name of a model's folder")
    if not labels:
        raise TritonError("there are no labels")
    image, classes = _dims(image_shape), len(labels)
    warmups = _warmups(image, options.max_batch_size)
    text = f"""name: {_quoted(name)}
backend: "onnxruntime"
default_model_filename: {_quoted(options.model_file)}
max_batch_size: {options.max_batch_size}
input {{
  name: {_quoted(INPUT)}
  data_type: TYPE_UINT8
  dims: {image}
}}
output {{
  name: {_quoted(PROBABILITIES)}
  data_type: TYPE_FP32
  dims: {_dims((classes,))}
  label_filename: {_quoted(LABELS)}
}}
output {{
  name: {_quoted(POSES)}
  data_type: TYPE_FP32
  dims: {_dims((classes, pose_size))}
}}
# The labels and shapes above are those of the latest version.
version_policy {{ latest {{ num_versions: 1 }} }}
# The requests that wait while the model computes form the next batch, up to max_batch_size. No batch size is preferred:
# Triton advises a preferred size only if it is known to be much faster. With a delay above 0 an idle model waits for
# further requests.
dynamic_batching {{ max_queue_delay_microseconds: {options.max_queue_delay_us} }}
# One instance on each GPU, or on the CPU if there is no GPU. Triton would start two on a CPU, but ONNX Runtime uses all
# cores by itself.
instance_group {{ kind: KIND_AUTO count: 1 }}
# The first call allocates memory and, on a GPU, chooses kernels. It comes before any client's call.
{warmups}
"""
    return text + _accelerator(image_shape, options) if options.tensorrt else text


def write(
    folder: Path,
    labels: Sequence[str],
    image_shape: tuple[int, int, int],
    pose_size: int,
    options: Options = _DEFAULTS,
) -> None:
    """Write ``labels.txt`` and ``config.pbtxt`` to a model's folder, each under its name only when it is complete.

    folder: ``<repository>/<name>``, which must exist. Its versions share the two files, and existing files are
    replaced. The other parameters are those of ``config``.

    Raises TritonError like ``config``, and if a label has a line break, since Triton reads one label a line; OSError if
    the files cannot be written.
    """
    check_labels(labels)
    text = config(folder.name, labels, image_shape, pose_size, options)
    for name, content in ((LABELS, "".join(f"{label}\n" for label in labels)), (CONFIG, text)):
        partial = folder / (name + ".partial")
        partial.write_bytes(content.encode())
        partial.replace(folder / name)


def check_labels(labels: Sequence[str]) -> None:
    """Raise TritonError if a label has a line break, since Triton reads one label a line."""
    for label in labels:
        if "\n" in label or "\r" in label:
            raise TritonError(f"the label {label!r} has a line break; Triton reads one label a line")


def _warmups(image: str, max_batch_size: int) -> str:
    """Return the warm-up requests of Triton's start: random pixels, in small batches and in the largest one."""
    return "\n".join(
        f"""model_warmup {{
  name: "random pixels, batch of {size}"
  batch_size: {size}
  inputs {{
    key: {_quoted(INPUT)}
    value {{ data_type: TYPE_UINT8 dims: {image} random_data: true }}
  }}
}}"""
        for size in sorted({1, min(2, max_batch_size), max_batch_size})
    )


def _accelerator(image_shape: tuple[int, int, int], options: Options) -> str:
    profile = BatchProfile(1, min(options.usual_batch_size, options.max_batch_size), options.max_batch_size)
    parameters = {"precision_mode": options.precision, **shape_options(profile, image_shape)}
    if options.engine_cache:
        parameters |= {
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": options.engine_cache,
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": options.engine_cache,
        }
    lines = "\n".join(
        f"      parameters {{ key: {_quoted(key)} value: {_quoted(value)} }}" for key, value in parameters.items()
    )
    return f"""# Used on a GPU alone. One engine for all batch sizes; without a profile it is built anew as they grow.
optimization {{
  execution_accelerators {{
    gpu_execution_accelerator {{
      name: "tensorrt"
{lines}
    }}
  }}
}}
"""


def _dims(sizes: Sequence[int]) -> str:
    return f"[{', '.join(map(str, sizes))}]"


def _quoted(text: str) -> str:
    """Return a string in protobuf's text format. Other characters than ASCII become octal escapes of UTF-8 bytes."""
    plain = (chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\{byte:03o}" for byte in text.encode())
    return f'"{"".join(plain)}"'
