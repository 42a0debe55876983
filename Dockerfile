FROM python:3.12-slim-bookworm AS builder

# cpu brings ONNX Runtime for the CPU, gpu the one for CUDA together with CUDA's own libraries.
ARG EXTRA=cpu

WORKDIR /build

# The environment gets no pip of its own: the builder's installs into it.
RUN python -m venv --without-pip /opt/venv

# The dependencies depend on pyproject.toml alone, so that a change of the code does not download them again.
COPY pyproject.toml ./
RUN python -c "import sys, tomllib; \
    project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
    print(*project['dependencies'], *project['optional-dependencies'][sys.argv[1]], sep='\n')" \
    "$EXTRA" > requirements.txt \
    && pip --python /opt/venv/bin/python install --no-cache-dir --requirement requirements.txt \
    && find /opt/venv -type d -name tests -prune -exec rm -r {} +

# ONNX Runtime is inside its Python module. The same once more as a C library is for other programs: 35 MB that nothing
# here loads. The import shows that it is still so.
RUN find /opt/venv -path '*/onnxruntime/capi/libonnxruntime.so*' -delete \
    && ORT_DISABLE_TELEMETRY=1 /opt/venv/bin/python -c "import onnxruntime"

COPY . .
RUN pip --python /opt/venv/bin/python install --no-cache-dir --no-deps . \
    && pip --python /opt/venv/bin/python check


FROM python:3.12-slim-bookworm

COPY --from=builder /opt/venv /opt/venv

# Whoever listens on 127.0.0.1 in a container is reached by nobody.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    ORT_DISABLE_TELEMETRY=1 \
    CAPSNET_HOST=0.0.0.0

# A number, for orchestrators that must tell a non-root image without reading its /etc/passwd.
USER 10001:10001

EXPOSE 8001 8002

HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import os; import grpc; from grpc_health.v1 import health_pb2 as pb, health_pb2_grpc as rpc; \
channel = grpc.insecure_channel('127.0.0.1:' + os.environ.get('CAPSNET_PORT', '8001'), [('grpc.enable_http_proxy', 0)]); \
answer = rpc.HealthStub(channel).Check(pb.HealthCheckRequest(), timeout=2); \
raise SystemExit(answer.status != pb.HealthCheckResponse.SERVING)"]

ENTRYPOINT ["python", "-m", "serving"]

ARG VERSION=dev
ARG REVISION=unknown
LABEL org.opencontainers.image.title="capsnet-serving" \
      org.opencontainers.image.description="A capsule network served over gRPC, with Prometheus metrics" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.base.name="docker.io/library/python:3.12-slim-bookworm"
