#!/usr/bin/env bash
# Sends one digit to the services that `docker compose up -d` started, and finds that call again in Prometheus.
# CAPSNET_ADDRESS, METRICS_URL, PROMETHEUS_URL and PYTHON (one with the project installed) say where they differ.
set -euo pipefail
cd "$(dirname "$0")/.."

address=${CAPSNET_ADDRESS:-127.0.0.1:8001}
export METRICS_URL=${METRICS_URL:-http://127.0.0.1:8002}
export PROMETHEUS_URL=${PROMETHEUS_URL:-http://127.0.0.1:9090}

# An environment that make has begun but not filled has a Python and no gRPC.
for python in "${PYTHON:-}" .venv/bin/python .venv-dev/bin/python python3; do
    if [ -n "$python" ] && "$python" -c 'import grpc, protos.capsnet.v1.capsnet_pb2' 2>/dev/null; then
        break
    fi
    python=
done
[ -n "$python" ] || { echo "no Python with the project installed; run: make .venv/.installed" >&2; exit 1; }

answer=$("$python" -m serving.client --address "$address" --timeout 20 --json tests/data/seven.png)
"$python" -c '
import json, sys

answer = json.loads(sys.argv[1])
print("answer:", answer["label"], "by", answer["model_name"], answer["model_version"])
sys.exit(answer["label"] != "7" and "tests/data/seven.png is a 7")
' "$answer"

"$python" - <<'PYTHON'
import json
import os
import sys
import time
import urllib.parse
import urllib.request

# The services are on this machine or its network: no proxy of the environment reaches them.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
UP = 'up{job="capsnet"}'
HANDLED = 'grpc_server_handled_total{grpc_code="OK",grpc_method="ClassifyStream",job="capsnet"}'


def get(url: str) -> str:
    try:
        with OPENER.open(url, timeout=10) as response:
            return str(response.read().decode())
    except OSError as error:
        sys.exit(f"{url}: {error}")


def query(expression: str) -> float:
    """The value of an expression in Prometheus, 0 where it has no sample yet."""
    parameters = urllib.parse.urlencode({"query": f"sum({expression})"})
    result = json.loads(get(f"{os.environ['PROMETHEUS_URL']}/api/v1/query?{parameters}"))["data"]["result"]
    return float(result[0]["value"][1]) if result else 0.0


def counted() -> float:
    return sum(
        float(line.rpartition(" ")[2])
        for line in get(f"{os.environ['METRICS_URL']}/metrics").splitlines()
        if line.startswith("grpc_server_handled_total{")
        and 'grpc_code="OK"' in line
        and 'grpc_method="ClassifyStream"' in line
    )


# The client has its last answer a moment before the server ends the call.
end = time.monotonic() + 5
while not (expected := counted()):
    if time.monotonic() > end:
        sys.exit("the server answered, but its grpc_server_handled_total does not count it")
    time.sleep(0.1)
# Only a scrape after the call counts: what an earlier one left may be of a server that has restarted since.
last_scrape = query(f"timestamp({UP})")
end = time.monotonic() + 30
while True:
    fresh, up, handled = query(f"timestamp({UP})") > last_scrape, query(UP), query(HANDLED)
    if fresh and up == 1 and handled >= expected:
        break
    if time.monotonic() > end:
        sys.exit(f"Prometheus shows up {up:g} and {handled:g} handled calls; expected 1 and {expected:g} or more")
    time.sleep(1)
print(f"Prometheus: up {up:g}, grpc_server_handled_total {handled:g} (the server counts {expected:g})")
PYTHON
