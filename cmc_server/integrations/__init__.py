"""Adapters to the engines: vLLM (both runners) and transformers."""
