"""Long runs of the server under mixed load, with every answer compared; and broken requests in large numbers."""
