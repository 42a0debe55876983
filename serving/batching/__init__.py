"""Dynamic batching: requests that wait at the same time are computed together."""
