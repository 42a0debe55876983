"""The further graphs that the services use, and the models that have them."""

from serving.artifact import Artifact
from serving.errors import Unsupported
from serving.repository.further_graph import (
    AGREEMENTS,
    CLASS,
    CONTRIBUTIONS,
    COUPLINGS,
    IMAGE,
    POSE,
    PRIMARY_LENGTHS,
)

EXPLAIN, DECODER = "explain", "decoder"

_EXPLANATION = {COUPLINGS, AGREEMENTS, CONTRIBUTIONS, PRIMARY_LENGTHS}


def explains(artifact: Artifact) -> bool:
    """Return True if a model has a graph with all parts of an explanation. Older ones have the last couplings alone."""
    graph = artifact.graphs.get(EXPLAIN)
    return graph is not None and graph.outputs.keys() >= _EXPLANATION and graph.receptive_field is not None


def draws(artifact: Artifact) -> bool:
    """Return True if a model has a decoder. The manifests of older ones name no tensors."""
    graph = artifact.graphs.get(DECODER)
    return graph is not None and (not graph.inputs or (graph.inputs.keys() == {POSE, CLASS} and IMAGE in graph.outputs))


def check_explains(artifact: Artifact) -> None:
    """Raise Unsupported if a model cannot explain its answers."""
    if not explains(artifact):
        raise Unsupported(f"{artifact.name} version {artifact.version} has no graph that explains its answers")


def check_draws(artifact: Artifact) -> None:
    """Raise Unsupported if a model cannot draw poses."""
    if not draws(artifact):
        raise Unsupported(f"{artifact.name} version {artifact.version} has no decoder, which draws poses")
