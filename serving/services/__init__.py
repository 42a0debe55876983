"""Services, each with its codec: protobuf messages to named arrays and back."""
