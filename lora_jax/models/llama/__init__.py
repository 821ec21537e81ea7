"""Llama, and families of its shape."""
