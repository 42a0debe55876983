"""Export of a trained checkpoint as a verified ONNX artifact."""
