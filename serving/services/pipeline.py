"""Way from a service to the models and back, for single requests and for streams."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable

from serving.errors import ServingError
from serving.metrics.registry import CLASSIFY, ModelMetrics
from serving.repository.repository import Repository
from serving.rpc.edge import Call
from serving.services.request import Query, Reply, Request
from serving.services.stream import Refuse, Stream, StreamQuery


class Pipeline:
    """Takes requests to their models and back. stream_window: most images of one stream under way."""

    def __init__(self, repository: Repository, stream_window: int) -> None:
        self.repository = repository
        self._stream_window = stream_window
        self._streams: set[Stream] = set()

    def begin(self, query: Query, reply: Reply) -> None:
        """Answer a query, then or later, by its reply. Raises UnknownModel and InvalidRequest where no model fits."""
        Request(query, self.repository.get(query.model_name, query.model_version), reply).begin()

    def refusal(
        self, timeout: float | None, expected: int, urgent: bool, graph: str = CLASSIFY
    ) -> tuple[ServingError, ModelMetrics] | None:
        """Return the error that a request arriving now would get, and the metrics that count it.

        None if the request must be read to decide. timeout: seconds that it is given, or None. expected: requests that
        are to be begun before it. urgent: it may be.
        """
        model = self.repository.only
        if not model or not (served := model.graphs.get(graph)):
            return None
        error = served.batcher.refusal(timeout, urgent, expected)
        return (error, served.metrics) if error else None

    async def answer_stream(
        self, messages: AsyncIterator[bytes], parse: Callable[[bytes], StreamQuery], call: Call, refuse: Refuse
    ) -> AsyncGenerator[bytes]:
        """Answer a stream's requests in order, while later ones are read and computed, up to a window of images.

        parse: never raises; what cannot be parsed is a query with an ``error``. refuse: counts and logs an error, and
        tells its status. Raises Draining after ``end_streams``, and what reading the messages raises.
        """
        stream = Stream(call, refuse, self._stream_window)
        self._streams.add(stream)
        try:
            async for answer in stream.answers(messages, parse, self._request):
                yield answer
        finally:
            self._streams.discard(stream)
            await stream.close()

    def end_streams(self) -> None:
        """Read nothing further of any stream; each ends with UNAVAILABLE once what it has read is answered."""
        for stream in self._streams:
            stream.end()

    def _request(self, query: Query, reply: Reply) -> Request:
        return Request(query, self.repository.get(query.model_name, query.model_version), reply)
