"""Make delta models beside a frozen template LLM."""
