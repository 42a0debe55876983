"""Measurements on a GPU: training with data and augmentation on the device, ONNX Runtime, and the server."""
