"""BERT and MiniLM."""
