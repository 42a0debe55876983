"""The service's contract: the .proto files and the code generated from them."""
