"""Statistics of a model since it was loaded, in the terms of Triton's statistics extension."""

from dataclasses import dataclass, field

#: Triton's reasons: refused; given up by the client; not computed; any other, such as a wrong request.
REJECTED, CANCELED, BACKEND, OTHER = FAILURES = ("REJECTED", "CANCELED", "BACKEND", "OTHER")


@dataclass(slots=True)
class Duration:
    """The number of events, and the sum of their seconds."""

    count: int = 0
    seconds: float = 0.0

    @property
    def ns(self) -> int:
        """Return the sum in nanoseconds."""
        return round(self.seconds * 1e9)

    @property
    def us(self) -> int:
        """Return the sum in whole microseconds, rounded down."""
        return self.ns // 1000

    def add(self, seconds: float, times: int = 1) -> None:
        self.count += times
        self.seconds += seconds * times


@dataclass(slots=True)
class BatchStatistics:
    """The times of all batches of one size: joining the inputs, and ONNX Runtime's call."""

    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)


@dataclass(slots=True)
class Statistics:
    """The statistics of one graph of a version.

    last_inference: milliseconds since 1970. inference_count: images computed. execution_count: batches computed.
    success, fail: requests, from arrival to answer. failures: failed requests by Triton's reasons.
    queue, compute_input, compute_infer, compute_output: the steps of successful requests.
    """

    last_inference: int = 0
    inference_count: int = 0
    execution_count: int = 0
    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)
    failures: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FAILURES, 0))
    batches: dict[int, BatchStatistics] = field(default_factory=dict)

    def answered(self, queue: float, compute_input: float, compute_infer: float, compute_output: float) -> None:
        """Count a successful request, with the seconds of each step."""
        self.success.add(queue + compute_input + compute_infer + compute_output)
        self.queue.add(queue)
        self.compute_input.add(compute_input)
        self.compute_infer.add(compute_infer)
        self.compute_output.add(compute_output)
