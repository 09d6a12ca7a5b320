"""The playground: a static page for people, at ``/``."""
