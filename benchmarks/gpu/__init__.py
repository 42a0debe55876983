"""What a day with a GPU measures: training with data and augmentation on the device, ONNX Runtime, and the server."""
