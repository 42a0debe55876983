"""The claims made for capsule networks, measured one by one on networks of the same size that learn the same way."""
