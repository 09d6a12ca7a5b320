"""The HTTP service: vLLM's OpenAI server with the front door and the routes of deltas."""
