FROM python:3.12-slim-bookworm AS builder

# cpu installs ONNX Runtime for the CPU. gpu installs ONNX Runtime for CUDA, with CUDA's libraries.
ARG EXTRA=cpu

WORKDIR /build

# The environment has no pip: the builder's pip installs into it.
RUN python -m venv --without-pip /opt/venv

# Each dependency has the version and digests that `make requirements` wrote. This layer comes before the code, so that a
# change of the code does not download the dependencies again.
COPY deploy/requirements/ requirements/
RUN pip --python /opt/venv/bin/python install --no-cache-dir --require-hashes --only-binary :all: \
        --requirement "requirements/$EXTRA.txt" \
    && find /opt/venv -type d -name tests -prune -exec rm -r {} +

# Remove debug symbols and files that the server never loads. ONNX Runtime's Python module contains the library; the
# separate C library is for other programs, and the tools are for making models. Images come as PNG or JPEG, so Pillow
# needs no other format, no fonts and no colour profiles. Of Google's common protos only google.rpc is used. The imports
# at the end check that nothing needed is gone. Any version of binutils works; the folder's name has Python's version.
# hadolint ignore=DL3003,DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends binutils \
    && cd /opt/venv/lib/python3*/site-packages \
    && strip --strip-unneeded uvloop/loop.*.so PIL/_imaging.*.so \
    && apt-get purge --yes --auto-remove binutils \
    && rm -rf /var/lib/apt/lists/* \
        onnxruntime/capi/libonnxruntime.so* onnxruntime/quantization onnxruntime/tools onnxruntime/transformers \
        PIL/_avif.*.so PIL/_imagingcms.*.so PIL/_imagingft.*.so PIL/_imagingtk.*.so PIL/_webp.*.so \
        pillow.libs/libavif-* pillow.libs/libbrotli* pillow.libs/libfreetype-* pillow.libs/libharfbuzz-* \
        pillow.libs/liblcms2-* pillow.libs/libpng16-* pillow.libs/libsharpyuv-* pillow.libs/libwebp* \
        numpy/_core/include numpy/_core/lib numpy/_core/_*_tests.*.so numpy/_core/_simd.*.so \
        numpy/f2py numpy/random/lib \
        google/api google/cloud google/gapic google/logging google/longrunning google/type \
    && find . -name '*.pyi' -delete \
    && ORT_DISABLE_TELEMETRY=1 /opt/venv/bin/python -c "import onnxruntime, python_multipart, starlette, uvicorn, uvloop; from google.rpc import status_pb2; \
from opentelemetry.exporter.otlp.proto.grpc import trace_exporter; from PIL import JpegImagePlugin, PngImagePlugin"

COPY . .
# The build has no git, from which the version would come: `make image` gives it.
ARG VERSION=0.0.0
# The wheel is built by tools of locked versions too: pip would otherwise download the newest ones for the build.
# Move the default model to a folder for a volume. A new volume starts with the folder's content. The other models stay
# in the package, and are served with an empty CAPSNET_MODELS and CAPSNET_MODEL=NAME.
RUN pip install --no-cache-dir --require-hashes --only-binary :all: --requirement requirements/build.txt \
    && SETUPTOOLS_SCM_PRETEND_VERSION="$VERSION" \
        pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels . \
    && pip --python /opt/venv/bin/python install --no-cache-dir --no-deps /wheels/*.whl \
    && rm -r /wheels \
    && pip --python /opt/venv/bin/python check \
    && mkdir /models \
    && mv /opt/venv/lib/python3*/site-packages/serving/models/capsnet-mnist /models


# Trains and exports into the same folder of models. With PyTorch it is many times as large as the server's image.
FROM builder AS training

# cpu installs PyTorch's build for the CPU, 0.2 GB. Only PyTorch's own index has it, which uv knows by the name cpu. cuda
# installs the build for NVIDIA's GPUs with CUDA's libraries, 3 GB, for training on a GPU.
ARG TORCH=cpu

# Where uv finds the build for the CPU. "--index-url URL" names a mirror, and "--find-links URL" a page of links to wheels.
ARG TORCH_SOURCE="--torch-backend cpu"

# hadolint ignore=SC2086
RUN if [ "$TORCH" = cpu ]; then \
        pip install --no-cache-dir --require-hashes --only-binary :all: --requirement requirements/installer.txt \
        && uv pip install --python /opt/venv/bin/python --no-cache --require-hashes --only-binary :all: --no-deps \
            $TORCH_SOURCE --requirement requirements/torch-cpu.txt; \
    else \
        pip --python /opt/venv/bin/python install --no-cache-dir --require-hashes --only-binary :all: \
            --requirement requirements/torch-cuda.txt; \
    fi \
    && pip --python /opt/venv/bin/python install --no-cache-dir --require-hashes --only-binary :all: \
        --requirement requirements/training.txt \
    && pip --python /opt/venv/bin/python check \
    && mkdir /work \
    && chown -R 10001:10001 /models /work

ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    ORT_DISABLE_TELEMETRY=1 \
    XDG_CACHE_HOME=/work/cache \
    MPLCONFIGDIR=/tmp

WORKDIR /work

USER 10001:10001

ENTRYPOINT ["python", "-m"]

CMD ["training", "--help"]

ARG VERSION=0.0.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="capsnet-training" \
      org.opencontainers.image.description="Training and export of capsule networks for capsnet-serving" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.base.name="docker.io/library/python:3.12-slim-bookworm"


FROM builder AS trimmed

# Remove the packages that need a framework which the server lacks.
RUN rm -r /opt/venv/lib/python3*/site-packages/training /opt/venv/lib/python3*/site-packages/export


FROM python:3.12-slim-bookworm AS serving

COPY --from=trimmed /opt/venv /opt/venv
COPY --from=builder --chown=10001:10001 /models /models

# In a container, a server that listens on 127.0.0.1 cannot be reached from outside.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    ORT_DISABLE_TELEMETRY=1 \
    CAPSNET_HOST=0.0.0.0 \
    CAPSNET_MODELS=/models

# A number, so that orchestrators can see a non-root user without reading /etc/passwd.
USER 10001:10001

EXPOSE 8000 8001 8002

HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import http.client as http, os, ssl; \
place = dict(host='127.0.0.1', port=int(os.environ.get('CAPSNET_METRICS_PORT') or 8002), timeout=4); \
link = http.HTTPSConnection(**place, context=ssl._create_unverified_context()) if os.environ.get('CAPSNET_TLS_CERT') \
else http.HTTPConnection(**place); \
link.request('GET', '/readyz'); \
raise SystemExit(link.getresponse().status != 200)"]

ENTRYPOINT ["python", "-m", "serving"]

ARG VERSION=0.0.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="capsnet-serving" \
      org.opencontainers.image.description="A capsule network served over gRPC and HTTP, with Prometheus metrics" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.base.name="docker.io/library/python:3.12-slim-bookworm"
