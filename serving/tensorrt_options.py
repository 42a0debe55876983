"""The options of ONNX Runtime's TensorRT provider: batch sizes, and the folder for built engines.

This module was never run with a real TensorRT.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

TENSORRT = "TensorrtExecutionProvider"

#: The file that ONNX Runtime writes into the cache's folder: an ONNX graph of one node, which names the engine.
CONTEXT_MODEL = "model_ctx.onnx"

_INPUT_NAME = "images"


@dataclass(frozen=True)
class BatchProfile:
    """The batch sizes of an engine: from ``min`` to ``max`` images, with kernels chosen for ``opt`` images.

    Raises ValueError unless 1 <= min <= opt <= max.
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
        """Return the shapes (B, C, H, W) of the smallest, the usual and the largest batch of images (C, H, W)."""
        image = tuple(image_shape)
        return (self.min, *image), (self.opt, *image), (self.max, *image)


def shape_options(profile: BatchProfile, image_shape: tuple[int, int, int]) -> dict[str, str]:
    """Return the profile as options of the TensorRT provider, for images (C, H, W): ``images:1x1x28x28``."""
    names = ("trt_profile_min_shapes", "trt_profile_opt_shapes", "trt_profile_max_shapes")
    shapes = profile.shapes(image_shape)
    return {name: f"{_INPUT_NAME}:{'x'.join(map(str, shape))}" for name, shape in zip(names, shapes, strict=True)}


def execution_provider_options(
    profile: BatchProfile, image_shape: tuple[int, int, int], cache_folder: Path, fp16: bool = False
) -> dict[str, str]:
    """Return the options of ONNX Runtime's ``TensorrtExecutionProvider``, for images (C, H, W).

    cache_folder: an existing folder **for this model file alone**. ONNX Runtime names a cached engine by file name,
        names in the graph and versions, not by the weights. If two exports of one architecture shared a folder, the
        second would be served with the weights of the first. ONNX Runtime writes the timing cache, ``engines/`` and the
        context model ``model_ctx.onnx``, which loads without TensorRT's builder.
    fp16: allow TensorRT 10 to compute parts of a float32 graph in half precision. A float16 graph needs it. TensorRT 11
        has no such option and uses the graph's precision.

    TensorRT multiplies float32 matrices in TF32 by default (mantissas of 10 bits). The provider has no option for this,
    but ``build_engine`` has one.

    Source of the names: ONNX Runtime's ``tensorrt_execution_provider_info.cc`` and
    https://onnxruntime.ai/docs/execution-providers/TensorRT-ExecutionProvider.html.
    """
    return shape_options(profile, image_shape) | {
        "trt_fp16_enable": "1" if fp16 else "0",
        "trt_engine_cache_enable": "1",
        # Relative to the context model's folder: with a context model, ONNX Runtime refuses an absolute path here.
        "trt_engine_cache_path": "engines",
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(cache_folder),
        "trt_dump_ep_context_model": "1",
        # A file. ONNX Runtime takes a name that does not exist yet for a folder unless it has a dot.
        "trt_ep_context_file_path": str(cache_folder / CONTEXT_MODEL),
        "trt_ep_context_embed_mode": "0",
    }
