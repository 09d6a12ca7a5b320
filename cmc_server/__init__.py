"""Steer a large language model at decoding time with small, portable delta models."""

__version__ = "0.1.0"
