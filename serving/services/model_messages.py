"""The description of a model for ``capsnet.v1``."""

from protos.capsnet.v1 import capsnet_pb2 as pb
from serving.artifact import Artifact, Calibration, Preparation
from serving.repository.served_model import ServedModel
from serving.services.graphs import EXPLAIN, draws, explains
from serving.settings import Settings

_POLARITIES = {"bright-on-dark": pb.POLARITY_BRIGHT_ON_DARK, "dark-on-bright": pb.POLARITY_DARK_ON_BRIGHT}


def description(model: ServedModel, settings: Settings) -> pb.GetModelResponse:
    """Return the description of a served version."""
    artifact, classify = model.artifact, model.classify
    channels, height, width = artifact.image_shape
    variant, plan = artifact.variant(settings.precision), classify.plan
    return pb.GetModelResponse(
        model_name=artifact.name,
        model_version=artifact.version,
        labels=artifact.labels,
        image_channels=channels,
        image_height=height,
        image_width=width,
        pose_size=artifact.pose_size,
        max_images_per_request=settings.max_images_per_request,
        max_request_bytes=settings.max_request_bytes,
        execution_provider=classify.runtime.provider,
        sha256=artifact.sha256(settings.precision),
        precision=settings.precision,
        dataset=artifact.training.dataset,
        test_errors=variant.test_errors,
        test_images=variant.test_images,
        preparation=_preparation(artifact.preparation),
        calibration=_calibration(artifact.calibration) if artifact.calibration else None,
        primary_capsules=primary_capsules(artifact) if explains(artifact) else None,
        reconstructs=draws(artifact),
        tuning=pb.Tuning(
            threads=plan.threads,
            runtimes=plan.runtimes,
            max_batch=plan.max_batch,
            image_seconds=classify.cost.per_image,
            batch_seconds=classify.cost.per_batch,
            compared=[pb.Timing(**timing._asdict()) for timing in classify.tuned.compared],
        ),
    )


def primary_capsules(artifact: Artifact) -> pb.PrimaryCapsules:
    """Return the primary capsules of a model that explains its answers, and the pixels that they see."""
    field = artifact.graphs[EXPLAIN].receptive_field
    assert field
    return pb.PrimaryCapsules(
        types=field.types,
        rows=field.grid,
        columns=field.grid,
        offset=field.offset,
        stride=field.stride,
        size=field.size,
    )


def _preparation(preparation: Preparation) -> pb.Preparation:
    return pb.Preparation(
        polarity=_POLARITIES.get(preparation.polarity, pb.POLARITY_UNSPECIFIED),
        object_size=preparation.object_size,
        centred_by_mass=preparation.centred_by_mass,
    )


def _calibration(calibration: Calibration) -> pb.Calibration:
    return pb.Calibration(
        temperature=calibration.temperature,
        presence=calibration.presence,
        margin=calibration.margin,
        reconstruction_error=calibration.reconstruction_error,
        false_alarms=calibration.false_alarms,
        objects=calibration.objects,
        arctanh=calibration.arctanh,
    )
