"""The rule, the life of a request, and the slow oracle."""
