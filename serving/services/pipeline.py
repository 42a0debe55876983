"""The way from a service to the models and back, for single requests and for streams."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Hashable

from serving.errors import ServingError
from serving.metrics.registry import CLASSIFY, ModelMetrics
from serving.repository.repository import Repository
from serving.rpc.edge import Call
from serving.services.computation import Caller, Computation
from serving.services.computed import ComputedQuery, ComputedRequest, ComputedStreamQuery
from serving.services.decoding import Decoder
from serving.services.places import Places
from serving.services.request import Query, Reply, Request
from serving.services.stream import Refuse, Stream, StreamQuery

# The most images of streams that take several graphs each at once: enough for large batches. The outputs of each, and
# the masked copies of one whose relevance is asked for, take 300 KB.
_MAX_COMPUTED_IMAGES = 64


class Pipeline:
    """The way of requests to their models and back.

    stream_window: the most images of one stream in flight. decoder: the threads for slow decodings.
    """

    def __init__(self, repository: Repository, stream_window: int, decoder: Decoder) -> None:
        self.repository = repository
        self._decoder = decoder
        self._stream_window = stream_window
        self._streams: set[Stream] = set()
        self._places = Places(_MAX_COMPUTED_IMAGES)

    def begin(self, query: Query | ComputedQuery, reply: Reply) -> None:
        """Answer a query through its reply, now or later. Raises UnknownModel and InvalidRequest if no model fits."""
        self._request(query, reply).begin()

    def computation(self, model_name: str, model_version: str, caller: Caller) -> Computation:
        """Return the computation of a call that needs several graphs. Raises UnknownModel if no model fits."""
        return Computation(self.repository.get(model_name, model_version), caller, self._decoder)

    def refusal(
        self, timeout: float | None, expected: int, client: Hashable, *, urgent: bool, graph: str = CLASSIFY
    ) -> tuple[ServingError, ModelMetrics] | None:
        """Return the error that a request arriving now would get before it is read, and the metrics that count it.

        None: the request must be read to decide. timeout: its timeout in seconds, or None. expected: requests that will
        begin before it. client: its client. urgent: True if it may be urgent.
        """
        model = self.repository.only
        if not model or not (served := model.graphs.get(graph)):
            return None
        error = served.batcher.refusal(timeout, urgent, expected, client)
        return (error, served.metrics) if error else None

    async def answer_stream(
        self,
        messages: AsyncIterator[bytes],
        parse: Callable[[bytes], StreamQuery | ComputedStreamQuery],
        call: Call,
        refuse: Refuse,
    ) -> AsyncGenerator[bytes]:
        """Answer a stream's requests in order, while later ones are read and computed, up to a window of images.

        parse: never raises; it returns a query with an ``error`` for an invalid message. refuse: counts and logs an
        error, and returns its status. Raises Draining after ``end_streams``, and any error of reading the messages.
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
        """Stop reading all streams. Each ends with UNAVAILABLE when its read requests are answered."""
        for stream in self._streams:
            stream.end()

    def _request(self, query: Query | ComputedQuery, reply: Reply) -> Request | ComputedRequest:
        model = self.repository.get(query.model_name, query.model_version)
        if isinstance(query, ComputedQuery):
            return ComputedRequest(query, Computation(model, reply, self._decoder), reply, self._places)
        return Request(query, model, reply, self._decoder)
