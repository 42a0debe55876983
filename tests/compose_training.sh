#!/usr/bin/env bash
# Trains two short epochs with `docker compose --profile training`, beside the services that `docker compose up -d`
# started, and waits until the server answers by the version that came of it, without having been started again.
# CAPSNET_DATA, a folder with MNIST's four files, is for where the containers reach none of its mirrors, and TORCH=cuda or
# TORCH_SOURCE (see the Dockerfile) for where they do not reach PyTorch's own index.
set -euo pipefail
cd "$(dirname "$0")/.."

export CAPSNET_TRAINING_EPOCHS=2 CAPSNET_TRAINING_ARGS="--per-class 500 --ema-decay 0.9"

training() { docker compose --profile training "$@"; }

started() { docker inspect --format '{{.State.StartedAt}}' "$(docker compose ps --quiet capsnet)"; }

# The version that answers, as a client learns it.
version() {
    docker compose exec -T capsnet python -c '
import numpy as np
from serving.client import CapsNetClient

with CapsNetClient("127.0.0.1:8001") as client:
    [result] = client.classify(np.zeros((28, 28), np.uint8))
print(result.model_version)
'
}

before=$(version)
since=$(started)
echo "serving version $before"

training build --build-arg TORCH --build-arg TORCH_SOURCE training
mounts=()
[ -z "${CAPSNET_DATA:-}" ] || mounts=(--volume "$(realpath "$CAPSNET_DATA"):/work/cache/capsnet/mnist:ro")
training run --rm "${mounts[@]}" training

for _ in $(seq 30); do
    after=$(version)
    [ "$after" != "$before" ] && break
    sleep 1
done
[ "$after" -eq $((before + 1)) ] || { echo "version $after answers; expected $((before + 1))" >&2; exit 1; }
[ "$(started)" = "$since" ] || { echo "the server was started again" >&2; exit 1; }
echo "version $after answers; the server has run since $since"

# Twenty pictures become two classes, and a model of their own beside the first.
photos=$(mktemp --directory)
trap 'rm -r "$photos"' EXIT
mkdir "$photos/even" "$photos/odd"
cp tests/data/handwritten/[02468]*.* "$photos/even"
cp tests/data/handwritten/[13579]*.* "$photos/odd"
chmod --recursive a+rX "$photos"
CAPSNET_TRAINING_DATA=$photos CAPSNET_TRAINING_CONFIG=fast CAPSNET_TRAINING_EPOCHS=1 \
    CAPSNET_TRAINING_ARGS="--image-size 28" training run --rm training
docker compose exec -T capsnet test -f /models/capsnet-data/1/manifest.json
echo "a network of own images is exported"
