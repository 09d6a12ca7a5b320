"""Vocabularies free of their tokenizers' spelling, and maps between them."""
