"""What ONNX Runtime's TensorRT provider is told: batch sizes, and where it keeps what it has built.

None of this has been run against a real TensorRT.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

TENSORRT = "TensorrtExecutionProvider"

#: The file that ONNX Runtime leaves in the cache's folder: an ONNX graph of one node, which points to the engine.
CONTEXT_MODEL = "model_ctx.onnx"

_INPUT = "images"


@dataclass(frozen=True)
class BatchProfile:
    """The batch sizes that an engine takes: from ``min`` to ``max`` images, its kernels chosen for ``opt`` images.

    Raises ValueError where not 1 <= min <= opt <= max.
    """

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise ValueError(
                f"batch sizes min {self.min}, opt {self.opt}, max {self.max}; expected 1 <= min <= opt <= max"
            )

    def shapes(self, image_shape: Iterable[int]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The shapes (B, C, H, W) of the smallest, the usual and the largest batch of images (C, H, W)."""
        image = tuple(image_shape)
        return (self.min, *image), (self.opt, *image), (self.max, *image)


def shape_options(profile: BatchProfile, image_shape: tuple[int, int, int]) -> dict[str, str]:
    """The profile as ONNX Runtime's TensorRT provider takes it, for images (C, H, W): ``images:1x1x28x28``."""
    names = ("trt_profile_min_shapes", "trt_profile_opt_shapes", "trt_profile_max_shapes")
    shapes = profile.shapes(image_shape)
    return {name: f"{_INPUT}:{'x'.join(map(str, shape))}" for name, shape in zip(names, shapes, strict=True)}


def execution_provider_options(
    profile: BatchProfile, image_shape: tuple[int, int, int], cache_folder: Path, fp16: bool = False
) -> dict[str, str]:
    """Options for ONNX Runtime's ``TensorrtExecutionProvider``, for images (C, H, W).

    cache_folder: a folder that is there, **of this one model file alone**. ONNX Runtime names a cached engine by file
    name, names in the graph and versions, not by the weights: where two exports of one architecture share a folder,
    the second is answered with the first one's weights. It leaves there the timing cache, ``engines/`` and the
    context model ``model_ctx.onnx``, which loads without TensorRT's builder.
    fp16: lets TensorRT 10 compute in half precision, where it chooses to in a float32 graph; a graph that is in
    float16 needs it. TensorRT 11 has no such choice, the precision is the graph's.

    TensorRT multiplies float32 matrices in TF32 by default (mantissas of 10 bits), and the provider has no option for
    it; ``build_engine`` has.

    The names are those of ONNX Runtime's ``tensorrt_execution_provider_info.cc`` and
    https://onnxruntime.ai/docs/execution-providers/TensorRT-ExecutionProvider.html; they have not been run.
    """
    return shape_options(profile, image_shape) | {
        "trt_fp16_enable": "1" if fp16 else "0",
        "trt_engine_cache_enable": "1",
        # Relative to the context model's folder: with a context model, ONNX Runtime takes no absolute path here.
        "trt_engine_cache_path": "engines",
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(cache_folder),
        "trt_dump_ep_context_model": "1",
        # A file, since a folder that is not there yet is told from a file by the dot in its name.
        "trt_ep_context_file_path": str(cache_folder / CONTEXT_MODEL),
        "trt_ep_context_embed_mode": "0",
    }
