"""The network: encoder, attention, decoders, and the file that holds them all."""
