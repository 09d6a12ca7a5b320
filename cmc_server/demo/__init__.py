"""What a first visitor needs: demo models from PyPI, the shipped deltas, and a few questions to a running server."""
