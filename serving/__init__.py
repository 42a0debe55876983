"""Inference service for Capsule Networks."""
