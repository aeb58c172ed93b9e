"""From a checkpoint to a file that other programs run: an ONNX graph with the search inside."""
